#include "tests/kernels/cuda/attention_case.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <span>
#include <utility>

#include "kernels/device_kv.h"
#include "kernels/kv_rows.h"
#include "tests/kernels/backend_fixture.h"
#include "tests/reference/attention_reference.h"

namespace kvshare::kernels::cuda {
namespace {

std::vector<float> Normal(std::mt19937_64& random, std::size_t n, float sigma) {
  std::normal_distribution<float> normal(0.0f, sigma);
  std::vector<float> x(n);
  for (float& f : x) f = normal(random);
  return x;
}

// A copy of host bytes in the backend's memory.
template <typename T>
std::unique_ptr<Buffer> OnBackend(Backend& backend, const std::vector<T>& host) {
  auto buffer = backend.Allocate(host.size() * sizeof(T));
  EXPECT_TRUE(buffer.ok()) << buffer.status().message();
  const Status status = backend.Upload((*buffer)->data(), host.data(), host.size() * sizeof(T));
  EXPECT_TRUE(status.ok()) << status.message();
  return std::move(buffer).value();
}

}  // namespace

AttentionCase::AttentionCase(const AttentionShape& shape, std::vector<std::int64_t> positions, std::uint64_t seed)
    : shape_(shape), positions_(std::move(positions)), random_(seed) {
  std::vector<float> cos, sin;
  for (int j = 0; j < shape.half; ++j) inv_freq_.push_back(std::pow(10000.0, -double(j) / shape.half));
  for (std::int64_t p = 0; p < kPositions; ++p) {
    for (const double f : inv_freq_) {
      cos.push_back(static_cast<float>(std::cos(static_cast<double>(p) * f)));
      sin.push_back(static_cast<float>(std::sin(static_cast<double>(p) * f)));
    }
  }
  cos_ = std::make_shared<std::vector<float>>(std::move(cos));
  sin_ = std::make_shared<std::vector<float>>(std::move(sin));
  q_ = Normal(random_, positions_.size() * static_cast<std::size_t>(shape.num_heads * shape.head_dim), 1.5f);
}

KeyRun& AttentionCase::Add(KeyRun run) {
  const auto values = static_cast<std::size_t>(run.length * shape_.num_kv_heads * shape_.head_dim);
  run.k = Normal(random_, values, 0.7f);
  run.v = Normal(random_, values, 1.0f);
  runs_.push_back(std::move(run));
  return runs_.back();
}

std::int64_t AttentionCase::Uniform(std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(random_);
}

AttentionCase AttentionCase::Rows(const std::vector<std::int64_t>& rows) const {
  AttentionCase part(shape_, {}, 0);
  part.window_ = window_;
  const auto width = static_cast<std::ptrdiff_t>(shape_.num_heads * shape_.head_dim);
  for (const std::int64_t r : rows) {
    part.positions_.push_back(positions_[static_cast<std::size_t>(r)]);
    part.q_.insert(part.q_.end(), q_.begin() + r * width, q_.begin() + (r + 1) * width);
  }
  part.runs_ = runs_;
  for (KeyRun& run : part.runs_) {
    run.row_begin = std::lower_bound(rows.begin(), rows.end(), run.row_begin) - rows.begin();
    run.row_end = std::lower_bound(rows.begin(), rows.end(), run.row_end) - rows.begin();
  }
  return part;
}

void AttentionCase::Lay(DType dtype, std::uint64_t seed) {
  const KvLayout layout{2, shape_.num_kv_heads, shape_.head_dim, dtype};
  std::size_t count = 2;
  for (const KeyRun& run : runs_) count += static_cast<std::size_t>((run.first + run.length + 63) / 64);
  bytes_.assign(layout.page_bytes() * count, std::byte{0xff});  // NaN
  std::vector<PageIndex> free(count);
  std::iota(free.begin(), free.end(), PageIndex{0});
  std::mt19937_64 random(seed);
  std::shuffle(free.begin(), free.end(), random);
  p_.pages = {bytes_.data(), static_cast<PageIndex>(count), layout};
  segments_.clear();
  tables_.assign(runs_.size(), {});
  skips_.assign(runs_.size(), {});
  const auto width = static_cast<std::size_t>(shape_.num_kv_heads * shape_.head_dim);
  for (std::size_t n = 0; n < runs_.size(); ++n) {
    const KeyRun& run = runs_[n];
    for (std::int64_t row = 0; row < run.first + run.length; row += 64) {
      tables_[n].push_back(free.back());
      free.pop_back();
    }
    if (!run.skipped.empty()) skips_[n].assign(tables_[n].size(), 0);
    KvSegment s{.pages = tables_[n],
                .start = run.start,
                .length = run.length,
                .shift = run.shift,
                .row_begin = run.row_begin,
                .row_end = run.row_end,
                .skip = {},
                .positions = run.positions,
                .first = run.first};
    for (std::int64_t t = 0; t < run.length; ++t) {
      const std::int64_t row = run.first + t;
      const auto token = static_cast<std::size_t>(t);
      if (!run.skipped.empty() && run.skipped[token]) {
        skips_[n][static_cast<std::size_t>(row / 64)] |= std::uint64_t{1} << (row % 64);
        continue;  // stays NaN
      }
      StoreRow(p_.pages, 1, KvPart::kKey, SlotOf(s, t), std::span(run.k).subspan(token * width, width));
      StoreRow(p_.pages, 1, KvPart::kValue, SlotOf(s, t), std::span(run.v).subspan(token * width, width));
    }
    s.skip = skips_[n];
    segments_.push_back(s);
  }
  const std::int64_t cols = std::int64_t{shape_.num_heads} * shape_.head_dim;
  p_.q = {q_.data(), DType::kF32, rows(), cols, cols};
  p_.num_heads = shape_.num_heads;
  p_.layer = 1;
  p_.scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  p_.window = window_;
  p_.rope = {*cos_, *sin_, kPositions, shape_.half};
  p_.positions = positions_;
  p_.segments = segments_;
}

AttentionCase::OnDevice AttentionCase::Upload(Backend& backend) const {
  OnDevice there;
  there.p = p_;
  const auto put = [&](const auto& host) {
    there.buffers.push_back(OnBackend(backend, host));
    return there.buffers.back()->data();
  };
  there.p.pages.base = put(bytes_);
  there.p.q.data = put(q_);
  there.p.rope.cos = {reinterpret_cast<const float*>(put(*cos_)), cos_->size()};
  there.p.rope.sin = {reinterpret_cast<const float*>(put(*sin_)), sin_->size()};
  return there;
}

template <typename T>
void AttentionCase::RunInto(Backend& backend, std::uint64_t seed, DType dtype, std::vector<T>* out) {
  Lay(backend.capabilities().compute, seed);
  OnDevice there = Upload(backend);
  const auto dst = OnBackend(backend, *out);
  there.p.out = {dst->data(), dtype, rows(), p_.q.cols, p_.q.cols};
  backend.Attention(there.p);
  const Status status = backend.Download(out->data(), dst->data(), out->size() * sizeof(T));
  EXPECT_TRUE(status.ok()) << status.message();
}

std::vector<float> AttentionCase::Run(Backend& backend, std::uint64_t seed) {
  std::vector<float> out(q_.size(), std::nanf(""));
  RunInto(backend, seed, DType::kF32, &out);
  return out;
}

std::vector<std::uint16_t> AttentionCase::RunNarrow(Backend& backend, std::uint64_t seed) {
  std::vector<std::uint16_t> out(q_.size(), 0xffff);
  RunInto(backend, seed, backend.capabilities().compute, &out);
  return out;
}

std::vector<std::vector<float>> AttentionCase::Mass(Backend& backend, const std::vector<std::int64_t>& rows,
                                                    std::uint64_t seed, std::size_t idle) {
  Lay(backend.capabilities().compute, seed);
  const OnDevice there = Upload(backend);
  std::vector<std::vector<float>> mass;
  std::vector<std::unique_ptr<Buffer>> buffers;
  std::vector<float*> to;
  for (const KvSegment& s : there.p.segments) {
    mass.emplace_back(static_cast<std::size_t>(s.length), 0.25f);
    buffers.push_back(OnBackend(backend, mass.back()));
    to.push_back(buffers.size() - 1 == idle ? nullptr : reinterpret_cast<float*>(buffers.back()->data()));
  }
  backend.device_kv()->AttentionMass(there.p, rows, to);
  for (std::size_t n = 0; n < mass.size(); ++n) {
    const Status status = backend.Download(mass[n].data(), buffers[n]->data(), mass[n].size() * sizeof(float));
    EXPECT_TRUE(status.ok()) << status.message();
  }
  return mass;
}

void ExpectNearOracle(const AttentionCase& batch, const std::vector<float>& got) {
  const reference::AttentionResult want = reference::Attention(batch.params(), batch.inv_freq());
  const auto d = static_cast<std::size_t>(batch.shape().head_dim);
  const auto width = static_cast<std::int64_t>(batch.shape().num_heads) * batch.shape().head_dim;
  // Queries and weights are rounded to the pages' dtype, the rest is fp32. No key or value is greater than 6, and some
  // weight is at least 1.
  const DType half = batch.params().pages.layout.dtype;
  const double eps = DTypeEps(half), tiny = 6 * DTypeTiny(half);
  const double query = eps + (static_cast<double>(d) + 16) * kF32Eps, weight = eps + 4096 * kF32Eps;
  double keys = 0;
  for (const KvSegment& s : batch.params().segments) keys += static_cast<double>(s.length);
  WorstError worst("attention");
  double square = 0, reference = 0;
  for (std::size_t i = 0; i < want.out.size(); ++i) {
    const double e = query * want.score_bound[i / d] + static_cast<double>(d) * tiny;
    const double bound = want.weighted_abs[i] * (2 * std::expm1(e) + 2 * weight) + std::abs(want.out[i]) * 4 * kF32Eps;
    const double value = static_cast<double>(got[i]);
    worst.Compare(value, want.out[i], bound + keys * tiny + 1e-30, static_cast<std::int64_t>(i) / width,
                  static_cast<std::int64_t>(i) % width);
    square += (value - want.out[i]) * (value - want.out[i]);
    reference += want.out[i] * want.out[i];
  }
  // Rounding errors are independent: far below the worst case together, else something is biased.
  EXPECT_LE(std::sqrt(square), eps * std::sqrt(reference) + 1e-30);
}

AttentionCase RandomCase(const AttentionShape& shape, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::int64_t> positions(20 + random() % 20);
  for (std::int64_t& p : positions) p = static_cast<std::int64_t>(random() % 500);
  AttentionCase batch(shape, positions, seed + 1);
  if (seed % 3 == 0) batch.set_window(90);
  for (int n = 0; n < 3; ++n) {
    KeyRun run;
    run.start = batch.Uniform(0, 300);
    run.length = batch.Uniform(1, 150);
    run.shift = n == 0 ? 0 : run.start - batch.Uniform(0, 600);
    run.row_begin = batch.Uniform(0, 4);
    run.row_end = batch.Uniform(run.row_begin, batch.rows());
    run.first = static_cast<int>(batch.Uniform(0, 63));
    if (n == 1) {
      for (std::int64_t t = 0; t < run.length; ++t) run.skipped.push_back(batch.Uniform(0, 2) == 0);
    } else if (n == 2) {
      run.shift = 0;
      std::int64_t at = batch.Uniform(0, 40);
      for (std::int64_t t = 0; t < run.length; ++t, at += batch.Uniform(1, 5)) run.positions.push_back(at);
    }
    batch.Add(std::move(run));
  }
  return batch;
}

}  // namespace kvshare::kernels::cuda

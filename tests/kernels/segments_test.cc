// What a selective forward adds to attention: keys at positions of their own, runs that begin within a page, and the
// mass that keys receive. Against the oracles, in every version of the kernels.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "kernels/attention_mass.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/kv_rows.h"
#include "tests/kernels/backend_fixture.h"
#include "tests/reference/attention_reference.h"

namespace kvshare::kernels {
namespace {

constexpr int kHeads = 6, kKvHeads = 2, kHalf = 12;
constexpr std::int64_t kPositions = 1024;

// AMX takes multiples of 32; the others pad what is no multiple of 16.
int HeadDim(BackendCase version) { return version.isa == CpuIsa::kAmxBf16 ? 32 : 24; }

// A batch of rows over segments, put together run by run. What nobody may read holds NaN.
class Batch {
 public:
  Batch(BackendCase version, std::vector<std::int64_t> positions, std::uint64_t seed, std::int64_t window = 0)
      : layout_{2, kKvHeads, HeadDim(version), version.dtype},
        positions_(std::move(positions)),
        random_(seed),
        window_(window) {
    for (int j = 0; j < kHalf; ++j) inv_freq_.push_back(std::pow(1000.0, -double(j) / kHalf));
    for (std::int64_t p = 0; p < kPositions; ++p) {
      for (const double f : inv_freq_) {
        cos_.push_back(static_cast<float>(std::cos(static_cast<double>(p) * f)));
        sin_.push_back(static_cast<float>(std::sin(static_cast<double>(p) * f)));
      }
    }
    q_ = Normal(positions_.size() * static_cast<std::size_t>(width()), 1.5f);
  }

  std::vector<float> Normal(std::size_t n, float sigma) {
    std::normal_distribution<float> normal(0.0f, sigma);
    std::vector<float> x(n);
    for (float& f : x) f = normal(random_);
    return x;
  }
  std::int64_t Uniform(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random_);
  }

  struct Run {
    KvSegment segment;  // without its spans
    std::vector<PageIndex> pages;
    std::vector<std::uint64_t> skip;
    std::vector<std::int64_t> positions;
    std::vector<float> k, v;  // [token][width of a stored row]
  };

  Run& Add(std::int64_t start, std::int64_t length, std::int64_t shift, int first) {
    Run run;
    run.segment = {.start = start, .length = length, .shift = shift, .row_end = rows(), .first = first};
    run.k = Normal(static_cast<std::size_t>(length) * kv_width(), 0.7f);
    run.v = Normal(run.k.size(), 1.0f);
    for (std::int64_t row = 0; row < first + length; row += kPageTokens) run.pages.push_back(num_pages_++);
    runs_.push_back(std::move(run));
    return runs_.back();
  }
  static void Skip(Run* run, std::int64_t token) {
    run->skip.resize(run->pages.size());
    const std::int64_t row = run->segment.first + token;
    run->skip[static_cast<std::size_t>(row / 64)] |= std::uint64_t{1} << (row % 64);
  }
  std::int64_t width() const { return kHeads * layout_.head_dim; }
  std::size_t kv_width() const { return static_cast<std::size_t>(kKvHeads * layout_.head_dim); }
  std::vector<Run>& runs() { return runs_; }
  std::int64_t rows() const { return static_cast<std::int64_t>(positions_.size()); }

  // Writes the pages; afterwards params() is what was put together.
  const AttentionParams& Lay() {
    bytes_.assign(layout_.page_bytes() * num_pages_, std::byte{0xff});
    p_.pages = {bytes_.data(), num_pages_, layout_};
    segments_.clear();
    const std::size_t row_width = kv_width();
    for (const Run& run : runs_) {
      KvSegment s = run.segment;
      s.pages = run.pages;
      s.skip = run.skip;
      s.positions = run.positions;
      for (std::int64_t t = 0; t < s.length; ++t) {
        const std::int64_t row = s.first + t;
        if (!run.skip.empty() && ((run.skip[static_cast<std::size_t>(row / 64)] >> (row % 64)) & 1) != 0) continue;
        const auto at = static_cast<std::size_t>(t) * row_width;
        StoreRow(p_.pages, 1, KvPart::kKey, SlotOf(s, t), std::span(run.k).subspan(at, row_width));
        StoreRow(p_.pages, 1, KvPart::kValue, SlotOf(s, t), std::span(run.v).subspan(at, row_width));
      }
      segments_.push_back(s);
    }
    out_.assign(q_.size(), std::numeric_limits<float>::quiet_NaN());
    p_.q = {q_.data(), DType::kF32, rows(), width(), width()};
    p_.num_heads = kHeads;
    p_.layer = 1;
    p_.scale = 1.0f / std::sqrt(static_cast<float>(layout_.head_dim));
    p_.window = window_;
    p_.rope = {cos_, sin_, kPositions, kHalf};
    p_.positions = positions_;
    p_.segments = segments_;
    p_.out = {out_.data(), DType::kF32, rows(), width(), width()};
    return p_;
  }

  std::vector<float> Attend(CpuIsa isa) {
    Lay();
    ThreadPool pool(2);
    CpuAttention(p_, isa, pool);
    return out_;
  }
  const std::vector<double>& inv_freq() const { return inv_freq_; }

 private:
  KvLayout layout_;
  std::vector<std::int64_t> positions_;
  std::mt19937_64 random_;
  std::int64_t window_;
  std::vector<double> inv_freq_;
  std::vector<float> cos_, sin_, q_, out_;
  std::vector<Run> runs_;
  std::vector<KvSegment> segments_;
  std::vector<std::byte> bytes_;
  PageIndex num_pages_ = 0;
  AttentionParams p_;
};

class SegmentsTest : public ::testing::TestWithParam<BackendCase> {
 protected:
  static CpuIsa isa() { return GetParam().isa; }
  static DType dtype() { return GetParam().dtype; }
  static int head_dim() { return HeadDim(GetParam()); }
  static bool bf16_math() { return MultipliesBf16(isa()) && dtype() == DType::kBf16; }

  // Chunks that moved forth and back, begin anywhere in a page and are skipped in part, and private rows at positions
  // of their own; not every row sees every segment, and some see none.
  static Batch RandomBatch(std::uint64_t seed, std::int64_t window) {
    std::mt19937_64 random(seed);
    std::vector<std::int64_t> positions(static_cast<std::size_t>(20 + random() % 30));
    for (std::int64_t& p : positions) p = static_cast<std::int64_t>(random() % 700);
    std::sort(positions.begin(), positions.end());
    Batch batch(GetParam(), positions, seed + 1, window);
    for (int n = 0; n < 4; ++n) {
      const std::int64_t start = batch.Uniform(0, 500), base = batch.Uniform(0, 600), length = batch.Uniform(1, 200);
      Batch::Run& run = batch.Add(start, length, n == 0 ? 0 : start - base, static_cast<int>(batch.Uniform(0, 63)));
      if (n % 2 == 1) {
        for (std::int64_t t = 0; t < length; ++t) {
          if (batch.Uniform(0, 2) == 0) Batch::Skip(&run, t);
        }
      } else if (n == 2) {
        run.segment.shift = 0;
        std::int64_t at = batch.Uniform(0, 40);
        for (std::int64_t t = 0; t < length; ++t, at += batch.Uniform(1, 5)) run.positions.push_back(at);
      }
      run.segment.row_begin = batch.Uniform(0, 4);
      run.segment.row_end = batch.Uniform(run.segment.row_begin, batch.rows());
    }
    return batch;
  }
};

TEST_P(SegmentsTest, PositionsAndFirstRowsAreNearOracle) {
  for (std::uint64_t seed = 1; seed <= 12; ++seed) {
    Batch batch = RandomBatch(seed, seed % 3 == 0 ? 90 : 0);
    const std::vector<float> got = batch.Attend(isa());
    const reference::AttentionResult want = reference::Attention(batch.Lay(), batch.inv_freq());
    // The bound of attention_test.cc.
    const double unit = 0x1p-24;
    const double query = (bf16_math() ? 0x1p-8 : 0.0) + (head_dim() + 16) * unit;
    const double weight = (bf16_math() ? 0x1p-8 : 0.0) + 4096 * unit;
    WorstError worst("seed " + std::to_string(seed));
    for (std::size_t i = 0; i < want.out.size(); ++i) {
      const double e = query * want.score_bound[i / static_cast<std::size_t>(head_dim())];
      const double bound =
          want.weighted_abs[i] * (2 * std::expm1(e) + 2 * weight) + std::abs(want.out[i]) * 4 * unit + 1e-30;
      worst.Compare(static_cast<double>(got[i]), want.out[i], bound, static_cast<std::int64_t>(i) / batch.width(),
                    static_cast<std::int64_t>(i) % batch.width());
    }
  }
}

TEST_P(SegmentsTest, PositionsThatSayWhatIsSaidAnywayKeepTheBits) {
  for (const std::int64_t window : {0, 70}) {
    std::vector<std::int64_t> positions(300);
    std::iota(positions.begin(), positions.end(), 150);
    Batch batch(GetParam(), positions, 5, window);
    batch.Add(0, 200, 0, 0);
    batch.Add(200, 250, 0, 0);
    const std::vector<float> want = batch.Attend(isa());
    for (Batch::Run& run : batch.runs()) {
      run.positions.resize(static_cast<std::size_t>(run.segment.length));
      std::iota(run.positions.begin(), run.positions.end(), run.segment.start);
      run.segment.start = 1 << 20;  // unused now
    }
    EXPECT_EQ(std::memcmp(batch.Attend(isa()).data(), want.data(), want.size() * sizeof(float)), 0);
  }
}

// Keys before `first` and keys that are skipped are no keys: only the numbering of page rows is shared with them.
TEST_P(SegmentsTest, AFirstRowIsASkippedBeginning) {
  std::vector<std::int64_t> positions(80);
  std::iota(positions.begin(), positions.end(), 120);
  for (const int first : {1, 31, 63}) {
    Batch batch(GetParam(), positions, 6);
    Batch::Run& run = batch.Add(10, 150, 0, first);
    const std::vector<float> want = batch.Attend(isa());
    const auto lead = static_cast<std::size_t>(first) * batch.kv_width();
    run.k.insert(run.k.begin(), lead, 0.0f);
    run.v.insert(run.v.begin(), lead, 0.0f);
    run.segment.start -= first;
    run.segment.length += first;
    run.segment.first = 0;
    for (std::int64_t t = 0; t < first; ++t) Batch::Skip(&run, t);
    EXPECT_EQ(std::memcmp(batch.Attend(isa()).data(), want.data(), want.size() * sizeof(float)), 0) << first;
  }
}

// Partial results are not cleared before somebody sees a key.
TEST_P(SegmentsTest, WhatACallLeftBehindDoesNotShow) {
  Batch batch = RandomBatch(5, 0);
  const std::vector<float> want = batch.Attend(isa());
  for (const float x : want) ASSERT_FALSE(std::isnan(x));
  Batch bad = RandomBatch(5, 0);
  for (Batch::Run& run : bad.runs()) std::ranges::fill(run.v, std::numeric_limits<float>::quiet_NaN());
  for (const float x : bad.Attend(isa())) ASSERT_TRUE(std::isnan(x) || x == 0.0f);
  EXPECT_EQ(std::memcmp(batch.Attend(isa()).data(), want.data(), want.size() * sizeof(float)), 0);
}

TEST_P(SegmentsTest, MassIsNearOracle) {
  for (std::uint64_t seed = 21; seed <= 30; ++seed) {
    Batch batch = RandomBatch(seed, seed % 3 == 0 ? 90 : 0);
    const AttentionParams& p = batch.Lay();
    std::vector<std::int64_t> rows;
    for (std::int64_t i = 0; i < batch.rows(); ++i) {
      if (seed % 2 == 0 || i % 3 == 0) rows.push_back(i);
    }
    const reference::MassResult want = reference::AttentionMass(p, batch.inv_freq(), rows);
    std::vector<std::vector<float>> got;
    std::vector<std::span<float>> spans;
    for (const KvSegment& s : p.segments) got.emplace_back(static_cast<std::size_t>(s.length), 0.25f);
    for (auto& mass : got) spans.emplace_back(mass);
    spans[1] = {};  // nobody asks
    AttentionMass(p, rows, spans, isa());
    // Where queries are rounded to bf16, their scores are off by as much.
    const double rounded = bf16_math() ? 0x1p-8 : 0;
    const double unit = 0x1p-24, e = ((head_dim() + 16) * unit + rounded) * want.score_bound;
    WorstError worst("seed " + std::to_string(seed));
    double total = 0;
    for (std::size_t s = 0; s < got.size(); ++s) {
      for (std::size_t t = 0; t < got[s].size(); ++t) {
        const double was = 0.25, mass = s == 1 ? 0 : want.mass[s][t];
        total += s == 1 ? want.mass[s][t] : static_cast<double>(got[s][t]) - was;
        // It is added to what is there; the sum over rows rounds once a row.
        worst.Compare(static_cast<double>(got[s][t]), was + mass,
                      mass * (2 * std::expm1(e) + 4096 * unit) + 64 * unit * (was + mass), static_cast<std::int64_t>(s),
                      static_cast<std::int64_t>(t));
      }
    }
    EXPECT_LE(total, static_cast<double>(rows.size()) * kHeads * (1 + 1e-3));
    EXPECT_GT(total, 0);
  }
}

TEST_P(SegmentsTest, RowsThatSeeNothingGiveNothing) {
  Batch batch(GetParam(), {5, 6, 7}, 9);
  batch.Add(100, 40, 0, 3);
  std::vector<float> mass(40, 0.0f);
  const std::vector<std::int64_t> rows = {0, 1, 2};
  const std::span<float> spans[] = {mass};
  AttentionMass(batch.Lay(), rows, spans, isa());
  EXPECT_EQ(mass, std::vector<float>(40, 0.0f));
  // The first key alone is seen by one row alone.
  batch.runs()[0].segment.start = 7;
  AttentionMass(batch.Lay(), rows, spans, isa());
  EXPECT_FLOAT_EQ(mass[0], kHeads);
  EXPECT_EQ(std::accumulate(mass.begin() + 1, mass.end(), 0.0f), 0.0f);
}

INSTANTIATE_TEST_SUITE_P(Versions, SegmentsTest, ::testing::ValuesIn(BackendCases()), BackendCaseName);

}  // namespace
}  // namespace kvshare::kernels

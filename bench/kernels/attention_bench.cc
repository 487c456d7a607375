// Attention on the CPU: useful GFLOP/s (4 * heads * head_dim * visible keys), and the share of the dot-product peak
// of one core, measured in this process, times the threads. GFLOP/s is of the best iteration and per_core of the
// processor time of all threads (waiting in the pool included), because both hold on a shared machine where a mean does
// not.
//
// Workloads (bf16 pages scattered at random over a pool; H/Hkv/d = 9/3/64 is SmolLM2-135M, 32/8/128 Llama-3-8B):
//   Prefill    the last `rows` rows of a context of `keys`
//   Chunked    a context of `keys`, in chunks of 512 rows
//   Scattered  15 % of the rows of a context of `keys`, as selective recomputation asks for
//   Repaired   5 % of the rows of a context of moved chunks of 400 tokens, which see each other as computed, in private
//              pages, and the rest of the chunks as stored: what a prompt that is made of moved chunks costs
//   Decode     one row at the end of `keys`, over `layers` layers, so that K and V come from memory
// Before it is timed, each workload's first and last rows are compared with the double-precision oracle.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <ctime>
#include <deque>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bench/kernels/ceilings.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/thread_pool.h"
#include "tests/reference/attention_reference.h"

namespace kvshare::kernels {
namespace {

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Shape {
  int num_heads;
  int num_kv_heads;
  int head_dim;
};

class Workload {
 public:
  // `chunk` 0: the context is one segment; otherwise moved chunks of so many tokens, and private pages for the rows.
  Workload(Shape shape, int layers, std::int64_t keys, std::vector<std::int64_t> positions, std::int64_t chunk)
      : positions_(std::move(positions)) {
    std::mt19937 random(7);
    const KvLayout layout{layers, shape.num_kv_heads, shape.head_dim, DType::kBf16};
    if (chunk == 0) {
      segments_.push_back({.length = keys});
    } else {
      AddChunks(keys, chunk);
    }
    std::size_t pages = 0;
    for (const KvSegment& s : segments_) pages += PagesOf(s);
    kv_.resize(layout.page_bytes() / 2 * pages);
    std::uint32_t state = 1;
    for (auto& x : kv_) {  // uniform in +-[0.5, 2), cheaply
      state = state * 1664525u + 1013904223u;
      x = static_cast<std::uint16_t>((state >> 16 & 0x80ff) | (state & 0x1000 ? 0x3f80 : 0x3f00));
    }
    table_.resize(pages);
    std::iota(table_.begin(), table_.end(), PageIndex{0});
    std::shuffle(table_.begin(), table_.end(), random);
    const int half = shape.head_dim / 2;
    for (int j = 0; j < half; ++j) inv_freq_.push_back(std::pow(10000.0, -double(j) / half));
    for (std::int64_t p = 0; p < keys; ++p) {
      for (const double f : inv_freq_) {
        cos_.push_back(static_cast<float>(std::cos(static_cast<double>(p) * f)));
        sin_.push_back(static_cast<float>(std::sin(static_cast<double>(p) * f)));
      }
    }
    const std::int64_t rows = static_cast<std::int64_t>(positions_.size());
    const std::int64_t cols = std::int64_t{shape.num_heads} * shape.head_dim;
    std::normal_distribution<float> normal;
    q_.resize(static_cast<std::size_t>(rows * cols));
    for (float& x : q_) x = normal(random);
    out_.resize(q_.size());
    for (std::size_t first = 0; KvSegment & s : segments_) {
      s.pages = std::span(table_).subspan(first, PagesOf(s));
      first += PagesOf(s);
    }
    params_.q = {q_.data(), DType::kF32, rows, cols, cols};
    params_.num_heads = shape.num_heads;
    params_.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
    params_.rope = {cos_, sin_, keys, half};
    params_.positions = positions_;
    params_.segments = segments_;
    params_.pages = {reinterpret_cast<std::byte*>(kv_.data()), static_cast<PageIndex>(pages), layout};
    params_.out = {out_.data(), DType::kBf16, rows, cols, cols};
  }

  double FlopsPerLayer() const {
    double keys = 0;
    for (const std::int64_t p : positions_) keys += static_cast<double>(p + 1);
    return 4.0 * static_cast<double>(params_.q.cols) * keys;
  }
  double KvBytes() const { return static_cast<double>(kv_.size()) * 2; }
  int layers() const { return params_.pages.layout.num_layers; }

  // Rows [begin, end) of one layer.
  void Run(int layer, std::int64_t begin, std::int64_t end, CpuIsa isa, ThreadPool& pool) {
    CpuAttention(Slice(layer, begin, end), isa, pool);
  }
  std::int64_t rows() const { return params_.q.rows; }

  // Greatest error of the first and last row, relative to the greatest value.
  double Error(CpuIsa isa, ThreadPool& pool) {
    double error = 0;
    for (const std::int64_t row : {std::int64_t{0}, rows() - 1}) {
      const AttentionParams p = Slice(0, row, row + 1);
      CpuAttention(p, isa, pool);
      const std::vector<double> want = reference::Attention(p, inv_freq_).out;
      double top = 0;
      for (const double x : want) top = std::max(top, std::abs(x));
      for (std::size_t j = 0; j < want.size(); ++j) {
        const std::uint32_t bits = p.out.row<std::uint16_t>(0)[j];
        error = std::max(error, std::abs(std::bit_cast<float>(bits << 16) - want[j]) / top);
      }
    }
    return error;
  }

 private:
  AttentionParams Slice(int layer, std::int64_t begin, std::int64_t end) {
    AttentionParams p = params_;
    p.layer = layer;
    p.q.data = p.q.row<float>(begin);
    p.out.data = p.out.row<std::uint16_t>(begin);
    p.q.rows = p.out.rows = end - begin;
    p.positions = p.positions.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
    for (KvSegment& s : segments_) {
      const auto seeing = std::lower_bound(p.positions.begin(), p.positions.end(), PositionOf(s, 0));
      s.row_begin = seeing - p.positions.begin();
      s.row_end = end - begin;
    }
    return p;
  }

  static std::size_t PagesOf(const KvSegment& s) {
    return static_cast<std::size_t>((s.first + s.length + kPageTokens - 1) / kPageTokens);
  }

  void AddChunks(std::int64_t keys, std::int64_t chunk) {
    for (std::int64_t start = 0; start < keys; start += chunk) {
      KvSegment s{.start = start, .length = std::min(chunk, keys - start), .shift = start / 3};
      s.first = static_cast<int>(start / 5 % kPageTokens);
      auto& skip = skips_.emplace_back(PagesOf(s));
      for (const std::int64_t position : positions_) {
        if (position < start || position >= start + s.length) continue;
        const auto row = static_cast<std::size_t>(s.first + position - start);
        skip[row / kPageTokens] |= std::uint64_t{1} << (row % kPageTokens);
      }
      s.skip = skip;
      segments_.push_back(s);
    }
    segments_.push_back({.length = static_cast<std::int64_t>(positions_.size()), .positions = positions_});
  }

  std::vector<std::int64_t> positions_;
  std::vector<std::uint16_t> kv_, out_;
  std::vector<PageIndex> table_;
  std::vector<double> inv_freq_;
  std::vector<float> cos_, sin_, q_;
  std::deque<std::vector<std::uint64_t>> skips_;  // of each chunk
  std::vector<KvSegment> segments_;
  AttentionParams params_;
};

std::vector<std::int64_t> Range(std::int64_t begin, std::int64_t end) {
  std::vector<std::int64_t> x(static_cast<std::size_t>(end - begin));
  std::iota(x.begin(), x.end(), begin);
  return x;
}

void Measure(benchmark::State& state, Workload& work, std::int64_t chunk, int threads, CpuIsa isa) {
  if (!CpuHasIsa(isa)) return state.SkipWithError("this machine lacks the instruction set");
  ThreadPool pool(threads);
  if (const double error = work.Error(isa, pool); !(error < 0.02)) {
    return state.SkipWithError("wrong result: not timed");
  }
  std::vector<double> best(static_cast<std::size_t>(work.layers()), std::numeric_limits<double>::infinity());
  const std::clock_t cpu_start = std::clock();
  for (auto _ : state) {
    for (int layer = 0; layer < work.layers(); ++layer) {
      const double start = Now();
      for (std::int64_t row = 0; row < work.rows(); row += chunk) {
        work.Run(layer, row, std::min(row + chunk, work.rows()), isa, pool);
      }
      double& time = best[static_cast<std::size_t>(layer)];
      time = std::min(time, Now() - start);
    }
  }
  const double cpu = static_cast<double>(std::clock() - cpu_start) / CLOCKS_PER_SEC;
  const double seconds = std::accumulate(best.begin(), best.end(), 0.0);
  const double flops = work.FlopsPerLayer() * work.layers() / seconds;
  state.counters["best_ms"] = seconds * 1e3;
  state.counters["GFLOP/s"] = flops * 1e-9;
  state.counters["per_core"] =
      work.FlopsPerLayer() * work.layers() * static_cast<double>(state.iterations()) / cpu * 1e-9;
  state.counters["KV_GB/s"] = work.KvBytes() / seconds * 1e-9;
  static const double amx_peak = bench::MeasureDotFlops(bench::Dot::kAmxBf16);
  static const double bf16_peak = bench::MeasureDotFlops(bench::Dot::kAvx512Bf16);
  static const double f32_peak = bench::MeasureDotFlops(bench::Dot::kF32);
  const double per_core_peak = isa == CpuIsa::kAmxBf16 ? amx_peak : isa == CpuIsa::kAvx512Bf16 ? bf16_peak : f32_peak;
  state.counters["peak_%"] = 100 * flops / (threads * per_core_peak);
}

constexpr Shape kSmol = {9, 3, 64};
constexpr Shape kLlama8B = {32, 8, 128};

void Register() {
  const auto add = [](const std::string& name, Shape shape, int layers, std::int64_t keys,
                      std::vector<std::int64_t> positions, std::int64_t chunk, CpuIsa isa,
                      std::int64_t moved_chunk = 0) {
    for (const int threads : {1, 2}) {
      const std::string full = name + "/H" + std::to_string(shape.num_heads) + "_" +
                               std::to_string(shape.num_kv_heads) + "_d" + std::to_string(shape.head_dim) + "/keys" +
                               std::to_string(keys) + "/" + std::string(CpuIsaName(isa)) + "/threads" +
                               std::to_string(threads);
      benchmark::RegisterBenchmark(full.c_str(),
                                   [=](benchmark::State& state) {
                                     Workload work(shape, layers, keys, positions, moved_chunk);
                                     Measure(state, work, chunk, threads, isa);
                                   })
          ->Unit(benchmark::kMillisecond)
          ->UseRealTime();
    }
  };
  std::mt19937 random(3);
  const auto some = [&random](std::int64_t keys, unsigned percent) {
    std::vector<std::int64_t> positions;
    for (std::int64_t p = 0; p < keys; ++p) {
      if (random() % 100 < percent) positions.push_back(p);
    }
    return positions;
  };
  const std::vector<std::int64_t> scattered = some(4096, 15);
  const std::vector<std::int64_t> repaired = some(3200, 5);
  for (const CpuIsa isa : {CpuIsa::kAvx512, CpuIsa::kAvx2, CpuIsa::kPlain}) {
    add("Prefill64", kSmol, 1, 2048, Range(2048 - 64, 2048), 64, isa);
  }
  for (const CpuIsa isa : {CpuIsa::kAmxBf16, CpuIsa::kAvx512Bf16}) {
    add("Prefill64", kSmol, 1, 2048, Range(2048 - 64, 2048), 64, isa);
    add("Prefill512", kSmol, 1, 2048, Range(2048 - 512, 2048), 512, isa);
    add("Chunked512", kSmol, 1, 2048, Range(0, 2048), 512, isa);
    add("Contiguous15%", kSmol, 1, 4096, Range(4096 - 614, 4096), 614, isa);
    add("Scattered15%", kSmol, 1, 4096, scattered, 4096, isa);
    add("Repaired5%", kSmol, 30, 3200, repaired, 3200, isa, 400);
    add("Decode", kSmol, 30, 2048, {2047}, 1, isa);
    add("DecodeFromCache", kSmol, 1, 2048, {2047}, 1, isa);
    add("Prefill64", kLlama8B, 1, 2048, Range(2048 - 64, 2048), 64, isa);
    add("Scattered15%", kLlama8B, 1, 4096, scattered, 4096, isa);
    add("Decode", kLlama8B, 8, 2048, {2047}, 1, isa);
  }
}

[[maybe_unused]] const bool kRegistered = (Register(), true);

}  // namespace
}  // namespace kvshare::kernels

// Linear layers of SmolLM2-135M through the Backend.
//   Linear/K/N/rows/threads   prompts (rows 512, 2048) and decoding (rows 1, 8); weights rotate over a working set
//   larger
//                             than the caches, as layers do
// Counters: FLOP/s and its share of the cores' dot-product peak; weight bytes/s and their share of the memory's read
// speed. The peak and the read speed are measured in this process, first.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "bench/kernels/ceilings.h"
#include "kernels/backend.h"

namespace kvshare::kernels {
namespace {

void Linear(benchmark::State& state) {
  const std::int64_t k = state.range(0), n = state.range(1), rows = state.range(2);
  const int threads = static_cast<int>(state.range(3));
  auto backend = NewCpuBackend({.compute = DType::kBf16, .threads = threads});
  if (!backend.ok()) return state.SkipWithError(backend.status().message().c_str());
  std::mt19937_64 random(7);
  std::normal_distribution<float> normal(0.0f, 0.05f);
  std::vector<float> w(static_cast<std::size_t>(n * k));
  for (float& v : w) v = normal(random);
  // 96 MB of weights, at least one layer.
  const std::int64_t layers = std::max<std::int64_t>(1, (std::int64_t{96} << 20) / (2 * n * k));
  std::vector<std::unique_ptr<LinearWeights>> weights;
  for (std::int64_t i = 0; i < layers; ++i) {
    const HostMatrix part{w.data(), n, k};
    auto packed = (*backend)->MakeLinear({.parts = {&part, 1}, .bias = {}, .gated = false});
    if (!packed.ok()) return state.SkipWithError(packed.status().message().c_str());
    weights.push_back(std::move(packed).value());
  }
  std::vector<std::uint16_t> x(static_cast<std::size_t>(rows * k), 0x3c00);
  std::vector<float> out(static_cast<std::size_t>(rows * n));
  std::size_t next = 0;
  for (auto _ : state) {
    (*backend)->Linear({.x = {x.data(), DType::kBf16, rows, k, k},
                        .weights = weights[next].get(),
                        .out = {out.data(), DType::kF32, rows, n, n},
                        .accumulate = false});
    next = (next + 1) % weights.size();
    benchmark::DoNotOptimize(out.data());
  }
  static const double dot_flops = bench::MeasureDotFlops(true);
  const double flops = 2.0 * static_cast<double>(rows * n * k);
  const double bytes = static_cast<double>(weights.front()->bytes());
  using benchmark::Counter;
  state.counters["FLOP/s"] = Counter(flops, Counter::kIsIterationInvariantRate, Counter::kIs1000);
  state.counters["weight_bytes/s"] = Counter(bytes, Counter::kIsIterationInvariantRate, Counter::kIs1000);
  if (dot_flops > 0) {
    state.counters["of_dot_peak"] = Counter(flops / (dot_flops * threads), Counter::kIsIterationInvariantRate);
  }
  state.counters["of_read_speed"] =
      Counter(bytes / bench::MeasureReadBytes(threads), Counter::kIsIterationInvariantRate);
}

BENCHMARK(Linear)
    ->ArgNames({"K", "N", "rows", "threads"})
    ->ArgsProduct({{576}, {576, 960, 3072}, {1, 8, 512, 2048}, {1, 2}})
    ->ArgsProduct({{1536}, {576}, {1, 8, 512, 2048}, {1, 2}})
    ->ArgsProduct({{576}, {49152}, {1, 8}, {1, 2}})
    ->UseRealTime();

}  // namespace
}  // namespace kvshare::kernels

// Linear layers of SmolLM2-135M through the Backend, beside what the machine and the library could do.
//   Linear/K/N/rows/threads   one layer; its weights rotate over a working set larger than the caches, as layers do
//   GatedLinear/...           the same with SwiGLU
//   BareOneDnn/K/N/rows       the library alone on one thread: dense operands, packed weights, no bias
//   Token/threads             every linear layer of one decode step, in order
// Counters:
//   FLOP/s, weight_bytes/s    by the clock on the wall
//   of_peak                   FLOP per second of processor time, as a share of a core's dot-product peak: holds on a
//                             machine that others use too
//   of_read_speed             weight bytes/s as a share of the memory's read speed with as many threads
#include <benchmark/benchmark.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <oneapi/dnnl/dnnl.hpp>
#include <random>
#include <vector>

#include "bench/kernels/ceilings.h"
#include "kernels/backend.h"

namespace kvshare::kernels {
namespace {

using benchmark::Counter;

std::vector<float> RandomMatrix(std::int64_t values) {
  std::mt19937_64 random(7);
  std::normal_distribution<float> normal(0.0f, 0.05f);
  std::vector<float> matrix(static_cast<std::size_t>(values));
  for (float& v : matrix) v = normal(random);
  return matrix;
}

double DotPeak() {
  static const double peak =
      std::max(bench::MeasureDotFlops(bench::Dot::kAmxBf16), bench::MeasureDotFlops(bench::Dot::kAvx512Bf16));
  return peak;
}

double ReadSpeed(int threads) {
  static std::map<int, double> speeds;
  if (!speeds.contains(threads)) speeds[threads] = bench::MeasureReadBytes(threads);
  return speeds[threads];
}

// `cpu` is the processor time of all iterations.
void Report(benchmark::State& state, double flops, double bytes, double cpu, int threads) {
  state.counters["FLOP/s"] = Counter(flops, Counter::kIsIterationInvariantRate, Counter::kIs1000);
  state.counters["weight_bytes/s"] = Counter(bytes, Counter::kIsIterationInvariantRate, Counter::kIs1000);
  if (DotPeak() > 0) {
    state.counters["of_peak"] = flops * static_cast<double>(state.iterations()) / cpu / DotPeak();
  }
  if (ReadSpeed(threads) > 0) {
    state.counters["of_read_speed"] = Counter(bytes / ReadSpeed(threads), Counter::kIsIterationInvariantRate);
  }
}

Result<std::unique_ptr<LinearWeights>> MakeWeights(Backend& backend, const std::vector<float>& w, std::int64_t n,
                                                   std::int64_t k, bool gated) {
  const HostMatrix whole[] = {{w.data(), n, k}};
  const HostMatrix halves[] = {{w.data(), n / 2, k}, {w.data() + n / 2 * k, n / 2, k}};
  if (gated) return backend.MakeLinear({.parts = halves, .bias = {}, .gated = true});
  return backend.MakeLinear({.parts = whole, .bias = {}, .gated = false});
}

void Layer(benchmark::State& state, bool gated) {
  const std::int64_t k = state.range(0), n = state.range(1), rows = state.range(2);
  const int threads = static_cast<int>(state.range(3));
  auto backend = NewCpuBackend({.compute = DType::kBf16, .threads = threads});
  if (!backend.ok()) return state.SkipWithError(backend.status().message().c_str());
  const std::vector<float> w = RandomMatrix(n * k);
  // 256 MB of weights, several times what caches hold.
  const std::int64_t layers = std::max<std::int64_t>(1, (std::int64_t{256} << 20) / (2 * n * k));
  std::vector<std::unique_ptr<LinearWeights>> weights;
  for (std::int64_t i = 0; i < layers; ++i) {
    auto packed = MakeWeights(**backend, w, n, k, gated);
    if (!packed.ok()) return state.SkipWithError(packed.status().message().c_str());
    weights.push_back(std::move(packed).value());
  }
  std::vector<std::uint16_t> x(static_cast<std::size_t>(rows * k), 0x3c00);
  std::vector<float> out(static_cast<std::size_t>(rows * n));
  const MatrixView in{x.data(), DType::kBf16, rows, k, k};
  std::size_t next = 0;
  const double start = bench::ProcessCpuSeconds();
  for (auto _ : state) {
    if (gated) {
      (*backend)->GatedLinear(
          {.x = in, .weights = weights[next].get(), .out = {out.data(), DType::kBf16, rows, n / 2, n / 2}});
    } else {
      (*backend)->Linear(
          {.x = in, .weights = weights[next].get(), .out = {out.data(), DType::kF32, rows, n, n}, .accumulate = false});
    }
    next = (next + 1) % weights.size();
    benchmark::DoNotOptimize(out.data());
  }
  const double cpu = bench::ProcessCpuSeconds() - start;
  Report(state, 2.0 * static_cast<double>(rows * n * k), static_cast<double>(weights.front()->bytes()), cpu, threads);
}

void Linear(benchmark::State& state) { Layer(state, false); }
void GatedLinear(benchmark::State& state) { Layer(state, true); }

void BareOneDnn(benchmark::State& state) {
  const std::int64_t k = state.range(0), n = state.range(1), rows = state.range(2);
  omp_set_num_threads(1);
  using dnnl::memory;
  try {
    dnnl::engine engine(dnnl::engine::kind::cpu, 0);
    dnnl::stream stream(engine);
    const memory::desc src({rows, k}, memory::data_type::bf16, memory::format_tag::ab);
    const memory::desc weights({k, n}, memory::data_type::bf16, memory::format_tag::any);
    const memory::desc dst({rows, n}, memory::data_type::f32, memory::format_tag::ab);
#if DNNL_VERSION_MAJOR >= 3
    const dnnl::matmul::primitive_desc desc(engine, src, weights, dst);
#else
    const dnnl::matmul::primitive_desc desc(dnnl::matmul::desc(src, weights, dst), engine);
#endif
    std::vector<float> w = RandomMatrix(n * k);
    std::vector<std::uint16_t> x(static_cast<std::size_t>(rows * k), 0x3c00);
    memory plain({{k, n}, memory::data_type::f32, memory::format_tag::ba}, engine, w.data());
    memory packed(desc.weights_desc(), engine), out(desc.dst_desc(), engine), in(desc.src_desc(), engine, x.data());
    dnnl::reorder(plain, packed).execute(stream, plain, packed);
    dnnl::matmul matmul(desc);
    const double start = bench::ProcessCpuSeconds();
    for (auto _ : state) matmul.execute(stream, {{DNNL_ARG_SRC, in}, {DNNL_ARG_WEIGHTS, packed}, {DNNL_ARG_DST, out}});
    const double cpu = bench::ProcessCpuSeconds() - start;
    Report(state, 2.0 * static_cast<double>(rows * n * k), static_cast<double>(2 * n * k), cpu, 1);
  } catch (const dnnl::error& e) {
    state.SkipWithError(e.what());
  }
}

void Token(benchmark::State& state) {
  constexpr std::int64_t kHidden = 576, kQkv = 960, kGateUp = 3072, kVocabulary = 49152;
  constexpr int kLayers = 30;
  const int threads = static_cast<int>(state.range(0));
  auto backend = NewCpuBackend({.compute = DType::kBf16, .threads = threads});
  if (!backend.ok()) return state.SkipWithError(backend.status().message().c_str());
  const std::vector<float> w = RandomMatrix(kVocabulary * kHidden);
  std::vector<std::unique_ptr<LinearWeights>> weights;
  double bytes = 0, flops = 0;
  const auto add = [&](std::int64_t n, std::int64_t k, bool gated) {
    auto packed = MakeWeights(**backend, w, n, k, gated);
    if (!packed.ok()) return false;
    bytes += static_cast<double>((*packed)->bytes());
    flops += 2.0 * static_cast<double>(n * k);
    weights.push_back(std::move(packed).value());
    return true;
  };
  for (int layer = 0; layer < kLayers; ++layer) {
    if (!add(kQkv, kHidden, false) || !add(kHidden, kHidden, false) || !add(kGateUp, kHidden, true) ||
        !add(kHidden, kGateUp / 2, false)) {
      return state.SkipWithError("no memory for the weights");
    }
  }
  if (!add(kVocabulary, kHidden, false)) return state.SkipWithError("no memory for the weights");
  std::vector<std::uint16_t> x(kGateUp, 0x3c00), gated(kGateUp);
  std::vector<float> out(kVocabulary);
  const double start = bench::ProcessCpuSeconds();
  for (auto _ : state) {
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const std::int64_t k = weights[i]->in_features(), n = weights[i]->out_features();
      const MatrixView in{x.data(), DType::kBf16, 1, k, k};
      if (i % 4 == 2) {
        (*backend)->GatedLinear(
            {.x = in, .weights = weights[i].get(), .out = {gated.data(), DType::kBf16, 1, n / 2, n / 2}});
      } else {
        (*backend)->Linear(
            {.x = in, .weights = weights[i].get(), .out = {out.data(), DType::kF32, 1, n, n}, .accumulate = false});
      }
    }
    benchmark::DoNotOptimize(out.data());
  }
  Report(state, flops, bytes, bench::ProcessCpuSeconds() - start, threads);
}

BENCHMARK(Linear)
    ->ArgNames({"K", "N", "rows", "threads"})
    ->ArgsProduct({{576}, {576, 960, 3072}, {1, 8, 512, 2048}, {1, 2}})
    ->ArgsProduct({{1536}, {576}, {1, 8, 512, 2048}, {1, 2}})
    ->ArgsProduct({{576}, {49152}, {1, 8}, {1, 2}})
    ->UseRealTime();
BENCHMARK(GatedLinear)
    ->ArgNames({"K", "N", "rows", "threads"})
    ->ArgsProduct({{576}, {3072}, {1, 8, 512, 2048}, {1, 2}})
    ->UseRealTime();
BENCHMARK(BareOneDnn)
    ->ArgNames({"K", "N", "rows"})
    ->ArgsProduct({{576}, {576, 960, 3072}, {64, 512}})
    ->ArgsProduct({{1536}, {576}, {64, 512}})
    ->UseRealTime();
BENCHMARK(Token)->ArgName("threads")->Arg(1)->Arg(2)->UseRealTime();

}  // namespace
}  // namespace kvshare::kernels

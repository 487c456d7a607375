// What KVCOMM's anchors cost beside the prefill that they save: learning one, asking whether they resemble a content,
// and correcting it, at SmolLM2's shape. Bytes are those that have to move: the content's rows in fp32, and the
// anchors' blocks. The limit is Copy, which reads and writes as much.
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "anchors/anchor_pool.h"
#include "benchmark/benchmark.h"

namespace kvshare::anchors {
namespace {

constexpr int kLayers = 30;
constexpr std::int64_t kWidth = 192;
constexpr int kAnchors = 4;

KvBlock Random(std::int64_t tokens, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  KvBlock block(kLayers, tokens, kWidth);
  for (float& value : block.values) value = normal(rng);
  return block;
}

AnchorPool Taught(std::int64_t tokens) {
  AnchorPool pool;
  for (int i = 0; i < kAnchors; ++i) {
    const KvBlock base = Random(tokens, static_cast<unsigned>(2 * i)),
                  real = Random(tokens, static_cast<unsigned>(2 * i + 1));
    pool.Register("p", "reader", "text" + std::to_string(i), RowsOf(base), RowsOf(real));
  }
  return pool;
}

void Report(benchmark::State& state, std::size_t bytes) {
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(bytes));
  state.SetItemsProcessed(state.iterations() * state.range(0));
}

void Learn(benchmark::State& state) {
  const KvBlock base = Random(state.range(0), 1), real = Random(state.range(0), 2);
  std::size_t anchor_bytes = 0;
  for (auto _ : state) {
    AnchorPool pool;
    pool.Register("p", "reader", "text", RowsOf(base), RowsOf(real));
    anchor_bytes = pool.bytes();
  }
  // The base is read twice: for itself and for the offset.
  Report(state, 3 * base.values.size() * sizeof(float) + anchor_bytes);
}
BENCHMARK(Learn)->Arg(512)->Arg(2048)->Unit(benchmark::kMillisecond);

void Resemble(benchmark::State& state) {
  AnchorPool pool = Taught(state.range(0));
  const KvBlock content = Random(state.range(0), 0);
  for (auto _ : state) benchmark::DoNotOptimize(pool.Shareable("p", content));
  Report(state, kAnchors * content.values.size() / 2 * sizeof(float) + pool.bytes() / 4);
}
BENCHMARK(Resemble)->Arg(512)->Arg(2048)->Unit(benchmark::kMillisecond);

void Correct(benchmark::State& state) {
  const AnchorPool pool = Taught(state.range(0));
  KvBlock content = Random(state.range(0), 0);
  for (auto _ : state) pool.Correct("p", "reader", &content);
  Report(state, 2 * kAnchors * content.values.size() * sizeof(float) + pool.bytes());
}
BENCHMARK(Correct)->Arg(512)->Arg(2048)->Unit(benchmark::kMillisecond);

void Copy(benchmark::State& state) {
  const KvBlock from = Random(state.range(0), 1);
  KvBlock to = from;
  for (auto _ : state) {
    std::memcpy(to.values.data(), from.values.data(), from.values.size() * sizeof(float));
    benchmark::ClobberMemory();
  }
  Report(state, 2 * from.values.size() * sizeof(float));
}
BENCHMARK(Copy)->Arg(512)->Arg(2048)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace kvshare::anchors

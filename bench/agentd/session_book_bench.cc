// What looking for moved chunks costs a request, beside its prefill: recording a prompt, and searching a session of 16
// prompts for parts of another, found and not found.
#include <cstdint>
#include <random>
#include <vector>

#include "agentd/repair/session_book.h"
#include "benchmark/benchmark.h"

namespace kvshare::agentd {
namespace {

using Ids = std::vector<TokenId>;

constexpr int kPrompts = 16;
constexpr std::int64_t kMinLength = 36;

Ids Random(std::int64_t n, std::uint32_t seed) {
  std::mt19937 rng(seed);
  std::uniform_int_distribution<TokenId> id(0, 49151);
  Ids ids(static_cast<std::size_t>(n));
  for (TokenId& value : ids) value = id(rng);
  return ids;
}

void Fill(SessionBook& book, std::int64_t n) {
  for (int i = 0; i < kPrompts; ++i) book.Record("s", Random(n, static_cast<std::uint32_t>(i)), 0);
}

void Record(benchmark::State& state) {
  SessionBook book;
  std::uint32_t seed = 0;
  for (auto _ : state) {
    state.PauseTiming();
    const Ids prompt = Random(state.range(0), ++seed);
    state.ResumeTiming();
    book.Record("s", prompt, 0);
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(Record)->Arg(1024)->Arg(8192);

void Find(benchmark::State& state, bool present) {
  SessionBook book;
  Fill(book, state.range(0));
  Ids prompt = Random(100, 77);
  const Ids rest = Random(state.range(0), present ? 5 : 1000);
  prompt.insert(prompt.end(), rest.begin(), rest.end());
  const auto end = static_cast<std::int64_t>(prompt.size());
  for (auto _ : state) benchmark::DoNotOptimize(book.Find("s", prompt, 0, end, kMinLength, ReuseMode::kAuto));
  state.SetItemsProcessed(state.iterations() * end);
}
BENCHMARK_CAPTURE(Find, present, true)->Arg(1024)->Arg(8192);
BENCHMARK_CAPTURE(Find, absent, false)->Arg(1024)->Arg(8192);

}  // namespace
}  // namespace kvshare::agentd

// The pool's metadata work per request, without any KV:
//   Find        the longest stored prefix of a prompt that is stored whole
//   FindMiss    of a prompt that shares only its first page
//   Request     find, pin, take pages, publish and retire a prompt that shares half of itself
//   RequestFull the same in a full pool, where every page taken is one evicted
#include <cstdint>
#include <vector>

#include "agentd/pool/kv_pool.h"
#include "benchmark/benchmark.h"

namespace kvshare::agentd {
namespace {

using Ids = std::vector<TokenId>;

constexpr int kStoredPrompts = 64;

Digest Root() { return RootContext(ContentDigest({}), ContentDigest({})); }

// All prompts share their first page; prompt i goes its own way from token `own` on.
Ids Prompt(std::int64_t n, std::int64_t own, std::int64_t i) {
  Ids ids(static_cast<std::size_t>(n));
  for (std::int64_t t = 0; t < n; ++t)
    ids[static_cast<std::size_t>(t)] = static_cast<TokenId>(t < own ? t : t + 10000 * (i + 1));
  return ids;
}

void Store(KvPool& pool, const Ids& ids) {
  const auto n = static_cast<std::int64_t>(ids.size());
  KvHandle handle = *pool.Acquire(pool.index().Find(ids), n);
  pool.Extend(handle, n);
  pool.ReleaseTail(handle);
  pool.Retire(std::move(handle), ids, 0);
}

void Fill(KvPool& pool, std::int64_t n) {
  for (std::int64_t i = 0; i < kStoredPrompts; ++i) Store(pool, Prompt(n, kPageTokens, i));
}

void SetPerToken(benchmark::State& state) { state.SetItemsProcessed(state.iterations() * state.range(0)); }

void BM_Find(benchmark::State& state) {
  KvPool pool(static_cast<PageIndex>(kStoredPrompts * state.range(0) / kPageTokens + 64), Root());
  Fill(pool, state.range(0));
  const Ids prompt = Prompt(state.range(0), kPageTokens, kStoredPrompts / 2);
  if (pool.index().Find(prompt).tokens() != state.range(0)) state.SkipWithError("the prompt was not found");
  for (auto _ : state) benchmark::DoNotOptimize(pool.index().Find(prompt));
  SetPerToken(state);
}
BENCHMARK(BM_Find)->Arg(2048)->Arg(8192)->Unit(benchmark::kMicrosecond);

void BM_FindMiss(benchmark::State& state) {
  KvPool pool(static_cast<PageIndex>(kStoredPrompts * state.range(0) / kPageTokens + 64), Root());
  Fill(pool, state.range(0));
  const Ids prompt = Prompt(state.range(0), kPageTokens, 1000);
  if (pool.index().Find(prompt).tokens() != kPageTokens) state.SkipWithError("the prompt was not found");
  for (auto _ : state) benchmark::DoNotOptimize(pool.index().Find(prompt));
  SetPerToken(state);
}
BENCHMARK(BM_FindMiss)->Arg(2048)->Arg(8192)->Unit(benchmark::kMicrosecond);

void Requests(benchmark::State& state, PageIndex pages) {
  KvPool pool(pages, Root());
  Fill(pool, state.range(0));
  std::int64_t i = 0;
  for (auto _ : state) {
    state.PauseTiming();
    const Ids prompt = Prompt(state.range(0), state.range(0) / 2, 1000 + i++);
    state.ResumeTiming();
    Store(pool, prompt);
  }
  if (!pool.CheckIntegrity().ok()) state.SkipWithError("the pool is not sound");
  state.counters["evictions"] = static_cast<double>(pool.usage().evictions);
  SetPerToken(state);
}

void BM_Request(benchmark::State& state) { Requests(state, 2'000'000); }
BENCHMARK(BM_Request)->Arg(2048)->Arg(8192)->Unit(benchmark::kMicrosecond)->Iterations(2000);

void BM_RequestFull(benchmark::State& state) {
  Requests(state, static_cast<PageIndex>(kStoredPrompts * state.range(0) / kPageTokens));
}
BENCHMARK(BM_RequestFull)->Arg(2048)->Arg(8192)->Unit(benchmark::kMicrosecond)->Iterations(2000);

}  // namespace
}  // namespace kvshare::agentd

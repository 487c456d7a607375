// Promotion: pages on their way from the cold tier into memory, for a request that waits for them or for whoever asked.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "agentd/engine/demoter.h"
#include "agentd/engine/planner.h"
#include "agentd/engine/sequence.h"
#include "agentd/pool/kv_pool.h"
#include "agentd/tiers/cold_tier.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

// Called on the engine's thread once: OK when what could be loaded is in memory and stays until the call returns,
// Unavailable when the engine stops.
using FetchDone = std::function<void(const Status&)>;

// tokens:  0 ................ start ............................... start + run.tokens()
//          |-- in memory already --|-- pages of the run, being loaded --|
struct Promotion {
  std::vector<TokenId> tokens;  // the prompt, or the part of it that was asked for
  std::int64_t start = 0;       // a multiple of 64
  ColdRun run;
  Sequence* sequence = nullptr;  // that waits; null: nobody, or `done`
  KvHandle kv;                   // where the pages go, unless the sequence has it
  FetchDone done;                // may be empty
  SteadyTime begun;
};

// The reads that fill the run's places in `kv`, which must reach that far.
std::vector<ColdLoad> LoadsOf(const ColdRun& run, std::int64_t start, const KvHandle& kv,
                              const kernels::KvPages& pages);

// How many pages of the run, from its first, were loaded and are what was wanted: each of this parent, at this position
// and of these tokens, compared in full. `why`: what became of the next one, where there is one.
std::size_t CountGood(const Promotion& promotion, std::span<const ColdLoaded> loaded, MissKind* why);

}  // namespace kvshare::agentd

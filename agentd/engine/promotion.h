// Promotion: pages on their way from the cold tier into memory, for a request that waits for them or for whoever asked.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "agentd/engine/demoter.h"
#include "agentd/engine/detour.h"
#include "agentd/engine/planner.h"
#include "agentd/engine/sequence.h"
#include "agentd/pool/kv_pool.h"
#include "agentd/pool/page_arena.h"
#include "agentd/tiers/cold_tier.h"
#include "kernels/paged_kv.h"
#include "kvshare/status.h"
#include "runtime/layer_gate.h"

namespace kvshare::agentd {

// Called on the engine's thread once: OK when what could be loaded is in memory and stays until the call returns,
// Unavailable when the engine stops. `lost`: why not all of it could be.
using FetchDone = std::function<void(const Status& status, std::optional<MissKind> lost)>;

// What a load has brought so far. Threads of the tier tell it, the engine's asks.
class LoadProgress {
 public:
  void PartsAre(int ready);
  void Ended(std::vector<ColdLoaded> loaded);

  int parts() const;
  // Returns when this many parts are ready or the load has ended, for better or worse: whether they are in place.
  bool AwaitParts(int parts);
  // Once; returns when the load has ended.
  std::vector<ColdLoaded> AwaitEnd();

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  int parts_ = 0;
  std::optional<std::vector<ColdLoaded>> loaded_;
};

// tokens:  0 ................ start ............................... start + run.tokens()
//          |-- in memory already --|-- pages of the run, being loaded --|
struct Promotion {
  std::vector<TokenId> tokens;  // the prompt, or the part of it that was asked for
  std::int64_t start = 0;       // a multiple of 64
  ColdRun run;
  Sequence* sequence = nullptr;  // that waits; null: nobody, or `done`
  std::uint64_t request = 0;     // whose chunks these are, and which may be computed over them meanwhile; 0: none
  KvHandle kv;                   // where the pages go, unless the sequence has it
  FetchDone done;                // may be empty
  SteadyTime begun;
  std::shared_ptr<LoadProgress> progress = std::make_shared<LoadProgress>();  // with a detour: of the pages read now
  std::unique_ptr<Detour> detour;                                             // null where pages are read into place
  bool whole = false;  // with a detour: all pages are what was wanted and on their way, or there
};

// Where the run's pages go in `kv`, which must reach that far.
std::vector<PageIndex> PlacesOf(const ColdRun& run, std::int64_t start, const KvHandle& kv);
// The reads that fill these places, where the host reaches them.
std::vector<ColdLoad> LoadsOf(const ColdRun& run, std::span<const PageIndex> places, const kernels::KvPages& pages);

// How many pages of the run, from its first, were loaded and are what was wanted: each of this parent, at this position
// and of these tokens, compared in full. `why`: what became of the next one, where there is one.
std::size_t CountGood(const Promotion& promotion, std::span<const ColdLoaded> loaded, MissKind* why);

// Holds a step's layers back until the loads that its sequences wait for have brought them: the host's thread, or where
// they are copied onto a device, the device.
class LoadGate final : public runtime::LayerGate {
 public:
  // `tier` may be null: then nothing is ever added.
  LoadGate(const ColdTier* tier, const kernels::KvLayout& layout);

  void Clear();
  void Add(std::shared_ptr<LoadProgress> progress) { loads_.push_back(std::move(progress)); }
  void Add(Detour* detour) { detours_.push_back(detour); }
  bool empty() const { return loads_.empty() && detours_.empty(); }
  int all_parts() const { return parts_.empty() ? 1 : parts_.back(); }
  double waited_seconds() const { return waited_seconds_; }  // since Clear

  void BeforeLayer(int layer) override;
  // Of loads alone: whether copies onto a device have come is known later.
  bool lost() const override { return lost_; }

 private:
  std::vector<int> parts_;  // [layers]: that must be ready before it
  std::vector<std::shared_ptr<LoadProgress>> loads_;
  std::vector<Detour*> detours_;
  double waited_seconds_ = 0;
  bool lost_ = false;
};

}  // namespace kvshare::agentd

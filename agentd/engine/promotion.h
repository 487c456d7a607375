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
#include "agentd/engine/planner.h"
#include "agentd/engine/sequence.h"
#include "agentd/pool/kv_pool.h"
#include "agentd/pool/page_arena.h"
#include "agentd/tiers/aligned_buffer.h"
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
  // Returns when this many parts are ready or the load has ended, for better or worse.
  void AwaitParts(int parts);
  // Once; returns when the load has ended.
  std::vector<ColdLoaded> AwaitEnd();

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  int parts_ = 0;
  std::optional<std::vector<ColdLoaded>> loaded_;
};

// The way of a run's pages onto a device: they are read into host memory, a few at a time, and sent on from there. A
// read's destination is the detour's own: it must outlive the read.
class Detour {
 public:
  // `places`: where the run's pages go, at least one. It takes about `memory_bytes`, and one page at least.
  Detour(std::vector<PageIndex> places, std::size_t page_bytes, std::size_t memory_bytes = kMemoryBytes);

  // What disks read well in one go, and little for a machine.
  static constexpr std::size_t kMemoryBytes = std::size_t{16} << 20;

  // The reads of the next pages of the run, while it is not done.
  std::vector<ColdLoad> NextLoads(const ColdRun& run);
  // These have ended: what they brought is sent on. Behind the first page that could not be had, none is of use.
  void SendOn(std::vector<ColdLoaded> loaded, PageArena& arena);
  bool done() const { return arrived_.size() == places_.size(); }
  // Once done: what became of each page.
  std::vector<ColdLoaded> TakeLoaded() { return std::move(arrived_); }

 private:
  std::span<std::byte> Place(std::size_t i) { return memory_.bytes().subspan(i * stride_, page_bytes_); }

  const std::vector<PageIndex> places_;
  const std::size_t page_bytes_;
  const std::size_t stride_;   // between two pages in memory_
  const std::size_t at_once_;  // pages that it holds
  AlignedBuffer memory_;
  std::vector<ColdLoaded> arrived_;
};

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
  std::shared_ptr<LoadProgress> progress = std::make_shared<LoadProgress>();  // with a detour: of the pages read now
  std::unique_ptr<Detour> detour;                                             // null where pages are read into place
};

// Where the run's pages go in `kv`, which must reach that far.
std::vector<PageIndex> PlacesOf(const ColdRun& run, std::int64_t start, const KvHandle& kv);
// The reads that fill these places, where the host reaches them.
std::vector<ColdLoad> LoadsOf(const ColdRun& run, std::span<const PageIndex> places, const kernels::KvPages& pages);

// How many pages of the run, from its first, were loaded and are what was wanted: each of this parent, at this position
// and of these tokens, compared in full. `why`: what became of the next one, where there is one.
std::size_t CountGood(const Promotion& promotion, std::span<const ColdLoaded> loaded, MissKind* why);

// Holds a step's layers back until the loads that its sequences wait for have brought them.
class LoadGate final : public runtime::LayerGate {
 public:
  // `tier` may be null: then nothing is ever added.
  LoadGate(const ColdTier* tier, const kernels::KvLayout& layout);

  void Clear();
  void Add(std::shared_ptr<LoadProgress> progress) { loads_.push_back(std::move(progress)); }
  bool empty() const { return loads_.empty(); }
  int all_parts() const { return parts_.empty() ? 1 : parts_.back(); }
  double waited_seconds() const { return waited_seconds_; }  // since Clear

  void BeforeLayer(int layer) override;

 private:
  std::vector<int> parts_;  // [layers]: that must be ready before it
  std::vector<std::shared_ptr<LoadProgress>> loads_;
  double waited_seconds_ = 0;
};

}  // namespace kvshare::agentd

// Engine: the one thread that owns model, pool and arena, and its loop: receive, plan, materialize, forward, commit.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <vector>

#include "agentd/engine/batch.h"
#include "agentd/engine/cost_meter.h"
#include "agentd/engine/demoter.h"
#include "agentd/engine/healer.h"
#include "agentd/engine/leases.h"
#include "agentd/engine/moved_reuse.h"
#include "agentd/engine/pinned_blocks.h"
#include "agentd/engine/planner.h"
#include "agentd/engine/promotion.h"
#include "agentd/engine/sequence.h"
#include "agentd/engine/session_recall.h"
#include "agentd/engine/shadow_auditor.h"
#include "agentd/engine/stats_book.h"
#include "agentd/engine/waiting_queue.h"
#include "agentd/pool/kv_pool.h"
#include "agentd/pool/page_arena.h"
#include "agentd/tiers/cold_tier.h"
#include "kvshare/status.h"
#include "runtime/forward_batch.h"
#include "runtime/model.h"

namespace kvshare::agentd {

struct EngineOptions {
  std::int64_t max_running = 0;           // >= 1
  std::int64_t max_waiting = 0;           // >= 1
  std::int64_t prefill_chunk_tokens = 0;  // >= 1
  bool always_load = false;
  bool load_in_parts = true;
  std::optional<double> seconds_per_token;
  MovedReuseOptions moved;
  LeaseLimits leases;
  std::function<void(const Status&)> on_device_lost;  // once, on the engine's thread, when all have been told; or empty
  std::string after_device_loss;                      // what they are told to expect
};

// Public methods are thread-safe; everything else happens on the engine's thread, without locks. Sinks are called
// there, under no lock. model, pool, arena, cold tier and stats must outlive the engine.
class Engine {
 public:
  // `cold` may be null.
  Engine(runtime::Model* model, KvPool* pool, PageArena* arena, ColdTier* cold, StatsBook* stats,
         const EngineOptions& options);
  // Requests that have not ended get Unavailable.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Queues a request and returns its id, 1 first. ResourceExhausted when max_waiting are waiting, Unavailable after
  // Drain began or the device has failed; then the sink is never called.
  Result<std::uint64_t> Submit(EngineRequest request);
  void Cancel(std::uint64_t request_id);

  // Service's.
  std::vector<std::string> Warnings() const;

  // What a prompt of that session (null: of none) would be given now. `exact_agent`: EngineRequest's.
  Explanation Explain(std::span<const TokenId> prompt, ReuseMode mode, bool exact_agent, const std::string* session);
  // How an earlier request was served. NotFound for one that is unknown, not yet planned, or long ago.
  Result<Explanation> ExplainRequest(std::uint64_t request_id);

  // Stored KV by name, as Service has it (by_name.cc).
  // `session` may be null: then no chunks are looked for.
  Match Lookup(std::span<const TokenId> prompt, const std::string* session);
  Result<LeaseInfo> Acquire(std::span<const TokenId> prompt, std::chrono::milliseconds ttl);
  Status Release(std::uint64_t lease);
  Result<PinInfo> Pin(std::span<const TokenId> prompt, std::chrono::milliseconds ttl);
  Status Unpin(const std::string& key);
  Result<std::int64_t> Prefetch(std::span<const TokenId> prompt);
  Result<std::int64_t> Evict(const EvictRequest& request);
  Result<std::vector<Entry>> Entries(const EntriesRequest& request);

  AnchorStats anchor_stats() const;

  void ClearPool();
  Status CheckIntegrity();
  // Refuses new requests from now on and returns when the last has ended and the cold tier has what memory has.
  void Drain();

 private:
  void Run();
  // One step. False when it is time to stop.
  bool Step();
  bool Receive();
  // Whether nobody waits for the engine's thread.
  bool NoNews();
  // What is done when nobody has asked for a while. False when there is nothing.
  bool WorkWhileIdle();
  SteadyTime NextCopy() const;
  SteadyTime NextWakeUp() const;
  void EndLateAndCancelled(const std::vector<std::uint64_t>& cancelled);
  void Stop();
  // Ends whatever runs or waits, and what has just arrived.
  void FailAll(const Status& status);
  // Whether the backend is a device that has failed, which it then is for good. The first time, everything is told.
  bool DeviceIsLost();
  // Brings what waits to be copied to the cold tier there, as far as that takes it. Waits for the disk, beside steps.
  void DemoteAll();
  // Runs `task` on the engine's thread between two steps; returns when it has run.
  void OnEngineThread(const std::function<void()>& task);
  void Post(std::function<void()> task);

  // admission.cc: fills the step.
  void Plan();
  bool AdmitNext(std::int64_t* row_budget);
  bool TryAdmit(std::size_t i, std::span<const Prospect> prospects, StoredPrefix stored, std::int64_t* row_budget);
  bool WorthWaitingFor(const EngineRequest& request, const StoredPrefix& stored) const;
  bool PrefixPays(const StoredPrefix& stored);
  ReusePlan PlanFor(const EngineRequest& request, StoredPrefix stored);
  void AddWork(Sequence* sequence, std::int64_t* row_budget);
  Sequence* Admit(std::size_t i, std::span<const Prospect> prospects, ReusePlan plan, KvHandle kv);
  void RememberPlan(const Sequence& sequence);

  // moved.cc: prompts whose parts stand elsewhere.
  struct MovedPlan {
    std::optional<ReusePlan> plan;  // unset: its session has seen no part of the prompt
    MovedWork work;                 // without a prompt: the plan does without
    double trial_rows = 0;          // for MovedReuse::Admitted
    bool distrusted = false;        // MovedReuse::Decision's
    std::vector<ChunkLoad> loads;   // that `work` needs first; the prompt's own prefix may be among them
    std::int64_t saved = 0;         // rows, where there are any
  };
  enum class Disk { kUnread, kAsMemory, kOnTheWay };
  MovedPlan PlanMoved(const EngineRequest& request, const StoredPrefix& stored, Disk disk, MissKind gone);
  bool TryAdmitMoved(std::size_t i, std::span<const Prospect> prospects, MovedPlan& moved, std::int64_t* row_budget);
  void ComputeMoved();
  Status Recompute(Sequence& sequence, std::span<float> logits);
  Status SendBack(Sequence& sequence, std::span<float> logits);
  void MayAudit(Sequence& sequence, std::span<const float> logits);
  Status ComputeExactly(Sequence& sequence, float* logits, std::string_view reason);
  void BecomeExact(Sequence& sequence);
  void Teach(Sequence& sequence);
  void Record(const Sequence& sequence);
  void KeepMoved(Sequence& sequence);
  void HealLater(Sequence& sequence);
  void ShadowLater(Sequence& sequence);
  Healer::Events HealerEvents();

  // chunk_loads.cc: chunks that are read back before their prompt is computed, or while it is.
  void RecallSession(const std::string& session);
  MovedPlan PlanWithLoads(const EngineRequest& request, const StoredPrefix& stored);
  void BeginChunkLoads(const EngineRequest& request, MovedPlan all);
  bool IsLoadingChunks(std::uint64_t request_id) const;
  bool MayComputeOverLoads(const EngineRequest& request, const StoredPrefix& stored) const;
  std::optional<double> SecondsOfChunkLoads(std::uint64_t request_id) const;
  bool MayBlendMore(const EngineRequest& request) const;
  std::int64_t RowsWhileLoading(const EngineRequest& request) const;
  bool TryAdmitOverLoads(std::size_t i, std::span<const Prospect> prospects, const StoredPrefix& stored,
                         std::int64_t* row_budget);
  std::vector<PageIndex> PagesOnTheWay(std::uint64_t request_id, std::span<const TokenId> run,
                                       const StoredPrefix& stored) const;
  void GateChunkLoads(Sequence& sequence);
  std::optional<MissKind> EndChunkLoads(Sequence& sequence);

  void Materialize();
  Status Forward();
  void GrowLogits(std::int64_t rows);

  // commit.cc: what a step has brought, and how requests end.
  void Commit(const Status& forward);
  void AcceptToken(Sequence& sequence, TokenId token);
  void Complete(Sequence& sequence, FinishReason reason, TokenChunk last_chunk);
  void Fail(Sequence& sequence, const Status& status);
  void FailWaiting(const EngineRequest& request, const Status& status);
  void EndSequence(Sequence& sequence);
  void DropEnded();
  void Publish(Sequence& sequence);
  void PublishLoad();
  void RequestEnded();

  // promote.cc: pages on their way into memory.
  void BeginPromotion(std::unique_ptr<Promotion> promotion, KvHandle& kv);
  // `then` runs on the engine's thread when they have ended.
  void StartReads(std::vector<ColdLoad> loads, std::shared_ptr<LoadProgress> progress, std::function<void()> then,
                  PartsReady on_parts);
  void ReadOn(std::uint64_t id, Promotion& promotion);
  void SendOn(std::uint64_t id);
  void FollowCopies();
  void EndPromotion(std::uint64_t id);
  bool MayOverlap(const Sequence& sequence, std::int64_t rows) const;
  std::optional<double> SecondsLeft(const Promotion& promotion) const;
  void PublishLoaded(const Promotion& promotion, KvHandle& kv, std::span<const ColdLoaded> good);
  // Loads what the cold tier has of `tokens`, then calls `done`. Where memory has no room for it, `done` is called with
  // what there is. `request`: whose chunks these are (Promotion), or 0.
  struct Wish {
    std::vector<TokenId> tokens;
    FetchDone done;
    std::uint64_t request = 0;
  };
  void Fetch(Wish wish);
  void RetryFetches();
  bool StartFetch(Wish& wish);

  // by_name.cc
  Entry EntryOf(const StoredPage& page) const;
  Entry EntryOf(const ColdEntry& cold) const;
  Result<std::string> ResolveKey(const std::string& key);
  // Fetches `prompt`, runs `then` on the engine's thread, and returns. Unavailable when the engine stopped first.
  Status AfterFetch(std::span<const TokenId> prompt, const std::function<void()>& then);

  runtime::Model* const model_;
  KvPool* const pool_;
  PageArena* const arena_;
  ColdTier* const cold_;  // may be null
  StatsBook* const stats_;
  const EngineOptions options_;
  const SteadyTime start_ = std::chrono::steady_clock::now();

  // The inbox: all that other threads touch. Guarded by mutex_.
  std::mutex mutex_;
  std::condition_variable inbox_changed_;
  std::condition_variable all_ended_;
  std::vector<EngineRequest> arrived_;
  std::vector<std::uint64_t> cancelled_;
  std::vector<std::function<void()>> tasks_;
  std::uint64_t next_id_ = 1;
  std::int64_t waiting_count_ = 0;      // arrived and not yet admitted
  std::int64_t outstanding_count_ = 0;  // submitted and not yet ended
  bool draining_ = false;
  bool stopping_ = false;
  Status device_lost_;  // what every request is told, once the device has failed

  // The engine thread's own.
  const Planner planner_;
  Demoter demoter_;
  LeaseBook leases_;
  CostMeter costs_;
  WaitingQueue waiting_;
  MovedReuse moved_;
  Healer healer_;
  ShadowAuditor shadow_;
  std::mt19937_64 audit_draw_;                      // which of an answer's tokens is audited; changes no answer
  std::vector<std::unique_ptr<Sequence>> running_;  // in order of admission
  std::vector<Work> work_;
  bool replan_ = false;      // something has changed since no waiting request could be admitted
  SteadyTime last_work_;     // when a request was last computed
  SteadyTime guards_saved_;  // or were looked at
  bool may_sleep_ = true;    // nothing to do until somebody or a deadline says so
  runtime::ForwardBatch batch_;
  std::vector<float> logits_;  // [rows whose logits are wanted, vocab]
  PinnedBlocks pinned_;
  std::uint64_t next_promotion_ = 1;
  std::map<std::uint64_t, std::unique_ptr<Promotion>> promotions_;
  LoadGate gate_;              // of the step that is being computed
  std::vector<Wish> fetches_;  // that wait for a promotion of the same pages
  SessionRecall recall_;
  struct ChunkLoads {
    int under_way = 0;
    std::optional<MissKind> lost;
    std::int64_t rows = 0;     // that computing over the chunks takes at most
    bool may_overlap = false;  // there may be a way to do that before all have come
  };
  std::unordered_map<std::uint64_t, ChunkLoads> chunk_loads_;  // of waiting requests that have asked for them
  std::deque<std::uint64_t> plan_order_;
  std::unordered_map<std::uint64_t, ReusePlan> plans_;  // of the last requests, for ExplainRequest

  std::thread thread_;  // last: starts when all else is there
};

}  // namespace kvshare::agentd

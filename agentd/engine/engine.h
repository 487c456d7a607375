// Engine: the one thread that owns model, pool and arena, and its loop: receive, plan, materialize, forward, commit.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "agentd/engine/planner.h"
#include "agentd/engine/sequence.h"
#include "agentd/engine/stats_book.h"
#include "agentd/pool/kv_pool.h"
#include "agentd/pool/page_arena.h"
#include "kvshare/status.h"
#include "runtime/forward_batch.h"
#include "runtime/model.h"

namespace kvshare::agentd {

struct EngineOptions {
  std::int64_t max_running = 0;           // >= 1
  std::int64_t max_waiting = 0;           // >= 1
  std::int64_t prefill_chunk_tokens = 0;  // >= 1
};

// Public methods are thread-safe; everything else happens on the engine's thread, without locks. Sinks are called
// there, under no lock. model, pool, arena and stats must outlive the engine.
class Engine {
 public:
  Engine(runtime::Model* model, KvPool* pool, PageArena* arena, StatsBook* stats, const EngineOptions& options);
  // Requests that have not ended get Unavailable.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Queues a request and returns its id, 1 first. ResourceExhausted when max_waiting are waiting, Unavailable after
  // Drain began; then the sink is never called.
  Result<std::uint64_t> Submit(EngineRequest request);
  void Cancel(std::uint64_t request_id);

  // What a prompt would be given now.
  Explanation Explain(std::span<const TokenId> prompt, ReuseMode mode);
  // How an earlier request was served. NotFound for one that is unknown, not yet planned, or long ago.
  Result<Explanation> ExplainRequest(std::uint64_t request_id);

  void ClearPool();
  Status CheckIntegrity();
  // Refuses new requests from now on and returns when the last has ended.
  void Drain();

 private:
  // Rows [begin, begin + count) of one sequence in this step; the last row's logits, if wanted, are row `logits_row`.
  struct Work {
    Sequence* sequence = nullptr;
    std::int64_t begin = 0;
    std::int64_t count = 0;
    std::int64_t logits_row = -1;
  };

  void Run();
  // One step. False when it is time to stop.
  bool Step();
  bool Receive();
  void Plan();
  void Materialize();
  Status Forward();
  void Commit(const Status& forward);

  bool AdmitNext(std::int64_t* row_budget);
  bool WorthWaitingFor(const EngineRequest& request, const PrefixMatch& match) const;
  void AddWork(Sequence* sequence, std::int64_t* row_budget);
  void GrowLogits(std::int64_t rows);
  void AcceptToken(Sequence& sequence, TokenId token);
  void Complete(Sequence& sequence, FinishReason reason, TokenChunk last_chunk);
  void Fail(Sequence& sequence, const Status& status);
  void FailWaiting(const EngineRequest& request, const Status& status);
  void EndSequence(Sequence& sequence);
  void DropEnded();
  void EndLateAndCancelled(const std::vector<std::uint64_t>& cancelled);
  void RememberPlan(const Sequence& sequence);
  void PublishLoad();
  void RequestEnded();
  // Runs `task` on the engine's thread between two steps; returns when it has run.
  void OnEngineThread(const std::function<void()>& task);

  runtime::Model* const model_;
  KvPool* const pool_;
  PageArena* const arena_;
  StatsBook* const stats_;
  const EngineOptions options_;

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

  // The engine thread's own.
  std::deque<EngineRequest> waiting_;
  std::vector<std::unique_ptr<Sequence>> running_;  // in order of admission
  std::vector<Work> work_;
  runtime::ForwardBatch batch_;
  std::vector<float> logits_;  // [rows whose logits are wanted, vocab]
  std::deque<std::uint64_t> plan_order_;
  std::unordered_map<std::uint64_t, std::vector<PlanSpan>> plans_;  // of the last requests, for ExplainRequest

  std::thread thread_;  // last: starts when all else is there
};

}  // namespace kvshare::agentd

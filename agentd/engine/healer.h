// Healer: computes exactly, when nobody waits, what was answered approximately: the next who asks finds it, and how far
// the answer was from exact is known (an audit).
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "agentd/engine/stats_book.h"
#include "agentd/pool/kv_pool.h"
#include "agentd/pool/page_arena.h"
#include "kvshare/status.h"
#include "runtime/forward_batch.h"
#include "runtime/model.h"

namespace kvshare::agentd {

// What a token of an approximate answer was chosen by.
struct AuditPoint {
  std::int64_t at = 0;  // the token's index; the first of an answer stands at prompt_tokens
  std::vector<float> logits;
};

struct HealJob {
  std::vector<TokenId> tokens;  // a prompt and the answer that was given
  std::int64_t prompt_tokens = 0;
  AgentId agent = 0;
  std::shared_ptr<const std::string> session;
  std::vector<AuditPoint> audits;  // ascending
  bool guarded = false;            // in mode auto: audits teach the guard
  bool one_thread = false;         // all that was moved was in company
  int depth = 1;                   // as KeptKv has it
  std::uint64_t kept = 0;          // MovedReuse::Keep's name for what the answer stood on
};

// The engine's thread. It holds pages only while it is at a job, and gives them back on demand.
class Healer {
 public:
  struct Events {
    std::function<void(PageIndex page, const HealJob& job)> on_stored;  // it is in the index now
    std::function<void(const HealJob& job)> on_healed;
    std::function<void(const HealJob& job, const AuditPoint& point, double kl)> on_audit;
  };

  Healer(runtime::Model* model, KvPool* pool, PageArena* arena, Events events)
      : model_(model), pool_(pool), arena_(arena), events_(std::move(events)) {}

  // Beyond kMaxJobs the oldest is forgotten.
  void Add(HealJob job);
  bool idle() const { return jobs_.empty() && !current_.has_value(); }
  // A few milliseconds of work. False when there is none.
  bool Work();
  // Stores what is computed and leaves the rest: somebody needs the room. False when it held none.
  bool Yield();
  void Clear();
  // Pages it holds at the moment.
  std::int64_t pages() const { return current_.has_value() ? static_cast<std::int64_t>(kv_.pages().size()) : 0; }

  static constexpr std::size_t kMaxJobs = 16;
  static constexpr std::int64_t kRowsPerStep = 32;

 private:
  bool Begin();
  Status Compute(std::int64_t end, float* logits);
  void Store();
  void End();

  runtime::Model* const model_;
  KvPool* const pool_;
  PageArena* const arena_;
  const Events events_;
  std::deque<HealJob> jobs_;
  std::optional<HealJob> current_;
  KvHandle kv_;
  std::int64_t computed_ = 0;
  std::size_t stored_ = 0;   // pages
  std::size_t audited_ = 0;  // points of current_
  runtime::ForwardBatch batch_;
};

}  // namespace kvshare::agentd

// ShadowAuditor: computes once more, when nobody waits, over its chunks what was computed exactly because they are not
// trusted yet. Nobody is given the result: it teaches the guard what the chunks are worth (docs/design/
// shadow-audits.md).
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <vector>

#include "agentd/engine/moved_reuse.h"
#include "agentd/engine/request.h"
#include "agentd/pool/kv_pool.h"
#include "agentd/pool/page_arena.h"
#include "kvshare/types.h"
#include "runtime/model.h"

namespace kvshare::agentd {

// A request that was answered exactly.
struct ShadowJob {
  EngineRequest request;        // without a sink
  std::int64_t stored = 0;      // tokens of its prompt that were stored when it was planned
  std::vector<TokenId> answer;  // its beginning, at least one token
  std::vector<float> logits;    // that the first token was chosen by
  int tries = 0;
};

// The engine's thread. Holds nothing between two calls but the jobs.
class ShadowAuditor {
 public:
  // `go_on` is asked every few milliseconds: where it says no, somebody waits. `on_audit` gets KL(exact || shadow) of
  // the first token, in nats.
  ShadowAuditor(runtime::Model* model, KvPool* pool, PageArena* arena, MovedReuse* moved, std::function<bool()> go_on,
                std::function<void(double kl)> on_audit)
      : model_(model),
        pool_(pool),
        arena_(arena),
        moved_(moved),
        go_on_(std::move(go_on)),
        on_audit_(std::move(on_audit)) {}

  // Beyond kMaxJobs the oldest is forgotten.
  void Add(ShadowJob job);
  bool idle() const { return jobs_.empty(); }
  // One job, unless somebody comes: then it is done again later. False when there is none.
  bool Work();
  void Clear() { jobs_.clear(); }

  static constexpr std::size_t kMaxJobs = 16;
  static constexpr int kMaxTries = 3;
  static constexpr std::int64_t kRowsPerStep = 32;

 private:
  Status Audit(const ShadowJob& job);

  runtime::Model* const model_;
  KvPool* const pool_;
  PageArena* const arena_;
  MovedReuse* const moved_;
  const std::function<bool()> go_on_;
  const std::function<void(double kl)> on_audit_;
  std::deque<ShadowJob> jobs_;
};

}  // namespace kvshare::agentd

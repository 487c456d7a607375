// MovedReuse: which parts of a prompt its session has seen elsewhere, whose KV is still in memory, and what it takes to
// use it from where it lies.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "agentd/engine/request.h"
#include "agentd/engine/stats_book.h"
#include "agentd/pool/kv_pool.h"
#include "agentd/repair/moved_prompt.h"
#include "agentd/repair/session_book.h"
#include "anchors/anchor_pool.h"
#include "anchors/confidence.h"
#include "kernels/paged_kv.h"
#include "runtime/model.h"

namespace kvshare::agentd {

// A part of a prompt, found.
struct FoundChunk {
  MovedChunk chunk;
  AgentId source = 0;  // whose prompt it stood in
};

struct FoundChunks {
  std::vector<FoundChunk> chunks;  // ascending, disjoint
  std::vector<KvHandle> leases;    // while they live, the chunks' pages stay as they are
};

// A prompt computed over found chunks, and all it needs to stay as it is while it runs.
struct MovedWork {
  std::vector<KvHandle> leases;
  std::shared_ptr<anchors::AnchorPool> anchors;
  std::unique_ptr<MovedPrompt> prompt;  // null: nothing is moved
};

// The engine's thread; all must outlive it. Sessions are strangers to each other: nothing found under one name was
// ever recorded under another.
class MovedReuse {
 public:
  // `blend_recompute`: ServiceOptions'.
  MovedReuse(runtime::Model* model, KvPool* pool, const kernels::KvPages& pages, StatsBook* names,
             double blend_recompute)
      : model_(model), pool_(pool), pages_(pages), names_(names), blend_recompute_(blend_recompute) {}

  // These tokens stood from position 0 in a prompt of `session`, and their KV is in the pool, exact.
  void Record(const std::string& session, std::span<const TokenId> tokens, AgentId source) {
    book_.Record(session, tokens, source);
  }

  // What of prompt[from, n - 1) can be taken from elsewhere; `new_tokens` may follow the prompt. Empty when the session
  // has seen nothing of it.
  FoundChunks Find(const std::string& session, std::span<const TokenId> prompt, std::int64_t from,
                   std::int64_t new_tokens) const;

  // The computation of the request's prompt after `prefix`, over `found`, whose leases it takes; pages of its own are
  // still to be given. Requires a session and at least one chunk.
  MovedWork Prepare(const EngineRequest& request, const PrefixMatch& prefix, FoundChunks& found);

  // Whether `prompt` can be expected to compute fewer rows than `plain`, which doing without it takes: how often the
  // guard has had such prompts computed after all is part of it.
  bool Pays(const EngineRequest& request, const MovedPrompt& prompt, std::int64_t plain);
  // A request has ended that reused chunks, or the guard has just had it computed.
  void Answered(const EngineRequest& request, const MovedPrompt& prompt, bool doubted);

  // An answer of mode auto, of one thread, had this margin at its first token and was this far from exact, in nats.
  void Audited(double margin, double kl) { audits_.Record(margin, kl); }

  void Clear();

 private:
  struct Doubts {
    double rate = 0;  // of requests that reuse chunks
    std::int64_t declined = 0;
  };
  Doubts& DoubtsOf(const MovedPrompt& prompt) { return prompt.OneThread() ? thread_ : elsewhere_; }

  std::shared_ptr<anchors::AnchorPool> AnchorsOf(const std::string& session);

  runtime::Model* const model_;
  KvPool* const pool_;
  const kernels::KvPages pages_;
  StatsBook* const names_;
  const double blend_recompute_;
  SessionBook book_;
  // Before any has been seen, what the judge has seen.
  Doubts thread_{.rate = 0.2};
  Doubts elsewhere_{.rate = 0.6};
  anchors::GuardMargin guard_;
  anchors::AuditBook audits_;
  // KVCOMM's, which are made of a session's KV and so are the session's own. Most recently used first.
  std::list<std::pair<std::string, std::shared_ptr<anchors::AnchorPool>>> anchors_;
};

}  // namespace kvshare::agentd

// Sequence: one running request, from its plan to its reply.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "agentd/engine/healer.h"
#include "agentd/engine/moved_reuse.h"
#include "agentd/engine/planner.h"
#include "agentd/engine/request.h"
#include "agentd/pool/kv_pool.h"
#include "kvshare/types.h"
#include "runtime/text_stream.h"

namespace kvshare::agentd {

// tokens:  0 ............ computed ............ prompt_tokens ............ tokens.size()
//          |-- KV in `kv` --|-- to be computed --|
// While the prompt is computed, tokens is the prompt. Afterwards exactly one token, the last one generated, has no KV
// yet. While it loads, nothing of it is computed.
//
// While `moved.prompt` is there, KV before `computed` stands in many places and is approximate but for its lead.
struct Sequence {
  EngineRequest request;
  ReusePlan plan;
  KvHandle kv;
  MovedWork moved;
  MovedWork lesson;                 // of a prompt that was computed and will teach its session's anchors
  std::vector<AuditPoint> audits;   // of an approximate answer
  bool one_thread = false;          // of the same: all that was moved was in company
  int depth = 1;                    // and how many approximate requests it stands on, itself included
  std::uint64_t kept = 0;           // of an approximate answer that has ended: MovedReuse::Keep's name
  bool distrusted = false;          // MovedReuse::Decision's: its answer is to be compared with what chunks would give
  std::vector<float> first_logits;  // of such a one: what its first token was chosen by
  std::vector<TokenId> tokens;      // prompt, then what was generated
  std::int64_t computed = 0;
  std::int64_t prompt_tokens = 0;
  std::size_t published = 0;                // the first so many pages are in the index
  std::uint64_t loading = 0;                // the promotion it waits for; 0: none
  std::optional<runtime::TextStream> text;  // absent when the model has no tokenizer
  SteadyTime started;                       // first computation
  SteadyTime first_token;
  SteadyTime last_token;
  bool ended = false;

  bool prefilling() const { return computed < prompt_tokens; }
  std::int64_t generated() const { return static_cast<std::int64_t>(tokens.size()) - prompt_tokens; }
};

}  // namespace kvshare::agentd

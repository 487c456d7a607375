// Sequence: one running request, from its plan to its reply.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "agentd/engine/planner.h"
#include "agentd/engine/stats_book.h"
#include "agentd/pool/kv_pool.h"
#include "agentd/service.h"
#include "kvshare/types.h"
#include "runtime/text_stream.h"

namespace kvshare::agentd {

using SteadyTime = std::chrono::steady_clock::time_point;

// A request the engine can run as it stands: checked, tokenized, its mode resolved.
struct EngineRequest {
  std::uint64_t id = 0;  // given by the engine
  std::vector<TokenId> prompt;
  SamplingParams sampling;
  std::int64_t max_tokens = 0;  // prompt + max_tokens fits the window; 0: the prompt is computed and stored, no more
  std::vector<std::string> stop;
  bool ignore_eos = false;
  AgentId agent = 0;
  std::shared_ptr<const std::string> session;  // null: none
  ReuseMode reuse = ReuseMode::kExact;
  SteadyTime arrival;
  SteadyTime deadline;
  std::shared_ptr<GenerateSink> sink;

  // Tokens whose KV has a place while it runs. The last generated token is never an input, so it needs none.
  std::int64_t tokens_to_hold() const {
    return static_cast<std::int64_t>(prompt.size()) + (max_tokens > 0 ? max_tokens - 1 : 0);
  }
};

// tokens:  0 ............ computed ............ prompt_tokens ............ tokens.size()
//          |-- KV in `kv` --|-- to be computed --|
// While the prompt is computed, tokens is the prompt. Afterwards exactly one token, the last one generated, has no KV
// yet. While it loads, nothing of it is computed.
struct Sequence {
  EngineRequest request;
  ReusePlan plan;
  KvHandle kv;
  std::vector<TokenId> tokens;  // prompt, then what was generated
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

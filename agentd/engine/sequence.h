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
  std::int64_t max_tokens = 0;  // prompt + max_tokens fits the window
  std::vector<std::string> stop;
  bool ignore_eos = false;
  AgentId agent = 0;
  ReuseMode reuse = ReuseMode::kExact;
  SteadyTime arrival;
  SteadyTime deadline;
  std::shared_ptr<GenerateSink> sink;
};

// tokens:  0 ............ computed ............ prompt_tokens ............ tokens.size()
//          |-- KV in `kv` --|-- to be computed --|
// While the prompt is computed, tokens is the prompt. Afterwards exactly one token, the last one generated, has no KV
// yet.
struct Sequence {
  EngineRequest request;
  ReusePlan plan;
  KvHandle kv;
  std::vector<TokenId> tokens;  // prompt, then what was generated
  std::int64_t computed = 0;
  std::int64_t prompt_tokens = 0;
  std::optional<runtime::TextStream> text;  // absent when the model has no tokenizer
  SteadyTime started;                       // first computation
  SteadyTime first_token;
  SteadyTime last_token;
  bool ended = false;

  bool prefilling() const { return computed < prompt_tokens; }
  std::int64_t generated() const { return static_cast<std::int64_t>(tokens.size()) - prompt_tokens; }
};

}  // namespace kvshare::agentd

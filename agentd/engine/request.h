// EngineRequest: what the engine is asked, checked and ready to run.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "agentd/engine/stats_book.h"
#include "agentd/service.h"
#include "kvshare/types.h"

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
  bool exact_agent = false;  // mode auto moves nothing for who asks (ServiceOptions::exact_agents)
  SteadyTime arrival;
  SteadyTime deadline;
  std::shared_ptr<GenerateSink> sink;

  // Tokens whose KV has a place while it runs. The last generated token is never an input, so it needs none.
  std::int64_t tokens_to_hold() const {
    return static_cast<std::int64_t>(prompt.size()) + (max_tokens > 0 ? max_tokens - 1 : 0);
  }
};

}  // namespace kvshare::agentd

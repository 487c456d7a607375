// Replays prepared prompts against a client in one reuse mode and measures what an agent would see.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "kvshare/client.h"
#include "kvshare/status.h"
#include "tools/trace/prompts.h"
#include "tools/trace/schedule.h"
#include "tools/trace/trace.h"

namespace kvshare::trace {

struct RequestResult {
  std::vector<TokenId> output_ids;
  ReuseReport reuse;
  double ttft_ms = 0;   // from the call to the first token, on the agent's side
  double start_ms = 0;  // of the call, since the replay of this mode began
  double end_ms = 0;    // of the last token
};

struct ModeResult {
  ReuseMode mode = ReuseMode::kOff;
  std::vector<RequestResult> requests;  // in the order of the prompts
  double wall_s = 0;
  std::optional<std::int64_t> peak_rss_bytes;  // of this process; unknown when the daemon is another
  std::int64_t pool_pages = 0;                 // that the pool can hold; 0: not known
  std::int64_t pool_bytes = 0;
};

struct ReplayProgress {
  std::size_t done = 0;
  std::size_t total = 0;
  std::int64_t prompt_tokens = 0;  // of the requests done
  std::int64_t prefix_tokens = 0;
  double elapsed_s = 0;
};

struct ReplayOptions {
  ScheduleOptions schedule;
  std::chrono::milliseconds timeout{600000};  // of one request
  // Called after every request, one call at a time.
  std::function<void(const ReplayProgress&)> progress;
};

// Requests in flight at most, whatever the schedule would allow: each takes a thread of this process.
inline constexpr int kMaxInFlight = 64;

// `prompts` are those of the first prompts.size() requests of `trace`, in order. Ends at the first request that fails,
// with its name. Greedy, with ignore_eos: every request decodes its max_tokens.
Result<ModeResult> ReplayMode(Client* client, const Trace& trace, const std::vector<PreparedPrompt>& prompts,
                              ReuseMode mode, const ReplayOptions& options);

}  // namespace kvshare::trace

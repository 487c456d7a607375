// A replay's outcome in the forms that people and programs read: JSON, a text table, CSV, JSON lines, one HTML page.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include "kvshare/status.h"
#include "tools/trace/prompts.h"
#include "tools/trace/replayer.h"
#include "tools/trace/summary.h"
#include "tools/trace/trace.h"

namespace kvshare::trace {

// What a report is made of. Refers to its parts; all modes answer the same prompts.
struct Replay {
  const Trace& trace;
  std::string trace_name;
  std::string model;
  std::string dtype;
  std::string isa;
  const std::vector<PreparedPrompt>& prompts;
  const std::vector<ModeResult>& modes;
};

struct TokenCounts {
  std::int64_t prompt = 0;  // prefix + moved + recomputed + fresh
  std::int64_t prefix = 0;
  std::int64_t moved = 0;
  std::int64_t recomputed = 0;
  std::int64_t fresh = 0;

  std::int64_t reused() const { return prefix + moved; }
  double hit_rate() const { return prompt == 0 ? 0 : static_cast<double>(reused()) / static_cast<double>(prompt); }
};

struct AgentReport {
  std::string agent;
  std::int64_t requests = 0;
  TokenCounts tokens;
  double ttft_ms_mean = 0;
};

// Requests that ended one after the other.
struct Window {
  double end_s = 0;  // since the replay of this mode began
  std::int64_t requests = 0;
  std::int64_t prompt_tokens = 0;
  std::int64_t reused_tokens = 0;
};

struct ModeReport {
  std::string mode;
  TokenCounts tokens;
  // Of tokens.prefix: those that a request of another agent had brought first, as the order of the replay tells.
  std::int64_t cross_agent_tokens = 0;
  std::int64_t generated_tokens = 0;
  std::int64_t truncated_requests = 0;
  Summary ttft_ms;
  std::vector<double> ttft_ms_quantiles;  // at 0, 1/100 .. 1; empty where a report lacks them
  double wall_s = 0;
  std::string outputs_sha256;  // of all generated ids, int32 little-endian, in request order
  std::optional<std::int64_t> peak_rss_bytes;
  std::map<std::string, std::int64_t> miss_reasons;  // reason -> tokens
  std::vector<Window> windows;                       // at most kWindows of nearly equal numbers of requests
  std::vector<AgentReport> agents;                   // in order of first appearance
};

// Prompt tokens that an exact prefix cache could have reused at most (ceilings.h).
struct CeilingReport {
  std::int64_t pool_pages = 0;
  std::int64_t pool_bytes = 0;
  std::int64_t unique_pages = 0;
  std::int64_t prompt_tokens = 0;
  std::int64_t unlimited_tokens = 0;
  std::int64_t lru_tokens = 0;
  std::int64_t belady_tokens = 0;
};

struct Report {
  std::string trace;
  std::string model;
  std::string dtype;
  std::string isa;
  std::int64_t requests = 0;
  std::vector<ModeReport> modes;
  std::optional<CeilingReport> ceilings;  // absent when the pool's size in pages is not known

  const ModeReport* Find(std::string_view mode) const;
};

inline constexpr std::size_t kWindows = 40;

Report MakeReport(const Replay& replay);

std::string ReportJson(const Report& report);  // the shape that accept/CONTRACT.md fixes, and more; one line
// The inverse; what the contract does not fix may be absent. InvalidArgument names what is missing or has a wrong type.
Result<Report> ParseReport(const std::string& json);
std::string ReportText(const Report& report);  // for people
std::string ReportCsv(const Report& report);   // one row per mode
std::string ReportHtml(const Report& report);  // one page, nothing outside it

void WriteDump(const Replay& replay, std::ostream& out);         // one JSON line per request and mode
void WriteRequestsCsv(const Replay& replay, std::ostream& out);  // one row per request and mode

}  // namespace kvshare::trace

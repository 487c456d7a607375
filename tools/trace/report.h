// A replay's outcome in the forms people and programs read: JSON, a text table, JSON lines, one HTML page.
#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "tools/trace/prompts.h"
#include "tools/trace/replayer.h"
#include "tools/trace/summary.h"
#include "tools/trace/trace.h"

namespace kvshare::trace {

// What the reports are made of. Refers to its parts; all modes answer the same prompts.
struct Replay {
  const Trace& trace;
  std::string trace_name;
  std::string model;
  std::string dtype;
  std::string isa;
  const std::vector<PreparedPrompt>& prompts;
  const std::vector<ModeResult>& modes;
};

// Sums over one mode's requests.
struct ModeTotals {
  std::int64_t prompt_tokens = 0;
  std::int64_t prefix_tokens = 0;
  std::int64_t moved_tokens = 0;
  std::int64_t recomputed_tokens = 0;
  std::int64_t fresh_tokens = 0;
  std::int64_t truncated_requests = 0;
  Summary ttft_ms;
  std::string outputs_sha256;  // of all generated ids, int32 little-endian, in request order
};
// `agent`: only requests of this agent; null: all.
ModeTotals Totals(const Replay& replay, const ModeResult& mode, const std::string* agent = nullptr);

// Agents in order of first appearance.
std::vector<std::string> Agents(const Replay& replay);

std::string ReportJson(const Replay& replay);             // the shape that accept/CONTRACT.md fixes, one line
std::string ReportText(const Replay& replay);             // for people
std::string ReportHtml(const Replay& replay);             // one page, nothing outside it
void WriteDump(const Replay& replay, std::ostream& out);  // one JSON line per request and mode

}  // namespace kvshare::trace

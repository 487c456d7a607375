// Reads recorded workloads: KTR-1, Mooncake's JSONL as it is published, logs of OpenAI-compatible requests. Every
// reference must point backwards, every field must have its type; the first line that does not is named, with what is
// wrong with it. docs/reference/traces.md says what each format may hold.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <string_view>

#include "kvshare/status.h"
#include "tools/trace/trace.h"

namespace kvshare::trace {

// Takes the lines of a trace one by one; for files use ReadTrace.
class TraceParser {
 public:
  TraceParser();
  ~TraceParser();
  TraceParser(const TraceParser&) = delete;
  TraceParser& operator=(const TraceParser&) = delete;

  // `line` without its end; blank lines are skipped. Returns InvalidArgument "line N: cause", FailedPrecondition for a
  // KTR version other than 1, ResourceExhausted beyond the bounds here and in builder.h.
  Status AddLine(std::string_view line);
  // InvalidArgument when the trace has no request.
  Result<Trace> Finish();

  std::size_t requests() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Reads a file, plain or gzip, up to its first `limit` requests. NotFound when the file is not there; DataLoss
// for a damaged gzip stream; otherwise as TraceParser, all with the path in front.
Result<Trace> ReadTrace(const std::string& path, std::size_t limit = std::numeric_limits<std::size_t>::max());

}  // namespace kvshare::trace

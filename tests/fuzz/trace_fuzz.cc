// KTR-1 lines from anywhere: the reader may refuse them, and never more.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "tools/trace/schedule.h"
#include "tools/trace/trace_reader.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using kvshare::trace::Schedule;
  std::string_view rest(reinterpret_cast<const char*>(data), size);
  kvshare::trace::TraceParser parser;
  while (!rest.empty()) {
    const std::size_t end = std::min(rest.find('\n'), rest.size());
    if (!parser.AddLine(rest.substr(0, end)).ok()) return 0;
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  const auto trace = parser.Finish();
  if (!trace.ok()) return 0;
  for (const auto& request : trace->requests) {
    for (const auto& message : request.messages) {
      if (trace->MessageText(message).size() > std::size_t{1} << 20) return 0;
    }
  }
  // What was accepted can be scheduled to its end.
  Schedule schedule(&*trace, trace->requests.size(), {.speedup = 1000, .slots = 2});
  double now = 0;
  for (Schedule::Step step = schedule.Next(now); step.kind != Schedule::Step::Kind::kDone; step = schedule.Next(now)) {
    if (step.kind == Schedule::Step::Kind::kStart) {
      schedule.Complete(step.request, now);
    } else if (step.until_ms) {
      now = *step.until_ms;
    } else {
      __builtin_trap();  // waits for a completion although nothing is in flight
    }
  }
  return 0;
}

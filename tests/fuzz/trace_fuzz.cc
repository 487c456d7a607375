// Lines of KTR-1, Mooncake and chat logs from anywhere: the reader may refuse them, and never more.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tests/fuzz/seeded.h"
#include "tools/trace/ktr_writer.h"
#include "tools/trace/mooncake_writer.h"
#include "tools/trace/schedule.h"
#include "tools/trace/trace_reader.h"

namespace {

using kvshare::trace::Schedule;
using kvshare::trace::Trace;
using kvshare::trace::TraceParser;

kvshare::Result<Trace> Parse(std::string_view rest) {
  TraceParser parser;
  while (!rest.empty()) {
    const std::size_t end = std::min(rest.find('\n'), rest.size());
    const kvshare::Status status = parser.AddLine(rest.substr(0, end));
    if (!status.ok()) return status;
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  return parser.Finish();
}

// Small enough that looking at all of it takes no time.
bool Small(const Trace& trace) {
  std::size_t work = 0;
  for (std::size_t r = 0; r < trace.requests.size(); ++r) {
    work += static_cast<std::size_t>(trace.requests[r].blocks);
    for (const auto& message : trace.requests[r].messages) {
      for (const auto& ref : message.segments) work += trace.segments[ref.segment].text.size();
    }
  }
  return work < std::size_t{1} << 20;
}

// What the trace was written from is what is read back.
void CheckWritten(const Trace& trace) {
  const auto again = Parse(kvshare::trace::KtrText(trace));
  if (!again.ok() || again->requests.size() != trace.requests.size()) __builtin_trap();
  for (std::size_t r = 0; r < trace.requests.size(); ++r) {
    if (again->Blocks(r) != trace.Blocks(r) || again->requests[r].wait_for != trace.requests[r].wait_for ||
        again->requests[r].messages.size() != trace.requests[r].messages.size()) {
      __builtin_trap();
    }
    for (std::size_t m = 0; m < trace.requests[r].messages.size(); ++m) {
      if (again->MessageText(again->requests[r].messages[m]) != trace.MessageText(trace.requests[r].messages[m])) {
        __builtin_trap();
      }
    }
  }
}

std::vector<std::string> Seeds() {
  return {
      R"({"schema":"ktr","version":1,"time_base":"session","block_size":64,"hash_id_scope":"session"}
{"seg":"s","text":"You are A."}
{"seg":"n","n_tokens":7}
{"seg":"t","tokens":[1,2,3]}
{"request_id":"a","session_id":"w","agent_id":"A","timestamp":5,"segments":[["system","s"],["user","n"]],"output":"s"}
{"request_id":"b","session_id":"w","wait_for":["a"],"delay":3,"segments":[["user","t"],["+","@a"]]}
{"request_id":"c","input_length":130,"hash_ids":[1,2]}
{"request_id":"d","input_length":140,"hash_ids":[5],"base":"c","keep":1,"api_ms":9,"model":"m"})",
      R"({"timestamp":0,"input_length":1000,"output_length":5,"hash_ids":[0,1]}
{"timestamp":7,"input_length":1500,"output_length":5,"hash_ids":[0,1,2]})",
      R"({"session":"s","messages":[{"role":"system","content":"You are the cook. Be brief."}],)"
      R"("response":{"role":"assistant","content":)"
      R"("A very long answer that somebody else quotes in full, word for word"}}
)"
      R"({"session":"s","body":{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":)"
      R"("A very long answer that somebody else quotes in full, word for word, yes?"}]}],)"
      R"("tools":[{"type":"function"}]},"timestamp":"2025-11-27T05:51:54.5+01:00"}
)"
      R"({"request":{"prompt":[1,2,3]},"response":{"body":{"choices":[{"text":"x"}],"usage":{"prompt_tokens":3}}},)"
      R"("created":1700000000})"};
}

}  // namespace

KVS_FUZZ_SEEDS(Seeds)

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto trace = Parse(std::string_view(reinterpret_cast<const char*>(data), size));
  if (!trace.ok() || !Small(*trace)) return 0;
  CheckWritten(*trace);
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

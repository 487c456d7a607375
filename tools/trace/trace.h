// A recorded multi-agent workload in memory: KTR-1 after its references were resolved (docs/design/replay.md).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace kvshare::trace {

// Whose clock the timestamps follow.
enum class TimeBase {
  kArrival,  // one clock for the whole trace: open loop
  kSession,  // a clock per session: sessions may be placed freely
  kNone,     // no clock: order and hand-offs only
};

struct TraceHeader {
  std::string name;
  TimeBase time_base = TimeBase::kNone;
  std::string license;
  std::string origin;
};

// One chat message. Its text is the texts of its segments, one after the other.
struct TraceMessage {
  std::string role;
  std::vector<std::uint32_t> segments;  // indices into Trace::segments
};

struct TraceRequest {
  std::string id;
  std::string session;
  std::string agent;
  std::optional<double> timestamp_ms;
  double delay_ms = 0;                  // between the last of `wait_for` and this request: thinking, a tool
  std::vector<std::size_t> wait_for;    // earlier requests, as indices
  std::vector<TraceMessage> messages;   // empty for hash traces
  std::optional<std::uint32_t> output;  // the recorded reply, a segment
  std::int64_t input_length = 0;        // as recorded; 0 = not recorded
  std::int64_t output_length = 0;       // as recorded; 0 = not recorded
  std::int64_t blocks = 0;              // hash traces: number of blocks
  std::int64_t handoffs = 0;            // segments that are another request's output
};

struct Trace {
  TraceHeader header;
  std::vector<std::string> segments;
  std::vector<TraceRequest> requests;

  std::string MessageText(const TraceMessage& message) const {
    std::string text;
    for (std::uint32_t s : message.segments) text += segments[s];
    return text;
  }
};

}  // namespace kvshare::trace

// Traces as KTR-1, whatever they were read from.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "kvshare/status.h"
#include "tools/trace/trace.h"

namespace kvshare::trace {

// Writes a trace line by line, each segment before its first use. Block ids keep the delta coding that they were read
// with.
class KtrWriter {
 public:
  using Sink = std::function<Status(std::string_view line)>;  // a line with its end

  // `sink` and `trace` must outlive it. `trace` may grow between calls.
  KtrWriter(const Trace* trace, Sink sink);

  Status Header();
  // Requires: requests are written in order, all before `request` already.
  Status Request(std::size_t request);

 private:
  Status Segment(std::uint32_t segment);
  std::string Reference(const SegmentRef& ref) const;

  const Trace* trace_;
  Sink sink_;
  std::vector<bool> written_;  // by segment
};

// The whole trace as one text.
std::string KtrText(const Trace& trace);

}  // namespace kvshare::trace

#include "tools/trace/trace.h"

#include <algorithm>

#include "tools/trace/mix.h"

namespace kvshare::trace {

std::string Trace::MessageText(const TraceMessage& message) const {
  std::string text;
  for (const SegmentRef& ref : message.segments) text += segments[ref.segment].text;
  return text;
}

std::vector<std::uint64_t> Trace::Blocks(std::size_t index) const {
  // From the last block to the first, along the chain of bases; `wanted` of the current request's blocks are taken.
  std::vector<std::uint64_t> reversed;
  const TraceRequest* request = &requests[index];
  std::int64_t wanted = request->blocks;
  reversed.reserve(static_cast<std::size_t>(wanted));
  while (true) {
    const std::int64_t inherited = request->base ? request->keep : 0;
    for (std::int64_t b = wanted; b > inherited; --b) {
      reversed.push_back(block_ids[request->first_block + static_cast<std::size_t>(b - 1 - inherited)]);
    }
    wanted = std::min(wanted, inherited);
    if (wanted == 0) break;
    request = &requests[*request->base];
  }
  std::reverse(reversed.begin(), reversed.end());
  return reversed;
}

std::uint64_t Trace::BlockSpace(const TraceRequest& request) const {
  const std::uint64_t model = HashText(request.model);
  return header.hash_ids_per_session ? Mix(model, HashText(request.session)) : Mix(model, 0);
}

std::int64_t Trace::Handoffs(const TraceRequest& request) const {
  std::int64_t count = 0;
  for (const TraceMessage& message : request.messages) {
    count += std::count_if(message.segments.begin(), message.segments.end(),
                           [](const SegmentRef& ref) { return ref.source.has_value(); });
  }
  return count;
}

std::int64_t PromptTokens(const Trace& trace, const TraceRequest& request) {
  return request.input_length > 0 ? request.input_length : request.blocks * trace.header.block_tokens;
}

}  // namespace kvshare::trace

// Structs to frames and back, with every value checked on both ways: a writer refuses what the reader at the other end
// would refuse, so that a caller hears of it at once and in words.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "kvshare/status.h"
#include "libkvshare/codec/messages.h"
#include "protocol/frame.h"

namespace kvshare::codec {

using Frame = std::vector<std::uint8_t>;

// Returns: InvalidArgument naming the limit that a field exceeds.
Result<Frame> EncodeRequest(std::uint64_t correlation, const Request& request);
// Returns: ResourceExhausted naming the limit that the answer exceeds. An Error always encodes (its text is cut).
Result<Frame> EncodeReply(std::uint64_t correlation, const Reply& reply);
// A Status as a reply. Requires: !status.ok()
Frame EncodeError(std::uint64_t correlation, const Status& status);

// From frames that ReceivedFrame::Load accepted.
// Returns: InvalidArgument for a null body, a value outside its range, or a count or length above its limit;
// Unimplemented for a message type that this version does not know.
Result<Request> DecodeRequest(const wire::Request& request);
Result<Reply> DecodeReply(const wire::Reply& reply);

// What a frame that could not be loaded means to the caller: FailedPrecondition naming both versions for another
// protocol version (`peer` is "client" or "daemon"), InvalidArgument for everything else. Requires: a fault.
Status FaultStatus(wire::FrameFault fault, const wire::FrameHeader& header, std::string_view peer);

}  // namespace kvshare::codec

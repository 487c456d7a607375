// Frames: one ZeroMQ message part each, a fixed header and a FlatBuffers body. docs/formats/wire.md gives every byte.
//
// The header's first 16 bytes (magic, version, kind, correlation id) keep their place in every version, so that peers
// of different versions can still tell each other so.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "protocol/limits.h"

namespace kvshare::wire {

struct Request;  // generated from kvshare.fbs
struct Reply;

inline constexpr std::uint16_t kProtocolVersion = 1;
inline constexpr std::size_t kHeaderBytes = 24;  // a multiple of 8: the body stays aligned when the frame is

enum class FrameKind : std::uint8_t { kRequest = 1, kReply = 2 };

enum class FrameFault {
  kNone = 0,
  kTooShort,      // less than a header
  kTooLarge,      // more than kMaxFrameBytes
  kBadMagic,      // not a frame of ours
  kOtherVersion,  // a frame of ours, of another protocol version
  kWrongKind,     // neither, or not the expected, kind
  kBadLength,     // the length in the header is not the body's
  kReserved,      // a reserved byte is set
  kBadBody,       // the body is not a well-formed FlatBuffer within the limits
};
std::string_view FrameFaultName(FrameFault fault);

struct FrameHeader {
  std::uint16_t version = kProtocolVersion;
  FrameKind kind = FrameKind::kRequest;
  std::uint64_t correlation = 0;
  std::uint32_t body_bytes = 0;
};

// Writes kHeaderBytes bytes to `out`.
void WriteHeader(const FrameHeader& header, std::uint8_t* out);

// Fills *header as far as it is readable: with kOtherVersion, kWrongKind, kBadLength and kReserved, version and
// correlation are valid; with the faults before them, nothing is.
FrameFault ReadHeader(std::span<const std::uint8_t> frame, FrameHeader* header);

// True when `frame` starts like one of ours, so that its correlation id may be answered.
inline bool CorrelationReadable(FrameFault fault) {
  return fault != FrameFault::kTooShort && fault != FrameFault::kTooLarge && fault != FrameFault::kBadMagic;
}

// A received frame, checked, in aligned memory of its own: ZeroMQ's buffers are not aligned, and reading FlatBuffers
// there is undefined behaviour. Reuse one for many frames; it keeps its memory. One thread at a time.
class ReceivedFrame {
 public:
  // Copies and verifies. After kNone, header() and the accessor of `expected` are valid until the next Load.
  FrameFault Load(std::span<const std::uint8_t> frame, FrameKind expected);

  const FrameHeader& header() const { return header_; }
  const Request* request() const;  // never null after Load(kRequest) returned kNone
  const Reply* reply() const;      // never null after Load(kReply) returned kNone

 private:
  FrameHeader header_;
  std::vector<std::uint64_t> body_;
};

}  // namespace kvshare::wire

#include "protocol/frame.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "protocol/kvshare_generated.h"

namespace kvshare::wire {
namespace {

static_assert(std::endian::native == std::endian::little, "header integers are written as they lie in memory");
static_assert(kHeaderBytes % alignof(std::uint64_t) == 0);

constexpr std::uint8_t kMagic[4] = {'K', 'V', 'S', 'H'};
constexpr std::size_t kVersionAt = 4;
constexpr std::size_t kKindAt = 6;
constexpr std::size_t kReserved1At = 7;
constexpr std::size_t kCorrelationAt = 8;
constexpr std::size_t kLengthAt = 16;
constexpr std::size_t kReserved2At = 20;

// Above this a buffer is given back after use: one huge frame must not pin its memory for ever.
constexpr std::size_t kKeepBytes = std::size_t{1} << 20;

template <typename T>
bool VerifyBody(const std::uint8_t* data, std::size_t size, std::uint32_t max_tables) {
  flatbuffers::Verifier verifier(data, size, kMaxDepth, max_tables);
  return verifier.VerifyBuffer<T>(nullptr);
}

}  // namespace

std::string_view FrameFaultName(FrameFault fault) {
  switch (fault) {
    case FrameFault::kNone: return "no fault";
    case FrameFault::kTooShort: return "shorter than a frame header";
    case FrameFault::kTooLarge: return "larger than a frame may be";
    case FrameFault::kBadMagic: return "not a kvshare frame";
    case FrameFault::kOtherVersion: return "of another protocol version";
    case FrameFault::kWrongKind: return "of the wrong kind";
    case FrameFault::kBadLength: return "of another length than its header says";
    case FrameFault::kReserved: return "with reserved bytes set";
    case FrameFault::kBadBody: return "with a malformed body";
  }
  return "unknown fault";
}

void WriteHeader(const FrameHeader& header, std::uint8_t* out) {
  std::memset(out, 0, kHeaderBytes);
  std::memcpy(out, kMagic, sizeof kMagic);
  std::memcpy(out + kVersionAt, &header.version, sizeof header.version);
  out[kKindAt] = static_cast<std::uint8_t>(header.kind);
  std::memcpy(out + kCorrelationAt, &header.correlation, sizeof header.correlation);
  std::memcpy(out + kLengthAt, &header.body_bytes, sizeof header.body_bytes);
}

FrameFault ReadHeader(std::span<const std::uint8_t> frame, FrameHeader* header) {
  if (frame.size() < kHeaderBytes) return FrameFault::kTooShort;
  if (frame.size() > kMaxFrameBytes) return FrameFault::kTooLarge;
  const std::uint8_t* in = frame.data();
  if (std::memcmp(in, kMagic, sizeof kMagic) != 0) return FrameFault::kBadMagic;
  std::memcpy(&header->version, in + kVersionAt, sizeof header->version);
  std::memcpy(&header->correlation, in + kCorrelationAt, sizeof header->correlation);
  if (header->version != kProtocolVersion) return FrameFault::kOtherVersion;
  const auto kind = static_cast<FrameKind>(in[kKindAt]);
  if (kind != FrameKind::kRequest && kind != FrameKind::kReply) return FrameFault::kWrongKind;
  header->kind = kind;
  std::memcpy(&header->body_bytes, in + kLengthAt, sizeof header->body_bytes);
  if (header->body_bytes != frame.size() - kHeaderBytes) return FrameFault::kBadLength;
  std::uint32_t reserved = 0;
  std::memcpy(&reserved, in + kReserved2At, sizeof reserved);
  if (in[kReserved1At] != 0 || reserved != 0) return FrameFault::kReserved;
  return FrameFault::kNone;
}

FrameFault ReceivedFrame::Load(std::span<const std::uint8_t> frame, FrameKind expected) {
  header_ = FrameHeader{};
  const FrameFault fault = ReadHeader(frame, &header_);
  if (fault != FrameFault::kNone) return fault;
  if (header_.kind != expected) return FrameFault::kWrongKind;
  const std::size_t size = header_.body_bytes;
  if (body_.capacity() * sizeof(std::uint64_t) > kKeepBytes && size <= kKeepBytes)
    std::vector<std::uint64_t>().swap(body_);
  body_.resize(std::max<std::size_t>((size + 7) / 8, 1));
  std::memcpy(body_.data(), frame.data() + kHeaderBytes, size);
  const auto* data = reinterpret_cast<const std::uint8_t*>(body_.data());
  const bool well_formed = expected == FrameKind::kRequest ? VerifyBody<Request>(data, size, kMaxRequestTables)
                                                           : VerifyBody<Reply>(data, size, kMaxReplyTables);
  return well_formed ? FrameFault::kNone : FrameFault::kBadBody;
}

const Request* ReceivedFrame::request() const { return flatbuffers::GetRoot<Request>(body_.data()); }
const Reply* ReceivedFrame::reply() const { return flatbuffers::GetRoot<Reply>(body_.data()); }

}  // namespace kvshare::wire

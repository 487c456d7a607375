#include "libkvshare/codec/fields.h"

#include <cstring>

namespace kvshare::codec::internal {

Status TooMuch(std::string_view field, std::size_t size, std::size_t limit) {
  return InvalidArgument(std::string(field) + " is " + std::to_string(size) + ", more than the wire's limit of " +
                         std::to_string(limit));
}

Status CheckFinite(std::string_view field, double value) {
  return std::isfinite(value) ? OkStatus() : InvalidArgument(std::string(field) + " is not a finite number");
}

Status ReadString(std::string_view field, const flatbuffers::String* in, std::size_t limit, std::string* out) {
  out->clear();
  if (in == nullptr) return OkStatus();
  KVS_RETURN_IF_ERROR(CheckSize(field, in->size(), limit));
  out->assign(in->c_str(), in->size());
  return OkStatus();
}

Status ReadTokens(std::string_view field, const flatbuffers::Vector<std::int32_t>* in, std::vector<TokenId>* out) {
  out->clear();
  if (in == nullptr) return OkStatus();
  KVS_RETURN_IF_ERROR(CheckSize(field, in->size(), wire::kMaxTokens));
  out->assign(in->data(), in->data() + in->size());
  return OkStatus();
}

Status ReadReuse(wire::Reuse in, std::optional<ReuseMode>* out) {
  switch (in) {
    case wire::Reuse::Default: out->reset(); return OkStatus();
    case wire::Reuse::Off: *out = ReuseMode::kOff; return OkStatus();
    case wire::Reuse::Exact: *out = ReuseMode::kExact; return OkStatus();
    case wire::Reuse::Rotate: *out = ReuseMode::kRotate; return OkStatus();
    case wire::Reuse::Epic: *out = ReuseMode::kEpic; return OkStatus();
    case wire::Reuse::CacheBlend: *out = ReuseMode::kCacheBlend; return OkStatus();
    case wire::Reuse::Dhd: *out = ReuseMode::kDhd; return OkStatus();
    case wire::Reuse::Kvcomm: *out = ReuseMode::kKvcomm; return OkStatus();
    case wire::Reuse::Auto: *out = ReuseMode::kAuto; return OkStatus();
  }
  return InvalidArgument("reuse mode " + std::to_string(static_cast<int>(in)) + " is not known to this version");
}

flatbuffers::Offset<flatbuffers::String> WriteString(flatbuffers::FlatBufferBuilder& builder, std::string_view text) {
  if (text.empty()) return 0;
  return builder.CreateString(text.data(), text.size());
}

flatbuffers::Offset<flatbuffers::Vector<std::int32_t>> WriteTokens(flatbuffers::FlatBufferBuilder& builder,
                                                                   const std::vector<TokenId>& ids) {
  if (ids.empty()) return 0;
  return builder.CreateVector(ids);
}

wire::Reuse WriteReuse(std::optional<ReuseMode> mode) {
  if (!mode.has_value()) return wire::Reuse::Default;
  return static_cast<wire::Reuse>(static_cast<int>(*mode) + 1);  // kvshare.fbs: shifted by one
}

Status CheckName(std::string_view field, const std::string& name) {
  return CheckSize(std::string(field) + "'s size in bytes", name.size(), wire::kMaxNameBytes);
}

std::string_view FirstOf(std::string_view text, std::size_t most) {
  if (text.size() <= most) return text;
  // Not within a character: back to before its first byte.
  std::size_t end = most;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return text.substr(0, end);
}

Status ReadName(std::string_view field, const flatbuffers::String* in, std::string* out) {
  return ReadString(field, in, wire::kMaxNameBytes, out);
}

Result<flatbuffers::Offset<MissReasonVector>> WriteMissReasons(flatbuffers::FlatBufferBuilder& builder,
                                                               const std::vector<MissReason>& reasons) {
  KVS_RETURN_IF_ERROR(CheckSize("number of miss reasons", reasons.size(), wire::kMaxMissReasons));
  std::vector<flatbuffers::Offset<wire::MissReason>> offsets;
  for (const MissReason& reason : reasons) {
    KVS_RETURN_IF_ERROR(CheckName("a miss reason", reason.reason));
    const auto name = WriteString(builder, reason.reason);
    offsets.push_back(wire::CreateMissReason(builder, name, reason.tokens));
  }
  return builder.CreateVector(offsets);
}

Status ReadMissReasons(const MissReasonVector* in, std::vector<MissReason>* out) {
  if (in == nullptr) return OkStatus();
  KVS_RETURN_IF_ERROR(CheckSize("number of miss reasons", in->size(), wire::kMaxMissReasons));
  for (const wire::MissReason* reason : *in) {
    MissReason& read = out->emplace_back();
    KVS_RETURN_IF_ERROR(ReadName("miss reason", reason->reason(), &read.reason));
    read.tokens = reason->tokens();
  }
  return OkStatus();
}

Result<Frame> MakeFrame(wire::FrameKind kind, std::uint64_t correlation,
                        const flatbuffers::FlatBufferBuilder& builder) {
  const std::size_t body_bytes = builder.GetSize();
  KVS_RETURN_IF_ERROR(CheckSize("the message's size in bytes", wire::kHeaderBytes + body_bytes, wire::kMaxFrameBytes));
  Frame frame(wire::kHeaderBytes + body_bytes);
  wire::WriteHeader({.kind = kind, .correlation = correlation, .body_bytes = static_cast<std::uint32_t>(body_bytes)},
                    frame.data());
  std::memcpy(frame.data() + wire::kHeaderBytes, builder.GetBufferPointer(), body_bytes);
  return frame;
}

}  // namespace kvshare::codec::internal

namespace kvshare::codec {

Status FaultStatus(wire::FrameFault fault, const wire::FrameHeader& header, std::string_view peer) {
  if (fault == wire::FrameFault::kOtherVersion) {
    const std::string other(peer);
    const std::string self = peer == "client" ? "daemon" : "client";
    return FailedPrecondition("the " + other + " speaks protocol version " + std::to_string(header.version) +
                              ", this " + self + " version " + std::to_string(wire::kProtocolVersion) +
                              "; install the same kvshare on both sides");
  }
  return InvalidArgument("the frame is " + std::string(wire::FrameFaultName(fault)));
}

}  // namespace kvshare::codec

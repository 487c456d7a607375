// Checked reading and writing of single fields; shared by the two codecs, included by nobody else.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kvshare/status.h"
#include "kvshare/types.h"
#include "libkvshare/codec/codec.h"
#include "libkvshare/core/status_macros.h"
#include "protocol/kvshare_generated.h"
#include "protocol/limits.h"

namespace kvshare::codec::internal {

// "field is N, more than the limit of M"
Status TooMuch(std::string_view field, std::size_t size, std::size_t limit);

inline Status CheckSize(std::string_view field, std::size_t size, std::size_t limit) {
  return size <= limit ? OkStatus() : TooMuch(field, size, limit);
}
Status CheckFinite(std::string_view field, double value);
Status CheckName(std::string_view field, const std::string& name);
// The first characters of UTF-8 text, in at most `most` bytes.
std::string_view FirstOf(std::string_view text, std::size_t most);

// ---- reading ----

// FlatBuffers' verifier looks at the place of a vector's length alone, which 4 bytes divide; elements of 8 bytes may
// lie where no such number may be read.
template <typename T>
Status CheckAligned(std::string_view field, const flatbuffers::Vector<T>* in) {
  constexpr std::uintptr_t kAlignment = 8;
  if (in == nullptr || in->size() == 0) return OkStatus();
  if (reinterpret_cast<std::uintptr_t>(in->Data()) % kAlignment == 0) return OkStatus();
  return InvalidArgument(std::string(field) + " lie where they cannot be read");
}

Status ReadString(std::string_view field, const flatbuffers::String* in, std::size_t limit, std::string* out);
Status ReadTokens(std::string_view field, const flatbuffers::Vector<std::int32_t>* in, std::vector<TokenId>* out);
Status ReadName(std::string_view field, const flatbuffers::String* in, std::string* out);
Status ReadReuse(wire::Reuse in, std::optional<ReuseMode>* out);
using MissReasonVector = flatbuffers::Vector<flatbuffers::Offset<wire::MissReason>>;
Status ReadMissReasons(const MissReasonVector* in, std::vector<MissReason>* out);

// ---- writing ----

// Fields that are empty are left out of the frame.
flatbuffers::Offset<flatbuffers::String> WriteString(flatbuffers::FlatBufferBuilder& builder, std::string_view text);
flatbuffers::Offset<flatbuffers::Vector<std::int32_t>> WriteTokens(flatbuffers::FlatBufferBuilder& builder,
                                                                   const std::vector<TokenId>& ids);
wire::Reuse WriteReuse(std::optional<ReuseMode> mode);
Result<flatbuffers::Offset<MissReasonVector>> WriteMissReasons(flatbuffers::FlatBufferBuilder& builder,
                                                               const std::vector<MissReason>& reasons);

// The header and the finished buffer in one piece. InvalidArgument when they are more than a frame.
Result<Frame> MakeFrame(wire::FrameKind kind, std::uint64_t correlation, const flatbuffers::FlatBufferBuilder& builder);

}  // namespace kvshare::codec::internal

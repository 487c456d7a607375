// The record: a page of KV as it lies in a slot, and what of it is repeated in the index. docs/formats/cold-tier.md
// gives every byte. Both decoders take bytes that nobody vouches for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "agentd/tiers/cold_tier.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

inline constexpr std::size_t kRecordAlign = 4096;  // of slots, payloads and buffers: what O_DIRECT asks for anywhere
inline constexpr std::size_t kRecordHeaderBytes = kRecordAlign;
inline constexpr std::size_t kMaxPageTokens = 64;
inline constexpr std::size_t kMaxLabelBytes = 128;  // of source and session

inline constexpr std::size_t PayloadBytes(std::size_t page_bytes) {
  return (page_bytes + kRecordAlign - 1) / kRecordAlign * kRecordAlign;
}
inline constexpr std::size_t SlotBytes(std::size_t page_bytes) { return kRecordHeaderBytes + PayloadBytes(page_bytes); }

// A fast checksum against rot, not against an enemy (XXH3-128).
struct Checksum {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
  bool operator==(const Checksum&) const = default;
};
Checksum ChecksumOf(std::span<const std::byte> bytes);
// Copies `from` to the beginning of `to`, fills the rest with zeros, and returns the checksum of all of `to`: one pass
// over memory, where copying first and summing later would be two.
Checksum CopyAndSum(std::span<const std::byte> from, std::span<std::byte> to);

struct RecordHeader {
  std::uint64_t generation = 0;  // of all records ever written here, this one: an index entry means exactly one
  std::uint64_t page_bytes = 0;
  Digest space;
  ColdPage page;
  Checksum payload;  // of the payload with its padding
};

// Fills `header` (kRecordHeaderBytes). Requires 1..64 tokens; labels are cut to kMaxLabelBytes.
void EncodeRecordHeader(const RecordHeader& record, std::span<std::byte> header);
// DataLoss unless `header` (kRecordHeaderBytes) is one that EncodeRecordHeader made, with the right context.
Result<RecordHeader> DecodeRecordHeader(std::span<const std::byte> header);

// The value of an index entry; its key is the page's context.
struct IndexValue {
  std::uint64_t slot = 0;
  std::uint64_t generation = 0;
  std::uint64_t last_used = 0;  // the tier's clock of uses; larger is later
  ColdPage page;
};
std::string EncodeIndexValue(const IndexValue& value);
// DataLoss unless `value` belongs to `key`.
Result<IndexValue> DecodeIndexValue(std::string_view key, std::string_view value);

inline std::string_view KeyOf(const Digest& context) {
  return {reinterpret_cast<const char*>(context.bytes.data()), context.bytes.size()};
}

}  // namespace kvshare::agentd

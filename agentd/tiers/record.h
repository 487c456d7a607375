// The record: a page of KV as it lies in a slot, and what of it is repeated in the index. docs/formats/cold-tier.md
// gives every byte. Both decoders take bytes that nobody vouches for.
#pragma once

#include <algorithm>
#include <array>
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

// A payload's parts: stretches of one size (the last may be shorter), each with a checksum of its own, so that a reader
// can use a model's first layers while the last are still being read. At least 256 KiB each: disks like large reads.
inline constexpr std::size_t kMaxPayloadParts = 8;
struct PayloadParts {
  std::size_t count = 1;
  std::size_t bytes = 0;  // of each but the last
};
inline constexpr PayloadParts PartsOf(std::size_t page_bytes) {
  constexpr std::size_t kLeastBytes = std::size_t{256} << 10;
  const std::size_t payload = PayloadBytes(page_bytes);
  const std::size_t wanted = std::clamp<std::size_t>(payload / kLeastBytes, 1, kMaxPayloadParts);
  const std::size_t bytes = PayloadBytes((payload + wanted - 1) / wanted);
  return {.count = (payload + bytes - 1) / bytes, .bytes = bytes};
}

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

using PartSums = std::array<Checksum, kMaxPayloadParts>;  // zero behind the last part
// Copies a page to `payload` (PayloadBytes) and sums its parts.
PartSums CopyAndSumParts(std::span<const std::byte> page, std::span<std::byte> payload);

struct RecordHeader {
  std::uint64_t generation = 0;  // of all records ever written here, this one: an index entry means exactly one
  std::uint64_t page_bytes = 0;
  Digest space;
  ColdPage page;
  PartSums parts;  // of the payload with its padding
};

// Fills `header` (kRecordHeaderBytes). Requires 1..64 tokens; labels are cut to kMaxLabelBytes, between characters.
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

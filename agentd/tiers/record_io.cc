#include "agentd/tiers/record_io.h"

#include <algorithm>
#include <cstring>

#include "agentd/tiers/aligned_buffer.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {

Status WriteRecord(SlabStore& slabs, std::uint64_t slot, const RecordHeader& header, std::span<std::byte> slot_image) {
  EncodeRecordHeader(header, slot_image.first(kRecordHeaderBytes));
  return slabs.Write(slot, slot_image);
}

Result<PartsRead> ReadParts(SlabStore& slabs, const WantedRecord& wanted, std::size_t first, std::size_t end,
                            std::span<std::byte> scratch, std::span<std::byte> destination) {
  const PayloadParts parts = PartsOf(destination.size());
  KVS_CHECK(first < end && end <= parts.count);
  const std::size_t begin = first * parts.bytes;
  const std::size_t padded = std::min(end * parts.bytes, PayloadBytes(destination.size())) - begin;
  const std::span<std::byte> place = destination.subspan(begin, std::min(padded, destination.size() - begin));
  const bool in_place = place.size() == padded && IsAligned(place.data());
  const std::span<std::byte> header = scratch.first(first == 0 ? kRecordHeaderBytes : 0);
  const std::span<std::byte> payload = in_place ? place : scratch.subspan(kRecordHeaderBytes, padded);
  const std::size_t offset = first == 0 ? 0 : kRecordHeaderBytes + begin;
  KVS_RETURN_IF_ERROR(slabs.Read(wanted.slot, offset, header, payload));
  PartsRead read;
  if (first == 0) {
    KVS_ASSIGN_OR_RETURN(read.header, DecodeRecordHeader(header));
    if (read.header->generation != wanted.generation || read.header->page.context != wanted.context ||
        read.header->space != wanted.space || read.header->page_bytes != destination.size()) {
      return DataLoss("a slot holds another record than the index says");
    }
  }
  for (std::size_t part = first; part < end; ++part) {
    const std::size_t at = (part - first) * parts.bytes;
    read.sums[part] = ChecksumOf(payload.subspan(at, std::min(parts.bytes, padded - at)));
  }
  if (!in_place) std::memcpy(place.data(), payload.data(), place.size());
  return read;
}

Status CheckPart(const RecordHeader& header, const PartSums& sums, std::size_t part) {
  if (sums[part] == header.parts[part]) return OkStatus();
  return DataLoss("a record's payload does not match its checksum");
}

Result<RecordHeader> ReadRecord(SlabStore& slabs, const WantedRecord& wanted, std::span<std::byte> scratch,
                                std::span<std::byte> destination) {
  const std::size_t parts = PartsOf(destination.size()).count;
  KVS_ASSIGN_OR_RETURN(PartsRead read, ReadParts(slabs, wanted, 0, parts, scratch, destination));
  for (std::size_t part = 0; part < parts; ++part) KVS_RETURN_IF_ERROR(CheckPart(*read.header, read.sums, part));
  return *std::move(read.header);
}

Result<RecordHeader> ReadRecordHeader(SlabStore& slabs, std::uint64_t slot, std::span<std::byte> scratch) {
  KVS_RETURN_IF_ERROR(slabs.Read(slot, 0, scratch.first(kRecordHeaderBytes), {}));
  return DecodeRecordHeader(scratch.first(kRecordHeaderBytes));
}

Status WipeRecord(SlabStore& slabs, std::uint64_t slot, std::span<std::byte> scratch) {
  const std::span<std::byte> header = scratch.first(kRecordHeaderBytes);
  std::fill(header.begin(), header.end(), std::byte{0});
  return slabs.Write(slot, header);
}

}  // namespace kvshare::agentd

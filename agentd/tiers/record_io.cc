#include "agentd/tiers/record_io.h"

#include <algorithm>
#include <cstring>

#include "agentd/tiers/aligned_buffer.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {

Status WriteRecord(SlabStore& slabs, std::uint64_t slot, const RecordHeader& header, std::span<std::byte> slot_image) {
  EncodeRecordHeader(header, slot_image.first(kRecordHeaderBytes));
  return slabs.Write(slot, slot_image);
}

Result<ColdPage> ReadRecord(SlabStore& slabs, const WantedRecord& wanted, std::span<std::byte> scratch,
                            std::span<std::byte> destination) {
  const bool in_place = destination.size() % kRecordAlign == 0 && IsAligned(destination.data());
  const std::span<std::byte> header_bytes = scratch.first(kRecordHeaderBytes);
  const std::span<std::byte> payload =
      in_place ? destination : scratch.subspan(kRecordHeaderBytes, PayloadBytes(destination.size()));
  KVS_RETURN_IF_ERROR(slabs.Read(wanted.slot, header_bytes, payload));
  KVS_ASSIGN_OR_RETURN(RecordHeader record, DecodeRecordHeader(header_bytes));
  if (record.generation != wanted.generation || record.page.context != wanted.context || record.space != wanted.space ||
      record.page_bytes != destination.size()) {
    return DataLoss("a slot holds another record than the index says");
  }
  if (ChecksumOf(payload) != record.payload) return DataLoss("a record's payload does not match its checksum");
  if (!in_place) std::memcpy(destination.data(), payload.data(), destination.size());
  return std::move(record.page);
}

Result<RecordHeader> ReadRecordHeader(SlabStore& slabs, std::uint64_t slot, std::span<std::byte> scratch) {
  KVS_RETURN_IF_ERROR(slabs.Read(slot, scratch.first(kRecordHeaderBytes), {}));
  return DecodeRecordHeader(scratch.first(kRecordHeaderBytes));
}

Status WipeRecord(SlabStore& slabs, std::uint64_t slot, std::span<std::byte> scratch) {
  const std::span<std::byte> header = scratch.first(kRecordHeaderBytes);
  std::fill(header.begin(), header.end(), std::byte{0});
  return slabs.Write(slot, header);
}

}  // namespace kvshare::agentd

// A record between a slot and memory: what is written can be verified, and nothing is given back unverified.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "agentd/tiers/record.h"
#include "agentd/tiers/slab_store.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

// Completes `slot_image` (slot_bytes) with the header and writes it. The payload with its padding is in place, and its
// checksums in `header`.
Status WriteRecord(SlabStore& slabs, std::uint64_t slot, const RecordHeader& header, std::span<std::byte> slot_image);

// Reads the record that an index entry means. `scratch`: slot_bytes, aligned. `destination`: page_bytes; aligned memory
// is read into directly. DataLoss when the slot holds anything else or is damaged, Unavailable when the disk fails;
// then the destination's content is undefined.
struct WantedRecord {
  Digest space;
  Digest context;
  std::uint64_t slot = 0;
  std::uint64_t generation = 0;
};
Result<RecordHeader> ReadRecord(SlabStore& slabs, const WantedRecord& wanted, std::span<std::byte> scratch,
                                std::span<std::byte> destination);

// Reads parts [first, end) of the same into their places in `destination`. Errors as above, but checksums of parts are
// the caller's to compare, who has the header when the first part was read.
struct PartsRead {
  std::optional<RecordHeader> header;  // with part 0: that of the record which is wanted
  PartSums sums;                       // of these parts
};
Result<PartsRead> ReadParts(SlabStore& slabs, const WantedRecord& wanted, std::size_t first, std::size_t end,
                            std::span<std::byte> scratch, std::span<std::byte> destination);
// DataLoss unless part `part` is what was written.
Status CheckPart(const RecordHeader& header, const PartSums& sums, std::size_t part);

// Reads only the header. DataLoss when there is none.
Result<RecordHeader> ReadRecordHeader(SlabStore& slabs, std::uint64_t slot, std::span<std::byte> scratch);

// What lies in the slot is no record any more. `scratch`: at least a header, aligned.
Status WipeRecord(SlabStore& slabs, std::uint64_t slot, std::span<std::byte> scratch);

}  // namespace kvshare::agentd

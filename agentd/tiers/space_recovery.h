// Opening a space: its slabs, its index and the directory made from it; from the slabs alone where the index is
// damaged.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "agentd/tiers/cold_directory.h"
#include "agentd/tiers/cold_index.h"
#include "agentd/tiers/slab_store.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

struct OpenSpaceResult {
  std::unique_ptr<SlabStore> slabs;
  std::unique_ptr<ColdIndex> index;
  ColdDirectory directory;
  std::vector<std::uint64_t> free_slots;  // the lowest last
  std::vector<Digest> useless;            // index entries that the directory does not have
  std::uint64_t next_generation = 1;      // larger than any in use
  std::int64_t integrity_errors = 0;
  std::int64_t index_rebuilds = 0;
  std::int64_t evictions = 0;  // entries beyond a quota that became smaller
};

// `max_slots`: slots beyond are given back to the disk with what they hold. Unavailable where the disk fails or is
// full.
Result<OpenSpaceResult> OpenSpace(const std::string& path, const Digest& space, std::size_t page_bytes,
                                  std::uint64_t max_slots);

// Under the space's directory: the index, the one being made, and the last one that was damaged, kept for whoever wants
// to know why.
inline constexpr char kIndexName[] = "/index";
inline constexpr char kNewIndexName[] = "/index.new";
inline constexpr char kDamagedIndexName[] = "/index.damaged";

}  // namespace kvshare::agentd

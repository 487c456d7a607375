#include "agentd/tiers/space_recovery.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <string_view>
#include <system_error>
#include <unordered_map>
#include <utility>

#include "agentd/tiers/aligned_buffer.h"
#include "agentd/tiers/fault_points.h"
#include "agentd/tiers/record.h"
#include "agentd/tiers/record_io.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {
namespace {

namespace fs = std::filesystem;

// Entries before they enter the directory: at most one per slot, the youngest.
class Claims {
 public:
  explicit Claims(OpenSpaceResult& space) : space_(space) {}

  void Add(IndexValue value) {
    space_.next_generation = std::max(space_.next_generation, value.generation + 1);
    const auto [place, is_new] = by_slot_.try_emplace(value.slot);
    if (!is_new && place->second.generation >= value.generation) {
      space_.useless.push_back(value.page.context);
      ++space_.integrity_errors;
      return;
    }
    if (!is_new) {
      space_.useless.push_back(place->second.page.context);
      ++space_.integrity_errors;
    }
    place->second = std::move(value);
  }

  // Oldest first, so that recency is that of the index; of two entries for the same tokens the longer or younger stays.
  void MoveIntoDirectory() {
    std::vector<IndexValue*> order;
    for (auto& [slot, value] : by_slot_) order.push_back(&value);
    std::sort(order.begin(), order.end(), [](const IndexValue* a, const IndexValue* b) {
      return std::pair(a->last_used, a->generation) < std::pair(b->last_used, b->generation);
    });
    for (IndexValue* value : order) {
      const Digest context = value->page.context;
      if (const DirectoryEntry* twin = space_.directory.Find(context); twin != nullptr) {
        if (twin->generation > value->generation) continue;
        space_.directory.Remove(context);
      } else if (space_.directory.Covers(value->page.parent, value->page.tokens)) {
        space_.useless.push_back(context);
        continue;
      }
      const auto superseded = space_.directory.Insert(std::move(value->page), value->slot, value->generation,
                                                      std::max<std::uint64_t>(value->last_used, 1));
      if (superseded != nullptr) space_.useless.push_back(superseded->page.context);
    }
  }

 private:
  OpenSpaceResult& space_;
  std::unordered_map<std::uint64_t, IndexValue> by_slot_;
};

// Visits every entry of the index. Entries that are not ours, or lie outside the slabs, are dropped and counted; those
// in slots from `max_slots` on are given back.
Status ReadIndex(OpenSpaceResult& space, std::uint64_t max_slots) {
  Claims claims(space);
  const Status status = space.index->ForEach([&](std::string_view key, std::string_view text) {
    auto value = DecodeIndexValue(key, text);
    const bool there = value.ok() && value->slot < space.slabs->slots();
    if (there && value->slot < max_slots) return claims.Add(std::move(*value));
    ++(there ? space.evictions : space.integrity_errors);
    if (key.size() != sizeof(Digest)) return;
    Digest context;
    std::copy(key.begin(), key.end(), context.bytes.begin());
    space.useless.push_back(context);
  });
  if (status.ok()) claims.MoveIntoDirectory();
  return status;
}

// The slabs' headers say what the index did; payloads are verified when they are read.
void ReadSlabs(OpenSpaceResult& space, const Digest& name, std::size_t page_bytes) {
  Claims claims(space);
  AlignedBuffer scratch(kRecordHeaderBytes);
  for (std::uint64_t slot = 0; slot < space.slabs->slots(); ++slot) {
    auto record = ReadRecordHeader(*space.slabs, slot, scratch.bytes());
    if (!record.ok() || record->space != name || record->page_bytes != page_bytes) continue;
    claims.Add({.slot = slot,
                .generation = record->generation,
                .last_used = record->generation,
                .page = std::move(record->page)});
  }
  claims.MoveIntoDirectory();
  space.useless.clear();  // the index that named them is gone
}

// An index of what the directory holds. It gets its name when it is complete: a process that dies on the way leaves
// the next one where it was itself.
Status MakeIndex(OpenSpaceResult& space, const std::string& path) {
  std::error_code error;
  fs::remove_all(path + kNewIndexName, error);
  {
    KVS_ASSIGN_OR_RETURN(const auto index, ColdIndex::Open(path + kNewIndexName, /*create=*/true));
    std::vector<IndexBatch> batches(1);
    space.directory.ForEach([&](const DirectoryEntry& entry) {
      const IndexValue value = {
          .slot = entry.slot, .generation = entry.generation, .last_used = entry.last_used, .page = entry.page};
      if (batches.back().puts.size() == 256) batches.emplace_back();
      batches.back().puts.emplace_back(entry.page.context, EncodeIndexValue(value));
    });
    for (const IndexBatch& batch : batches) KVS_RETURN_IF_ERROR(index->Apply(batch));
    KVS_RETURN_IF_ERROR(index->Sync());
  }
  FaultPoint("rebuild.before_move");
  fs::remove_all(path + kDamagedIndexName, error);
  fs::rename(path + kIndexName, path + kDamagedIndexName, error);
  FaultPoint("rebuild.between_moves");
  fs::remove_all(path + kIndexName, error);
  fs::rename(path + kNewIndexName, path + kIndexName, error);
  if (error) return Unavailable(path + kNewIndexName + ": cannot be renamed: " + error.message());
  KVS_ASSIGN_OR_RETURN(space.index, ColdIndex::Open(path + kIndexName, /*create=*/false));
  return OkStatus();
}

// The directory of a space that had no index, or a damaged one.
Status Rebuild(OpenSpaceResult& space, const std::string& path, const Digest& name, std::size_t page_bytes,
               const Status& why) {
  std::fprintf(stderr, "agentd: the cold tier's index is made anew from the slabs: %s\n", why.message().c_str());
  const std::int64_t errors = space.integrity_errors + 1;
  std::unique_ptr<SlabStore> slabs = std::move(space.slabs);
  space = OpenSpaceResult();
  space.slabs = std::move(slabs);
  space.integrity_errors = errors;
  space.index_rebuilds = 1;
  FaultPoint("rebuild.before_scan");
  ReadSlabs(space, name, page_bytes);
  const Status status = MakeIndex(space, path);
  return status.ok() ? status : Unavailable(status.message());
}

}  // namespace

Result<OpenSpaceResult> OpenSpace(const std::string& path, const Digest& space_name, std::size_t page_bytes,
                                  std::uint64_t max_slots) {
  std::error_code error;
  fs::create_directories(path, error);
  if (error) return Unavailable(path + ": cannot be made: " + error.message());
  OpenSpaceResult space;
  KVS_ASSIGN_OR_RETURN(space.slabs, SlabStore::Open(path, SlotBytes(page_bytes), max_slots));
  auto index = ColdIndex::Open(path + kIndexName, /*create=*/space.slabs->slots() == 0);
  Status status = index.status();
  // Nothing that making it anew would mend.
  if (status.code() == StatusCode::kResourceExhausted) return Unavailable(status.message());
  if (index.ok()) {
    space.index = std::move(*index);
    status = ReadIndex(space, max_slots);
  }
  if (space.slabs->slots() > max_slots) {
    // Entries first: one without a slot would look like damage to whoever opens this after a crash. A disk too full to
    // forget them gets its slots back all the same.
    FaultPoint("shrink.before_index");
    if (status.ok()) static_cast<void>(space.index->Apply({.deletes = space.useless, .puts = {}}));
    FaultPoint("shrink.after_index");
    KVS_RETURN_IF_ERROR(space.slabs->Shrink(max_slots));
    FaultPoint("shrink.after_slots");
  }
  if (!status.ok()) KVS_RETURN_IF_ERROR(Rebuild(space, path, space_name, page_bytes, status));

  std::vector<bool> taken(space.slabs->slots(), false);
  space.directory.ForEach([&](const DirectoryEntry& entry) {
    taken[entry.slot] = true;
    space.next_generation = std::max(space.next_generation, entry.generation + 1);
  });
  for (std::uint64_t slot = taken.size(); slot-- > 0;) {
    if (!taken[slot]) space.free_slots.push_back(slot);
  }
  return space;
}

}  // namespace kvshare::agentd

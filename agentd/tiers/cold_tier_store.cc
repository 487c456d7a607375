// The writing side of the cold tier: slots, publishing, eviction.
#include <algorithm>
#include <filesystem>
#include <system_error>
#include <utility>

#include "agentd/tiers/cold_tier_impl.h"
#include "agentd/tiers/fault_points.h"

namespace kvshare::agentd {
namespace {

constexpr std::size_t kBatchBytes = std::size_t{4} << 20;
constexpr std::size_t kBatchPages = 32;
constexpr std::int64_t kGrowBytes = std::int64_t{256} << 20;
constexpr auto kGrowthPause = std::chrono::seconds(10);  // after the disk or the quota said no

}  // namespace

void ColdTierImpl::WriteLoop() {
  while (true) {
    std::vector<StoreJob> jobs;
    bool drain = false;
    {
      std::unique_lock lock(mutex_);
      store_ready_.wait(lock, [this] { return stopping_ || drain_deletes_ || !store_queue_.empty(); });
      drain = std::exchange(drain_deletes_, false);
      if (store_queue_.empty() && !drain) return;  // stopping, and all that was accepted is written
      // A fair share of what waits, so that all threads write at once.
      const auto threads = static_cast<std::size_t>(options_.write_threads);
      const std::size_t share = (store_queue_.size() + threads - 1) / threads;
      const std::size_t count = std::min({share, kBatchPages, std::max<std::size_t>(1, kBatchBytes / slot_bytes_)});
      for (std::size_t i = 0; i < count && !store_queue_.empty(); ++i) {
        jobs.push_back(std::move(store_queue_.front()));
        store_queue_.pop_front();
      }
    }
    if (jobs.empty()) {
      DrainDeletes();
    } else {
      WriteBatch(std::move(jobs));
    }
  }
}

void ColdTierImpl::WriteBatch(std::vector<StoreJob> jobs) {
  const std::vector<std::uint64_t> slots = ReserveSlots(jobs.size());
  std::vector<std::pair<Digest, std::string>> puts;
  std::vector<std::uint64_t> unused, failed;
  Status failure = slots.size() < jobs.size() ? ResourceExhausted("no slot is free, and none can be freed") : Status();
  for (std::size_t i = 0; i < slots.size(); ++i) {
    StoreJob& job = jobs[i];
    {
      const std::lock_guard lock(mutex_);
      job.generation = next_generation_++;
      job.last_used = directory_.Tick();
    }
    const RecordHeader header = {.generation = job.generation,
                                 .page_bytes = options_.page_bytes,
                                 .space = options_.space,
                                 .page = job.page,
                                 .parts = job.parts};
    const Status written = WriteRecord(*slabs_, slots[i], header, job.image->bytes());
    FaultPoint("publish.after_payload");
    if (!written.ok()) {
      failure = written;
      failed.push_back(slots[i]);
      Degrade(written.message());
      continue;
    }
    job.slot = slots[i];
    puts.emplace_back(
        job.page.context,
        EncodeIndexValue(
            {.slot = slots[i], .generation = job.generation, .last_used = job.last_used, .page = job.page}));
  }
  // The directory must change in the order in which the index did.
  const std::lock_guard index_lock(index_mutex_);
  const bool indexed = !puts.empty() && UpdateIndex(std::move(puts));
  FaultPoint("publish.after_index");
  {
    const std::lock_guard lock(mutex_);
    for (StoreJob& job : jobs) {
      const bool cancelled = cancelled_.erase(job.page.context) > 0;
      pending_.erase(job.page.context);
      tickets_.erase(job.ticket);
      free_images_.push_back(std::move(job.image));
      if (!job.slot.has_value() || !indexed) {
        if (job.slot.has_value()) unused.push_back(*job.slot);
        ++totals_.dropped;
        ++failed_since_flush_;
        if (!failure.ok()) last_failure_ = failure.message();
        continue;
      }
      ++totals_.stores;
      totals_.written_bytes += static_cast<std::int64_t>(options_.page_bytes);
      // A longer page may have come first; then this one is of no use any more.
      if (cancelled || directory_.Covers(job.page.parent, job.page.tokens)) {
        deletes_.push_back({.context = job.page.context, .slot = job.slot, .wipe = cancelled});
        continue;
      }
      auto superseded = directory_.Insert(std::move(job.page), *job.slot, job.generation, job.last_used);
      if (superseded != nullptr) ScheduleDelete(std::move(superseded), /*wipe=*/false);
    }
    free_slots_.insert(free_slots_.end(), unused.begin(), unused.end());
    if (failure.code() != StatusCode::kResourceExhausted && failed.size() < slots.size()) {
      bad_slots_ += failed.size();  // only these places
    } else {
      free_slots_.insert(free_slots_.begin(), failed.begin(), failed.end());  // the last to be tried again
    }
    last_use_ = Clock::now();
    if (indexed) totals_.degraded.clear();
  }
  idle_.notify_all();
}

std::vector<std::uint64_t> ColdTierImpl::ReserveSlots(std::size_t count) {
  std::vector<std::uint64_t> slots;
  while (true) {
    {
      const std::lock_guard lock(mutex_);
      while (slots.size() < count && !free_slots_.empty()) {
        slots.push_back(free_slots_.back());
        free_slots_.pop_back();
      }
    }
    if (slots.size() == count) return slots;
    if (Grow()) continue;
    bool some = false;
    {
      const std::lock_guard lock(mutex_);
      // A few more than are wanted now: the index is updated once for all of them.
      const std::size_t ahead = std::min<std::size_t>(directory_.size() / 64, 64);
      for (std::size_t i = slots.size(); i < count + ahead; ++i) {
        auto entry = directory_.Evict();
        if (entry == nullptr) break;
        ++totals_.evictions;
        ScheduleDelete(std::move(entry), /*wipe=*/false);
      }
      some = !deletes_.empty();
    }
    if (!some) return slots;
    const std::lock_guard index_lock(index_mutex_);
    if (!UpdateIndex({})) return slots;
    FaultPoint("evict.after_index_delete");
  }
}

bool ColdTierImpl::Grow() {
  const std::lock_guard grow_lock(grow_mutex_);
  {
    const std::lock_guard lock(mutex_);
    if (!free_slots_.empty()) return true;  // another thread did
    if (Clock::now() < growth_blocked_until_) return false;
  }
  const auto slot_bytes = static_cast<std::int64_t>(slot_bytes_);
  while (true) {
    std::int64_t damaged_bytes = 0;
    {
      const std::lock_guard lock(mutex_);
      damaged_bytes = damaged_bytes_;
    }
    const std::int64_t others = foreign_->bytes() + damaged_bytes;
    const std::int64_t by_quota =
        static_cast<std::int64_t>(max_slots_ - slabs_->slots()) - (others + slot_bytes - 1) / slot_bytes;
    // Slots must leave the index the room it may come to need: it is written even when nothing grows any more.
    const std::int64_t index_growth = kIndexBaseBytes +
                                      static_cast<std::int64_t>(slabs_->slots()) * kIndexBytesPerSlot -
                                      DirectoryBytes(space_path_ + kIndexName);
    const std::int64_t by_disk =
        (FreeBytesBeyondReserve(options_.directory) - std::max<std::int64_t>(0, index_growth)) /
        (slot_bytes + kIndexBytesPerSlot);
    const std::int64_t step = std::max<std::int64_t>(1, std::min(kGrowBytes, options_.max_bytes / 8) / slot_bytes);
    const std::int64_t room = std::min({by_quota, by_disk, step});
    if (room > 0) {
      const std::uint64_t first = slabs_->slots();
      const auto added = slabs_->Grow(static_cast<std::uint64_t>(room));
      FaultPoint("grow.after_allocate");
      const std::lock_guard lock(mutex_);
      if (!added.ok()) {
        growth_blocked_until_ = Clock::now() + kGrowthPause;
        return false;
      }
      for (std::uint64_t slot = first + *added; slot-- > first;) free_slots_.push_back(slot);
      return true;
    }
    // Others' room first, our own pages' last. Within the quota of slots there is nothing that others could give back.
    if (slabs_->slots() < max_slots_ && DeleteOthers()) continue;
    const std::lock_guard lock(mutex_);
    growth_blocked_until_ = Clock::now() + kGrowthPause;
    return false;
  }
}

bool ColdTierImpl::DeleteOthers() {
  bool damaged = false;
  {
    const std::lock_guard lock(mutex_);
    damaged = std::exchange(damaged_bytes_, 0) > 0;
  }
  if (!damaged) return foreign_->DeleteOldest();
  std::error_code ignored;
  std::filesystem::remove_all(space_path_ + kDamagedIndexName, ignored);
  return true;
}

bool ColdTierImpl::UpdateIndex(std::vector<std::pair<Digest, std::string>> puts) {
  std::vector<Delete> due;
  bool was_degraded = false;
  {
    const std::lock_guard lock(mutex_);
    due = std::exchange(deletes_, {});
    was_degraded = !totals_.degraded.empty();
  }
  return ApplyToIndex(std::move(puts), std::move(due), was_degraded);
}

bool ColdTierImpl::ApplyToIndex(std::vector<std::pair<Digest, std::string>> puts, std::vector<Delete> due,
                                bool was_degraded) {
  IndexBatch batch;
  batch.puts = std::move(puts);
  for (const Delete& item : due) batch.deletes.push_back(item.context);
  if (batch.empty()) return true;
  if (was_degraded) index_->Resume();
  const Status status = DiskIsFull(options_.directory)
                            ? ResourceExhausted("the disk of " + options_.directory + " is full")
                            : index_->Apply(batch);
  if (!status.ok()) {
    Degrade(status.message());
    WipeDue(due);
    const std::lock_guard lock(mutex_);
    deletes_.insert(deletes_.begin(), due.begin(), due.end());
    return false;
  }
  FreeSlots(due);
  return true;
}

void ColdTierImpl::WipeDue(std::vector<Delete>& due) {
  std::vector<std::uint64_t> to_wipe;
  {
    const std::lock_guard lock(mutex_);
    for (Delete& item : due) {
      // Who reads a slot wipes it at last; its entry has left the directory, so nobody begins to.
      if (!item.wipe || !item.slot.has_value() || reading_.count(*item.slot) > 0) continue;
      to_wipe.push_back(*item.slot);
      item.wipe = false;
    }
  }
  Wipe(to_wipe);
}

void ColdTierImpl::FreeSlots(const std::vector<Delete>& deleted) {
  std::vector<std::uint64_t> to_wipe;
  {
    const std::lock_guard lock(mutex_);
    for (const Delete& item : deleted) {
      if (!item.slot.has_value()) continue;
      const auto reading = reading_.find(*item.slot);
      if (reading != reading_.end()) {
        reading->second.freed = item;
      } else if (item.wipe) {
        to_wipe.push_back(*item.slot);
      } else {
        free_slots_.push_back(*item.slot);
      }
    }
  }
  if (to_wipe.empty()) return;
  Wipe(to_wipe);
  const std::lock_guard lock(mutex_);
  free_slots_.insert(free_slots_.end(), to_wipe.begin(), to_wipe.end());
}

void ColdTierImpl::Wipe(const std::vector<std::uint64_t>& slots) {
  AlignedBuffer zeros(kRecordHeaderBytes);
  for (const std::uint64_t slot : slots) {
    const Status wiped = WipeRecord(*slabs_, slot, zeros.bytes());
    const std::lock_guard lock(mutex_);
    if (!wiped.ok()) last_failure_ = wiped.message();
  }
}

void ColdTierImpl::ScheduleDelete(std::unique_ptr<DirectoryEntry> entry, bool wipe) {
  deletes_.push_back({.context = entry->page.context, .slot = entry->slot, .wipe = wipe});
}

void ColdTierImpl::DrainDeletes() {
  const std::lock_guard index_lock(index_mutex_);
  static_cast<void>(UpdateIndex({}));
}

void ColdTierImpl::Degrade(const std::string& reason) {
  const std::lock_guard lock(mutex_);
  totals_.degraded = reason;
  last_failure_ = reason;
  retry_at_ = Clock::now() + std::chrono::seconds(1);
}

}  // namespace kvshare::agentd

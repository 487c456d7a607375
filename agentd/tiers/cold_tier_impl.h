// The cold tier's one implementation. Three files share this class: cold_tier.cc answers callers, cold_tier_store.cc
// has the writing threads (slots, publishing, eviction), cold_tier_load.cc the reading ones and background
// verification.
//
// Publishing a page, and making room for it:
//
//   Store: copy to a staging buffer ──► writer: take a slot (free │ grow │ evict) ──► write the record
//     ──► index entry (with the deletes that are due) ──► directory: the page can be found
//   evict, Remove, damage: leave the directory ──► index entry deleted ──► slot free (when nobody reads it any more)
//
// So at every moment an index entry names a slot that holds its record, or one whose generation gives the lie to it.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "agentd/tiers/aligned_buffer.h"
#include "agentd/tiers/cold_directory.h"
#include "agentd/tiers/cold_index.h"
#include "agentd/tiers/cold_tier.h"
#include "agentd/tiers/record_io.h"
#include "agentd/tiers/slab_store.h"
#include "agentd/tiers/space_directory.h"
#include "agentd/tiers/space_recovery.h"

namespace kvshare::agentd {

// What the index may take of the quota and of the disk: RocksDB's log and buffers, and an entry per slot, twice while
// it compacts.
inline constexpr std::int64_t kIndexBaseBytes = std::int64_t{6} << 20;
inline constexpr std::int64_t kIndexBytesPerSlot = 1024;

class ColdTierImpl final : public ColdTier {
 public:
  ColdTierImpl(const ColdTierOptions& options, std::string space_path, std::unique_ptr<DirectoryLock> lock,
               std::unique_ptr<ForeignSpaces> foreign, OpenSpaceResult space, std::uint64_t max_slots);
  ~ColdTierImpl() override;

  bool Contains(const Digest& context) const override;
  ColdTail FindTail(const Digest& parent, std::span<const TokenId> tokens) const override;
  Result<ColdEntry> Find(const Digest& context) const override;
  bool Store(const ColdPage& page, std::span<const std::byte> kv) override;
  bool CanStore() const override;
  void Load(std::vector<ColdLoad> pages, LoadDone done, PartsReady on_parts) override;
  int PartsFor(std::size_t bytes) const override;
  double EstimateLoadSeconds(std::size_t pages) const override;
  void Touch(const Digest& context) override;
  void Remove(const Digest& context) override;
  void Clear() override;
  Status Flush() override;
  ScrubReport Scrub() override;
  ColdTierStats stats() const override;
  void ForEach(std::int64_t limit, const std::function<void(const ColdEntry&)>& callback) const override;
  bool StoredUnderAnotherSpace(const Digest& content_chain) const override;
  Status CheckIntegrity() override;

 private:
  using Clock = std::chrono::steady_clock;

  struct StoreJob {
    ColdPage page;
    std::unique_ptr<AlignedBuffer> image;  // of a whole slot
    PartSums parts;
    std::uint64_t ticket = 0;
    std::optional<std::uint64_t> slot;  // once its record is written there
    std::uint64_t generation = 0;
    std::uint64_t last_used = 0;
  };
  // A page of a job, as far as it was read. Its parts may be read by several threads.
  struct PageRead {
    std::optional<WantedRecord> wanted;  // none: not stored
    std::optional<RecordHeader> header;
    PartSums sums;
    Status status;  // the first thing that was wrong
  };
  struct LoadJob {
    std::vector<ColdLoad> pages;
    LoadDone done;
    PartsReady on_parts;
    std::vector<PageRead> reads;    // by page
    std::vector<std::size_t> left;  // by part: the reads that lack it
    std::size_t parts_ready = 0;
    std::size_t remaining = 0;  // reads
    std::int64_t bytes = 0;
    Clock::time_point started;
  };
  // One read: parts [first, end) of a page. None: nothing of the job is stored, and only `done` is left to call.
  struct LoadItem {
    std::shared_ptr<LoadJob> job;
    std::size_t page = 0;
    std::size_t first = 0;
    std::size_t end = 0;
  };
  // An index entry that is due to be deleted; its slot becomes free after that.
  struct Delete {
    Digest context;
    std::optional<std::uint64_t> slot;
    bool wipe = false;  // still to be made unreadable: asked for by a user, so nothing may bring it back
  };
  struct Reading {
    int readers = 0;
    std::optional<Delete> freed;  // the last reader completes it
  };

  // cold_tier_store.cc
  void WriteLoop();
  void WriteBatch(std::vector<StoreJob> jobs);
  std::vector<std::uint64_t> ReserveSlots(std::size_t count);
  bool Grow();
  // Deletes the damaged index, or else the foreign space used least recently. False when there is neither.
  bool DeleteOthers();
  // Applies the deletes that are due together with `puts`. False when the index refuses; then they stay due.
  bool UpdateIndex(std::vector<std::pair<Digest, std::string>> puts);
  // The same with deletes that were taken before, which come before the puts: of what is in both, the put stays.
  bool ApplyToIndex(std::vector<std::pair<Digest, std::string>> puts, std::vector<Delete> due, bool was_degraded);
  void FreeSlots(const std::vector<Delete>& deleted);
  // What a user wants forgotten goes although the index cannot be told: its slot is there to be written.
  void WipeDue(std::vector<Delete>& due);
  Status ClearIndex();
  void Wipe(const std::vector<std::uint64_t>& slots);
  void ScheduleDelete(std::unique_ptr<DirectoryEntry> entry, bool wipe);  // mutex_ held
  void Degrade(const std::string& reason);
  bool Refuses() const;  // mutex_ held
  void DrainDeletes();

  // cold_tier_load.cc
  void ReadLoop();
  void ReadItem(const LoadItem& item, std::span<std::byte> scratch);
  // Notes what a read brought. Returns how many parts are ready now, 0 when that is nothing new.
  std::size_t EndItem(const LoadItem& item, Result<PartsRead> read);
  std::vector<ColdLoaded> EndJob(LoadJob& job);
  std::int64_t BytesOf(const LoadItem& item) const;
  WantedRecord PinForReading(const DirectoryEntry& entry);  // mutex_ held
  // The end of what PinForReading began; drops the entry when what was read was bad.
  void FinishReading(const WantedRecord& wanted, const Status& status);
  Status Verify(const Digest& context, std::span<std::byte> scratch, std::span<std::byte> payload);
  void BackgroundLoop();
  void ScrubSome(std::span<std::byte> scratch, std::span<std::byte> payload);
  void WriteRecency();
  std::vector<Digest> Contexts() const;
  ColdEntry Describe(const DirectoryEntry& entry) const;

  const ColdTierOptions options_;
  const std::string space_path_;
  const std::size_t slot_bytes_;
  const PayloadParts parts_;
  const std::uint64_t max_slots_;
  const std::unique_ptr<DirectoryLock> lock_;
  const std::unique_ptr<ForeignSpaces> foreign_;
  const std::unique_ptr<SlabStore> slabs_;
  const std::unique_ptr<ColdIndex> index_;

  // Taken in this order, never the other way round.
  std::mutex grow_mutex_;
  std::mutex index_mutex_;    // one writer of the index at a time: entries change there in the order they did here
  mutable std::mutex mutex_;  // everything below

  ColdDirectory directory_;
  std::vector<std::uint64_t> free_slots_;
  std::unordered_map<std::uint64_t, Reading> reading_;
  std::vector<Delete> deletes_;
  bool drain_deletes_ = false;   // a writer should look at deletes_ now
  std::uint64_t bad_slots_ = 0;  // the disk failed to read them: not used again before the next start
  std::uint64_t next_generation_;

  std::vector<std::unique_ptr<AlignedBuffer>> free_images_;
  std::deque<StoreJob> store_queue_;
  std::unordered_set<Digest, DigestHash> pending_;    // accepted, not published
  std::unordered_set<Digest, DigestHash> cancelled_;  // of these, removed meanwhile
  std::set<std::uint64_t> tickets_;                   // of accepted stores that are not finished
  std::uint64_t next_ticket_ = 0;
  std::deque<LoadItem> load_queue_;
  std::int64_t loads_ = 0;  // jobs whose `done` has not returned
  std::int64_t waiting_load_bytes_ = 0;
  bool clearing_ = false;
  bool stopping_ = false;  // no new work
  bool background_stop_ = false;
  Clock::time_point growth_blocked_until_{};
  Clock::time_point retry_at_{};
  Clock::time_point last_load_end_{};
  Clock::time_point last_use_{};  // of the disk by anybody but the scrubber
  double load_bytes_ = 0;         // decaying sums of recent loads
  double load_seconds_ = 0;
  std::int64_t failed_since_flush_ = 0;
  std::string last_failure_;
  std::int64_t index_bytes_ = 0;    // as last measured
  std::int64_t damaged_bytes_ = 0;  // of the index that was moved aside
  ColdTierStats totals_;
  std::vector<Digest> scrub_list_;  // the background thread's own

  std::condition_variable store_ready_, load_ready_, idle_, background_wake_;
  std::vector<std::thread> writers_, readers_;
  std::thread background_;
};

}  // namespace kvshare::agentd

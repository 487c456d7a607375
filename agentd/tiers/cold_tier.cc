#include "agentd/tiers/cold_tier.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "agentd/tiers/cold_tier_impl.h"
#include "agentd/tiers/fault_points.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {
namespace {

constexpr std::int64_t kMinSlots = 4;
constexpr std::size_t kMaxPageBytes = std::size_t{256} << 20;

}  // namespace

std::int64_t ColdTier::LeastBytes(std::size_t page_bytes) {
  return kIndexBaseBytes + kMinSlots * (static_cast<std::int64_t>(SlotBytes(page_bytes)) + kIndexBytesPerSlot);
}

Result<std::unique_ptr<ColdTier>> ColdTier::Open(const ColdTierOptions& options) {
  if (options.page_bytes < 1 || options.page_bytes > kMaxPageBytes) {
    return InvalidArgument("the cold tier's page size must be 1 byte to 256 MiB");
  }
  if (options.read_threads < 1 || options.write_threads < 1) {
    return InvalidArgument("the cold tier needs at least one thread to read and one to write");
  }
  if (const std::int64_t least = LeastBytes(options.page_bytes); options.max_bytes < least) {
    return InvalidArgument("a cold tier of " + std::to_string(options.max_bytes) + " bytes is too small: at least " +
                           std::to_string(least) + " for pages of " + std::to_string(options.page_bytes));
  }
  const auto slot_bytes = static_cast<std::int64_t>(SlotBytes(options.page_bytes));
  const std::int64_t slots = (options.max_bytes - kIndexBaseBytes) / (slot_bytes + kIndexBytesPerSlot);
  KVS_ASSIGN_OR_RETURN(auto lock, DirectoryLock::Take(options.directory));
  const std::string name = SpaceDirectoryName(options.space, options.page_bytes);
  const std::string path = options.directory + "/" + name;
  KVS_ASSIGN_OR_RETURN(auto space,
                       OpenSpace(path, options.space, options.page_bytes, static_cast<std::uint64_t>(slots)));
  MarkUsed(path);
  auto foreign = std::make_unique<ForeignSpaces>(options.directory, name);
  return std::unique_ptr<ColdTier>(std::make_unique<ColdTierImpl>(options, path, std::move(lock), std::move(foreign),
                                                                  std::move(space), static_cast<std::uint64_t>(slots)));
}

ColdTierImpl::ColdTierImpl(const ColdTierOptions& options, std::string space_path, std::unique_ptr<DirectoryLock> lock,
                           std::unique_ptr<ForeignSpaces> foreign, OpenSpaceResult space, std::uint64_t max_slots)
    : options_(options),
      space_path_(std::move(space_path)),
      slot_bytes_(SlotBytes(options.page_bytes)),
      parts_(PartsOf(options.page_bytes)),
      max_slots_(max_slots),
      lock_(std::move(lock)),
      foreign_(std::move(foreign)),
      slabs_(std::move(space.slabs)),
      index_(std::move(space.index)),
      directory_(std::move(space.directory)),
      free_slots_(std::move(space.free_slots)),
      next_generation_(space.next_generation) {
  totals_.integrity_errors = space.integrity_errors;
  totals_.index_rebuilds = space.index_rebuilds;
  totals_.evictions = space.evictions;
  totals_.capacity_bytes = options.max_bytes;
  index_bytes_ = DirectoryBytes(space_path_ + kIndexName);
  damaged_bytes_ = DirectoryBytes(space_path_ + kDamagedIndexName);
  // A quota that became smaller.
  while (slabs_->allocated_bytes() + index_bytes_ + damaged_bytes_ + foreign_->bytes() > options.max_bytes) {
    if (!DeleteOthers()) break;
  }
  for (const Digest& context : space.useless) deletes_.push_back({.context = context});
  drain_deletes_ = !deletes_.empty();
  // Enough to keep every writing thread busy while others fill up, not more than the memory is worth.
  const std::size_t at_least = static_cast<std::size_t>(options.write_threads) * 2;
  const auto staging_bytes = static_cast<std::size_t>(std::max<std::int64_t>(0, options.staging_bytes));
  const std::size_t images = std::clamp<std::size_t>(staging_bytes / slot_bytes_, at_least, 1024);
  for (std::size_t i = 0; i < images; ++i) free_images_.push_back(std::make_unique<AlignedBuffer>(slot_bytes_));
  for (int i = 0; i < options.write_threads; ++i) writers_.emplace_back([this] { WriteLoop(); });
  for (int i = 0; i < options.read_threads; ++i) readers_.emplace_back([this] { ReadLoop(); });
  background_ = std::thread([this] { BackgroundLoop(); });
}

ColdTierImpl::~ColdTierImpl() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    background_stop_ = true;
  }
  background_wake_.notify_all();
  background_.join();
  store_ready_.notify_all();
  load_ready_.notify_all();
  for (std::thread& thread : readers_) thread.join();
  for (std::thread& thread : writers_) thread.join();
  DrainDeletes();
  WriteRecency();
  MarkUsed(space_path_);
}

bool ColdTierImpl::Contains(const Digest& context) const {
  const std::lock_guard lock(mutex_);
  return directory_.Find(context) != nullptr;
}

ColdTail ColdTierImpl::FindTail(const Digest& parent, std::span<const TokenId> tokens) const {
  const std::lock_guard lock(mutex_);
  return directory_.FindTail(parent, tokens);
}

Result<ColdEntry> ColdTierImpl::Find(const Digest& context) const {
  const std::lock_guard lock(mutex_);
  const DirectoryEntry* const entry = directory_.Find(context);
  if (entry == nullptr) return NotFound("the cold tier does not hold " + context.Hex());
  return Describe(*entry);
}

ColdEntry ColdTierImpl::Describe(const DirectoryEntry& entry) const {
  const auto idle = std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - entry.used_at);
  return {
      .page = entry.page, .bytes = static_cast<std::int64_t>(slot_bytes_), .hits = entry.hits, .idle_ms = idle.count()};
}

bool ColdTierImpl::Store(const ColdPage& page, std::span<const std::byte> kv) {
  KVS_CHECK(kv.size() == options_.page_bytes);
  KVS_CHECK(!page.tokens.empty() && page.tokens.size() <= kMaxPageTokens);
  KVS_CHECK(ChainContext(page.parent, page.tokens) == page.context);
  StoreJob job;
  {
    const std::lock_guard lock(mutex_);
    if (pending_.count(page.context) > 0 && cancelled_.count(page.context) == 0) return true;
    if (directory_.Covers(page.parent, page.tokens)) return true;
    if (Refuses() || free_images_.empty() || pending_.count(page.context) > 0) {
      ++totals_.dropped;
      return false;
    }
    // While the tier is degraded, one page a second finds out whether it still is.
    if (!totals_.degraded.empty()) retry_at_ = Clock::now() + std::chrono::seconds(1);
    job.image = std::move(free_images_.back());
    free_images_.pop_back();
    job.ticket = next_ticket_++;
    tickets_.insert(job.ticket);
    pending_.insert(page.context);
    last_use_ = Clock::now();
  }
  job.page = page;
  job.parts = CopyAndSumParts(kv, job.image->bytes().subspan(kRecordHeaderBytes));
  FaultPoint("demote.before_payload");
  {
    const std::lock_guard lock(mutex_);
    store_queue_.push_back(std::move(job));
  }
  store_ready_.notify_one();
  return true;
}

bool ColdTierImpl::CanStore() const {
  const std::lock_guard lock(mutex_);
  return !Refuses() && !free_images_.empty();
}

bool ColdTierImpl::Refuses() const {
  return clearing_ || stopping_ || (!totals_.degraded.empty() && Clock::now() < retry_at_);
}

void ColdTierImpl::Touch(const Digest& context) {
  const std::lock_guard lock(mutex_);
  directory_.Use(context, /*hit=*/false);
}

void ColdTierImpl::Remove(const Digest& context) {
  {
    const std::lock_guard lock(mutex_);
    if (pending_.count(context) > 0) cancelled_.insert(context);
    auto entry = directory_.Remove(context);
    if (entry == nullptr) return;
    ScheduleDelete(std::move(entry), /*wipe=*/true);
    drain_deletes_ = true;
  }
  store_ready_.notify_one();
}

void ColdTierImpl::Clear() {
  {
    std::unique_lock lock(mutex_);
    idle_.wait(lock, [this] { return !clearing_; });
    clearing_ = true;
    idle_.wait(lock, [this] { return tickets_.empty() && loads_ == 0 && reading_.empty(); });
  }
  while (foreign_->DeleteOldest()) {
  }
  {
    const std::lock_guard index_lock(index_mutex_);
    const Status cleared = ClearIndex();
    FaultPoint("clear.after_index");
    const Status deleted = slabs_->DeleteAll();
    const std::lock_guard lock(mutex_);
    deletes_.clear();
    if (!cleared.ok()) {
      // What its entries name is gone; they follow when the index takes anything again.
      directory_.ForEach([&](const DirectoryEntry& entry) { deletes_.push_back({.context = entry.page.context}); });
    }
    directory_.Clear();
    free_slots_.clear();
    bad_slots_ = 0;
    // Slots that could not be given back to the disk are free, at least.
    for (std::uint64_t slot = slabs_->slots(); slot-- > 0;) free_slots_.push_back(slot);
    growth_blocked_until_ = {};
    if (!deleted.ok()) last_failure_ = deleted.message();
    clearing_ = false;
  }
  idle_.notify_all();
}

Status ColdTierImpl::ClearIndex() {
  bool was_degraded = false;
  {
    const std::lock_guard lock(mutex_);
    was_degraded = !totals_.degraded.empty();
  }
  if (was_degraded) index_->Resume();
  const Status status = DiskIsFull(options_.directory)
                            ? ResourceExhausted("the disk of " + options_.directory + " is full")
                            : index_->Clear();
  if (!status.ok()) Degrade(status.message());
  return status;
}

Status ColdTierImpl::Flush() {
  std::int64_t failed = 0;
  std::string why;
  {
    std::unique_lock lock(mutex_);
    const std::uint64_t end = next_ticket_;
    idle_.wait(lock, [&] { return tickets_.empty() || *tickets_.begin() >= end; });
    failed = std::exchange(failed_since_flush_, 0);
    why = last_failure_;
  }
  const std::lock_guard index_lock(index_mutex_);
  static_cast<void>(UpdateIndex({}));
  {
    // After a failed write RocksDB's log takes no more calls (Debian's build even asserts so) until one succeeds.
    const std::lock_guard lock(mutex_);
    if (!totals_.degraded.empty()) return ResourceExhausted("the cold tier only reads: " + totals_.degraded);
  }
  KVS_RETURN_IF_ERROR(slabs_->Sync());
  KVS_RETURN_IF_ERROR(index_->Sync());
  if (failed > 0) return ResourceExhausted(std::to_string(failed) + " pages could not be stored: " + why);
  return OkStatus();
}

ColdTierStats ColdTierImpl::stats() const {
  const std::int64_t foreign_bytes = foreign_->bytes();
  const std::lock_guard lock(mutex_);
  ColdTierStats stats = totals_;
  stats.entries = static_cast<std::int64_t>(directory_.size());
  stats.bytes = stats.entries * static_cast<std::int64_t>(slot_bytes_);
  stats.disk_bytes = slabs_->allocated_bytes() + index_bytes_ + damaged_bytes_ + foreign_bytes;
  stats.pending = static_cast<std::int64_t>(tickets_.size());
  stats.read_bytes_per_second = load_seconds_ > 0 ? load_bytes_ / load_seconds_ : 0;
  return stats;
}

double ColdTierImpl::EstimateLoadSeconds(std::size_t pages) const {
  // Before the first load: what a modest disk does. A wrong guess is right after one load.
  constexpr double kAssumedBytesPerSecond = 1e9;
  const std::lock_guard lock(mutex_);
  const double rate = load_seconds_ > 0 ? load_bytes_ / load_seconds_ : kAssumedBytesPerSecond;
  return (static_cast<double>(waiting_load_bytes_) + static_cast<double>(pages) * static_cast<double>(slot_bytes_)) /
         rate;
}

void ColdTierImpl::ForEach(std::int64_t limit, const std::function<void(const ColdEntry&)>& callback) const {
  std::vector<ColdEntry> entries;
  {
    const std::lock_guard lock(mutex_);
    for (const DirectoryEntry* entry :
         directory_.ByRecency(static_cast<std::size_t>(std::max<std::int64_t>(limit, 0)))) {
      entries.push_back(Describe(*entry));
    }
  }
  for (const ColdEntry& entry : entries) callback(entry);
}

bool ColdTierImpl::StoredUnderAnotherSpace(const Digest& content_chain) const { return foreign_->Holds(content_chain); }

Status ColdTierImpl::CheckIntegrity() {
  while (true) {
    {
      std::unique_lock lock(mutex_);
      idle_.wait(lock, [this] { return tickets_.empty() && reading_.empty() && !clearing_; });
    }
    const std::lock_guard index_lock(index_mutex_);
    const std::lock_guard lock(mutex_);
    if (!tickets_.empty() || !reading_.empty() || clearing_) continue;

    KVS_RETURN_IF_ERROR(directory_.CheckIntegrity());
    if (!pending_.empty() || !cancelled_.empty()) return Internal("stores are pending that nobody waits for");
    std::vector<int> owners(slabs_->slots(), 0);
    Status status;
    const auto own = [&](std::uint64_t slot, const char* who) {
      if (slot >= owners.size()) {
        status = Internal(std::string(who) + " lies outside the slabs");
      } else if (++owners[slot] > 1) {
        status = Internal(std::string(who) + " lies in a slot that has another owner");
      }
    };
    directory_.ForEach([&](const DirectoryEntry& entry) { own(entry.slot, "an entry"); });
    for (const std::uint64_t slot : free_slots_) own(slot, "free space");
    std::unordered_set<Digest, DigestHash> due;
    for (const Delete& item : deletes_) {
      if (item.slot.has_value()) own(*item.slot, "a delete");
      due.insert(item.context);
    }
    KVS_RETURN_IF_ERROR(status);
    const auto owned = std::count(owners.begin(), owners.end(), 1);
    if (static_cast<std::uint64_t>(owned) + bad_slots_ != owners.size()) return Internal("slots without an owner");

    std::size_t indexed = 0;
    KVS_RETURN_IF_ERROR(index_->ForEach([&](std::string_view key, std::string_view text) {
      const auto value = DecodeIndexValue(key, text);
      if (!value.ok()) {
        status = value.status();
        return;
      }
      const DirectoryEntry* const entry = directory_.Find(value->page.context);
      if (entry != nullptr && entry->slot == value->slot && entry->generation == value->generation) {
        ++indexed;
      } else if (due.count(value->page.context) == 0) {
        status = Internal("the index has an entry that the directory does not have");
      }
    }));
    KVS_RETURN_IF_ERROR(status);
    if (indexed != directory_.size()) return Internal("the directory has entries that the index does not have");
    return OkStatus();
  }
}

}  // namespace kvshare::agentd

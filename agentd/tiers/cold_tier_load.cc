// The reading side of the cold tier: loads, and verification in the background.
#include <algorithm>
#include <utility>

#include "agentd/tiers/cold_tier_impl.h"
#include "agentd/tiers/fault_points.h"

namespace kvshare::agentd {
namespace {

constexpr auto kTick = std::chrono::milliseconds(1000);
constexpr auto kIdle = std::chrono::seconds(1);       // of everybody else, before the scrubber reads
constexpr auto kScrubPause = std::chrono::hours(12);  // between two passes over everything
constexpr double kDecay = 0.8;                        // of what recent loads weigh, per load

}  // namespace

void ColdTierImpl::Load(std::vector<ColdLoad> pages, LoadDone done, PartsReady on_parts) {
  auto job = std::make_shared<LoadJob>();
  job->reads.resize(pages.size());
  job->pages = std::move(pages);
  job->done = std::move(done);
  job->on_parts = std::move(on_parts);
  job->started = Clock::now();
  {
    const std::lock_guard lock(mutex_);
    ++loads_;
    last_use_ = job->started;
    std::size_t stored = 0;
    for (std::size_t i = 0; i < job->pages.size(); ++i) {
      const ColdLoad& page = job->pages[i];
      KVS_CHECK(page.destination.size() == options_.page_bytes);
      const DirectoryEntry* const entry = clearing_ ? nullptr : directory_.Find(page.context);
      if (entry == nullptr) {
        job->reads[i].status = NotFound("the cold tier does not hold " + page.context.Hex());
        continue;
      }
      job->reads[i].wanted = PinForReading(*entry);
      ++stored;
    }
    job->left.assign(parts_.count, stored);
    const std::size_t step = job->on_parts ? 1 : parts_.count;
    for (std::size_t part = 0; part < parts_.count; part += step) {
      for (std::size_t i = 0; i < job->pages.size(); ++i) {
        if (!job->reads[i].wanted.has_value()) continue;
        load_queue_.push_back({job, i, part, part + step});
        ++job->remaining;
      }
    }
    job->bytes = static_cast<std::int64_t>(stored * slot_bytes_);
    waiting_load_bytes_ += job->bytes;
    if (stored == 0) {
      job->remaining = 1;
      load_queue_.push_back({job});
    }
  }
  load_ready_.notify_all();
}

int ColdTierImpl::PartsFor(std::size_t bytes) const {
  return static_cast<int>((bytes + parts_.bytes - 1) / parts_.bytes);
}

WantedRecord ColdTierImpl::PinForReading(const DirectoryEntry& entry) {
  directory_.Pin(entry.page.context);
  ++reading_[entry.slot].readers;
  return {.space = options_.space, .context = entry.page.context, .slot = entry.slot, .generation = entry.generation};
}

void ColdTierImpl::ReadLoop() {
  AlignedBuffer scratch(slot_bytes_);
  while (true) {
    LoadItem item;
    {
      std::unique_lock lock(mutex_);
      load_ready_.wait(lock, [this] { return stopping_ || !load_queue_.empty(); });
      if (load_queue_.empty()) return;
      item = std::move(load_queue_.front());
      load_queue_.pop_front();
    }
    ReadItem(item, scratch.bytes());
  }
}

std::int64_t ColdTierImpl::BytesOf(const LoadItem& item) const {
  const std::size_t payload = slot_bytes_ - kRecordHeaderBytes;
  const std::size_t bytes = std::min(item.end * parts_.bytes, payload) - std::min(item.first * parts_.bytes, payload);
  return static_cast<std::int64_t>(item.first == 0 && item.end > 0 ? bytes + kRecordHeaderBytes : bytes);
}

void ColdTierImpl::ReadItem(const LoadItem& item, std::span<std::byte> scratch) {
  LoadJob& job = *item.job;
  if (item.end > 0) {
    FaultPoint("promote.before_read");
    auto read = ReadParts(*slabs_, *job.reads[item.page].wanted, item.first, item.end, scratch,
                          job.pages[item.page].destination);
    FaultPoint("promote.after_read");
    if (const std::size_t ready = EndItem(item, std::move(read)); ready > 0 && job.on_parts) {
      job.on_parts(static_cast<int>(ready));
    }
  }
  {
    const std::lock_guard lock(mutex_);
    if (--job.remaining > 0) return;
    const auto now = Clock::now();
    // Loads overlap: the time since the last one ended is what this one added.
    const std::chrono::duration<double> took = now - std::max(job.started, last_load_end_);
    if (job.bytes > 0) {
      load_bytes_ = load_bytes_ * kDecay + static_cast<double>(job.bytes);
      load_seconds_ = load_seconds_ * kDecay + std::max(took.count(), 1e-6);
      last_load_end_ = now;
    }
    last_use_ = now;
  }
  job.done(EndJob(job));
  {
    const std::lock_guard lock(mutex_);
    --loads_;
  }
  idle_.notify_all();
}

std::size_t ColdTierImpl::EndItem(const LoadItem& item, Result<PartsRead> read) {
  LoadJob& job = *item.job;
  const std::lock_guard lock(mutex_);
  waiting_load_bytes_ -= BytesOf(item);
  PageRead& page = job.reads[item.page];
  if (read.ok()) {
    if (read->header.has_value()) page.header = std::move(read->header);
    std::copy(read->sums.begin() + static_cast<std::ptrdiff_t>(item.first),
              read->sums.begin() + static_cast<std::ptrdiff_t>(item.end),
              page.sums.begin() + static_cast<std::ptrdiff_t>(item.first));
  } else if (page.status.ok()) {
    page.status = read.status();
  }
  for (std::size_t part = item.first; part < item.end; ++part) --job.left[part];
  const std::size_t before = job.parts_ready;
  for (; job.parts_ready < parts_.count && job.left[job.parts_ready] == 0; ++job.parts_ready) {
    for (PageRead& each : job.reads) {
      if (each.status.ok()) each.status = CheckPart(*each.header, each.sums, job.parts_ready);
    }
  }
  const bool good = std::all_of(job.reads.begin(), job.reads.end(), [](const PageRead& r) { return r.status.ok(); });
  return good && job.parts_ready > before ? job.parts_ready : 0;
}

std::vector<ColdLoaded> ColdTierImpl::EndJob(LoadJob& job) {
  std::vector<ColdLoaded> loaded(job.reads.size());
  for (std::size_t i = 0; i < loaded.size(); ++i) {
    PageRead& read = job.reads[i];
    if (read.wanted.has_value()) FinishReading(*read.wanted, read.status);
    loaded[i].status = read.status;
    if (read.status.ok()) loaded[i].page = std::move(read.header->page);
    const std::lock_guard lock(mutex_);
    if (read.status.ok()) {
      ++totals_.hits;
      totals_.read_bytes += static_cast<std::int64_t>(options_.page_bytes);
      directory_.Use(read.wanted->context, /*hit=*/true);
    } else {
      ++totals_.misses;
    }
  }
  return loaded;
}

void ColdTierImpl::FinishReading(const WantedRecord& wanted, const Status& status) {
  std::optional<Delete> freed;
  {
    const std::lock_guard lock(mutex_);
    const DirectoryEntry* const entry = directory_.Find(wanted.context);
    const bool still_there = entry != nullptr && entry->generation == wanted.generation;
    if (still_there) directory_.Unpin(wanted.context);
    if (status.code() == StatusCode::kDataLoss && still_there) {
      ++totals_.integrity_errors;
      ScheduleDelete(directory_.Remove(wanted.context), /*wipe=*/true);
      drain_deletes_ = true;
    } else if (!status.ok() && still_there) {
      // The disk cannot read this place; it will not be written either.
      ++bad_slots_;
      deletes_.push_back({.context = directory_.Remove(wanted.context)->page.context});
      drain_deletes_ = true;
    }
    Reading& reading = reading_[wanted.slot];
    if (--reading.readers == 0) {
      freed = reading.freed;
      if (!freed.has_value()) reading_.erase(wanted.slot);
    }
  }
  if (freed.has_value()) {  // it stays in reading_, and so has an owner, until it is free
    if (freed->wipe) Wipe({wanted.slot});
    const std::lock_guard lock(mutex_);
    reading_.erase(wanted.slot);
    free_slots_.push_back(wanted.slot);
  }
  if (!status.ok()) store_ready_.notify_one();
  idle_.notify_all();
}

std::vector<Digest> ColdTierImpl::Contexts() const {
  std::vector<Digest> contexts;
  const std::lock_guard lock(mutex_);
  directory_.ForEach([&](const DirectoryEntry& entry) { contexts.push_back(entry.page.context); });
  return contexts;
}

// NotFound when the entry is gone.
Status ColdTierImpl::Verify(const Digest& context, std::span<std::byte> scratch, std::span<std::byte> payload) {
  std::optional<WantedRecord> wanted;
  {
    const std::lock_guard lock(mutex_);
    const DirectoryEntry* const entry = clearing_ ? nullptr : directory_.Find(context);
    if (entry == nullptr) return NotFound("gone");
    wanted = PinForReading(*entry);
  }
  const Status status = ReadRecord(*slabs_, *wanted, scratch, payload).status();
  FinishReading(*wanted, status);
  return status;
}

ScrubReport ColdTierImpl::Scrub() {
  ScrubReport report;
  AlignedBuffer scratch(slot_bytes_), payload(PayloadBytes(options_.page_bytes));
  for (const Digest& context : Contexts()) {
    const Status status = Verify(context, scratch.bytes(), payload.bytes().first(options_.page_bytes));
    if (status.code() == StatusCode::kNotFound) continue;
    ++report.checked;
    report.bytes += static_cast<std::int64_t>(slot_bytes_);
    if (!status.ok()) ++report.damaged;
  }
  return report;
}

void ColdTierImpl::BackgroundLoop() {
  AlignedBuffer scratch(slot_bytes_), payload(PayloadBytes(options_.page_bytes));
  const auto page = payload.bytes().first(options_.page_bytes);
  auto next_scrub = Clock::now() + kIdle, next_recency = Clock::now() + options_.recency_period;
  const auto tick = std::min(kTick, options_.recency_period);
  while (true) {
    bool idle = false;
    {
      std::unique_lock lock(mutex_);
      if (background_wake_.wait_for(lock, tick, [this] { return background_stop_; })) return;
      idle = tickets_.empty() && loads_ == 0 && Clock::now() - last_use_ >= kIdle;
      // What the index refused is tried again.
      if (!deletes_.empty()) drain_deletes_ = true;
    }
    store_ready_.notify_one();
    const std::int64_t index_bytes = DirectoryBytes(space_path_ + kIndexName);
    {
      const std::lock_guard lock(mutex_);
      index_bytes_ = index_bytes;
    }
    const auto now = Clock::now();
    if (now >= next_recency) {
      WriteRecency();
      next_recency = now + options_.recency_period;
    }
    if (!idle || options_.scrub_bytes_per_second <= 0 || (scrub_list_.empty() && now < next_scrub)) continue;
    if (scrub_list_.empty()) {
      scrub_list_ = Contexts();
      next_scrub = now + kScrubPause;
    }
    ScrubSome(scratch.bytes(), page);
  }
}

// One tick's worth.
void ColdTierImpl::ScrubSome(std::span<std::byte> scratch, std::span<std::byte> payload) {
  const std::int64_t pages =
      std::max<std::int64_t>(1, options_.scrub_bytes_per_second / static_cast<std::int64_t>(slot_bytes_));
  for (std::int64_t i = 0; i < pages && !scrub_list_.empty(); ++i) {
    static_cast<void>(Verify(scrub_list_.back(), scratch, payload));
    scrub_list_.pop_back();
    const std::lock_guard lock(mutex_);
    if (background_stop_ || !tickets_.empty() || loads_ > 0) return;
  }
}

void ColdTierImpl::WriteRecency() {
  const std::lock_guard index_lock(index_mutex_);
  std::vector<std::pair<Digest, std::string>> puts;
  {
    const std::lock_guard lock(mutex_);
    if (!totals_.degraded.empty()) return;
    for (const DirectoryEntry* entry : directory_.TakeMoved()) {
      puts.emplace_back(entry->page.context, EncodeIndexValue({.slot = entry->slot,
                                                               .generation = entry->generation,
                                                               .last_used = entry->last_used,
                                                               .page = entry->page}));
    }
  }
  // Alone: an entry that left the directory after that lock would be deleted before it is put, and so come back.
  static_cast<void>(ApplyToIndex(std::move(puts), {}, /*was_degraded=*/false));
}

}  // namespace kvshare::agentd

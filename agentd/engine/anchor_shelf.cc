#include "agentd/engine/anchor_shelf.h"

#include <algorithm>
#include <utility>

namespace kvshare::agentd {

AnchorShelf::Shelved* AnchorShelf::Find(const std::string& session) {
  const auto found =
      std::find_if(shelved_.begin(), shelved_.end(), [&](const Shelved& s) { return s.session == session; });
  return found == shelved_.end() ? nullptr : &*found;
}

std::shared_ptr<anchors::AnchorPool> AnchorShelf::Of(const std::string& session) {
  const auto found =
      std::find_if(shelved_.begin(), shelved_.end(), [&](const Shelved& s) { return s.session == session; });
  if (found != shelved_.end()) {
    shelved_.splice(shelved_.begin(), shelved_, found);
    return found->pool;
  }
  const anchors::AnchorOptions limits = {.max_bytes = max_bytes_};
  shelved_.push_front({.session = session, .pool = std::make_shared<anchors::AnchorPool>(limits)});
  Shelved& fresh = shelved_.front();
  fresh.saved = fresh.pool->version();
  if (store_ != nullptr) {
    fresh.loading = next_load_++;
    store_->Load(session, [this, session, load = fresh.loading](std::vector<anchors::Anchor> saved) {
      post_([this, session, load, saved = std::move(saved)] { Loaded(session, load, saved); });
    });
  }
  KeepWithinLimits();
  return shelved_.front().pool;
}

// Of a session that was dropped meanwhile, nothing is waited for any more.
void AnchorShelf::Loaded(const std::string& session, std::uint64_t load, std::vector<anchors::Anchor> saved) {
  Shelved* const shelved = Find(session);
  if (shelved == nullptr || shelved->loading != load) return;
  shelved->loading = 0;
  const bool taught = shelved->pool->version() != shelved->saved;
  const auto before = static_cast<std::int64_t>(shelved->pool->anchors());
  shelved->pool->Restore(std::move(saved));
  const std::int64_t count = static_cast<std::int64_t>(shelved->pool->anchors()) - before;
  if (!taught) shelved->saved = shelved->pool->version();
  Taught(session);
  loaded_ += std::max<std::int64_t>(0, count);
}

void AnchorShelf::Taught(const std::string& session) {
  Shelved* const shelved = Find(session);
  if (shelved != nullptr && shelved->pool->version() != shelved->saved) SaveOne(*shelved);
  KeepWithinLimits();
}

// Not while its load is under way: what is on disk would be replaced by what was taught since.
void AnchorShelf::SaveOne(Shelved& shelved) {
  if (store_ == nullptr || shelved.loading != 0 || shelved.pool->anchors() == 0) return;
  store_->Save(shelved.session, shelved.pool->Snapshot());
  shelved.saved = shelved.pool->version();
}

void AnchorShelf::KeepWithinLimits() {
  std::size_t bytes = 0;
  for (const Shelved& shelved : shelved_) bytes += shelved.pool->bytes();
  while (shelved_.size() > 1 && (shelved_.size() > kMaxSessions || bytes > max_bytes_)) {
    bytes -= shelved_.back().pool->bytes();
    SaveOne(shelved_.back());  // how often it was used has changed, if nothing else
    shelved_.pop_back();
  }
  bytes_ = static_cast<std::int64_t>(bytes);
}

void AnchorShelf::Save() {
  for (Shelved& shelved : shelved_) SaveOne(shelved);
}

void AnchorShelf::Clear() {
  Save();
  shelved_.clear();
  bytes_ = 0;
}

void AnchorShelf::ForgetSaved() {
  if (store_ != nullptr) store_->Clear();
}

void AnchorShelf::Flush() {
  if (store_ != nullptr) store_->Flush();
}

AnchorStats AnchorShelf::stats() const {
  AnchorStats stats;
  stats.bytes = bytes_;
  for (std::size_t fault = 1; fault < anchors::kAnchorFaults; ++fault) {
    stats.misses[std::string(anchors::AnchorFaultName(static_cast<anchors::AnchorFault>(fault)))] = 0;
  }
  if (store_ == nullptr) return stats;
  const AnchorStoreStats stored = store_->stats();
  stats.disk_bytes = stored.bytes;
  stats.disk_capacity_bytes = disk_capacity_bytes_;
  stats.saved = stored.saved;
  stats.loaded = loaded_;
  stats.dropped = stored.dropped;
  for (std::size_t fault = 1; fault < anchors::kAnchorFaults; ++fault) {
    stats.misses[std::string(anchors::AnchorFaultName(static_cast<anchors::AnchorFault>(fault)))] =
        stored.misses[fault];
  }
  return stats;
}

}  // namespace kvshare::agentd

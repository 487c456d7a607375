#include "agentd/engine/leases.h"

#include <algorithm>
#include <string>
#include <utility>

#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {
namespace {

Status TooMany(const char* what, std::int64_t limit) {
  return ResourceExhausted("there are as many " + std::string(what) + " as may be at a time: " + std::to_string(limit));
}

}  // namespace

// Pages that are both leased and pinned count twice: too careful rather than too much.
Status LeaseBook::CheckPages(std::int64_t more) const {
  const std::int64_t pages =
      static_cast<std::int64_t>(leased_pages_.size()) + std::int64_t{pool_->usage().retained} + more;
  if (pages <= std::int64_t{limits_.max_pages}) return OkStatus();
  return ResourceExhausted("leases and pins would hold " + std::to_string(pages) +
                           " pages of the KV pool; they may hold " + std::to_string(limits_.max_pages));
}

void LeaseBook::Count(const KvHandle& kv, int change) {
  const auto count = [this, change](PageIndex page) {
    if ((leased_pages_[page] += change) == 0) leased_pages_.erase(page);
  };
  for (const PageIndex page : kv.pages()) count(page);
  if (kv.tail() != kNoPage) count(kv.tail());
}

Result<LeaseBook::Leased> LeaseBook::Lease(const PrefixMatch& match, SteadyTime deadline) {
  if (leases() >= limits_.max_leases) return TooMany("leases", limits_.max_leases);
  std::int64_t more = 0;
  for (const PageIndex page : match.pages) more += !leased_pages_.contains(page);
  if (match.tail != kNoPage) more += !leased_pages_.contains(match.tail);
  KVS_RETURN_IF_ERROR(CheckPages(more));
  KVS_ASSIGN_OR_RETURN(KvHandle kv, pool_->Lease(match));
  Count(kv, 1);
  const std::uint64_t id = next_id_++;
  const auto lease = leases_.emplace(id, Held{std::move(kv), deadline}).first;
  return Leased{.id = id, .kv = &lease->second.kv};
}

bool LeaseBook::Release(std::uint64_t id) {
  const auto lease = leases_.find(id);
  if (lease == leases_.end()) return false;
  Count(lease->second.kv, -1);
  leases_.erase(lease);
  return true;
}

Result<PinnedEntry> LeaseBook::Pin(std::span<const TokenId> prefix, std::optional<SteadyTime> deadline) {
  const PrefixMatch match = pool_->index().Find(prefix);
  std::int64_t more = 0;
  for (const PageIndex page : match.pages) more += !pool_->Describe(page).retained;
  if (match.tail != kNoPage) more += !pool_->Describe(match.tail).retained;
  if (more > 0) KVS_RETURN_IF_ERROR(CheckPages(more));
  KVS_ASSIGN_OR_RETURN(const PinnedEntry pinned, pool_->PinEntry(prefix));
  const auto known = pins_.find(pinned.key);
  if (known == pins_.end() && static_cast<std::int64_t>(pins_.size()) >= limits_.max_pins) {
    KVS_CHECK(pool_->Unpin(pinned.key).ok());
    return TooMany("pins", limits_.max_pins);
  }
  // The pool counts its pins; a name is pinned here once, however often it was asked for.
  if (known != pins_.end()) KVS_CHECK(pool_->Unpin(pinned.key).ok());
  pins_[pinned.key] = deadline;
  return pinned;
}

bool LeaseBook::Unpin(const Digest& key) {
  if (pins_.erase(key) == 0) return false;
  KVS_CHECK(pool_->Unpin(key).ok());
  return true;
}

std::optional<Digest> LeaseBook::FindPin(std::string_view hex) const {
  std::optional<Digest> found;
  for (const auto& [key, deadline] : pins_) {
    if (!key.Hex().starts_with(hex)) continue;
    if (found.has_value()) return std::nullopt;
    found = key;
  }
  return found;
}

bool LeaseBook::Expire(SteadyTime now) {
  bool any = false;
  for (auto lease = leases_.begin(); lease != leases_.end();) {
    const auto [id, deadline] = std::pair(lease->first, lease->second.deadline);
    ++lease;
    if (now >= deadline) any |= Release(id);
  }
  for (auto pin = pins_.begin(); pin != pins_.end();) {
    const auto [key, deadline] = *pin;
    ++pin;
    if (deadline.has_value() && now >= *deadline) any |= Unpin(key);
  }
  return any;
}

std::optional<SteadyTime> LeaseBook::NextDeadline() const {
  std::optional<SteadyTime> next;
  const auto consider = [&next](SteadyTime deadline) { next = std::min(next.value_or(deadline), deadline); };
  for (const auto& [id, lease] : leases_) consider(lease.deadline);
  for (const auto& [key, deadline] : pins_) {
    if (deadline.has_value()) consider(*deadline);
  }
  return next;
}

}  // namespace kvshare::agentd

// KvPool, what people ask of it: keeping a prefix, dropping one, listing what is stored.
#include <algorithm>
#include <string>

#include "agentd/pool/kv_pool.h"
#include "libkvshare/core/check.h"

namespace kvshare::agentd {

Result<PinnedEntry> KvPool::PinEntry(std::span<const TokenId> prefix) {
  const PrefixMatch match = index_.Find(prefix);
  if (match.tokens() == 0) return NotFound("nothing of this prompt is stored");
  const PageIndex last = match.tail != kNoPage ? match.tail : match.pages.back();
  PageIndex newly_retained = 0, newly_held = 0;
  for (PageIndex page = last; page != kNoPage; page = index_.Parent(page)) {
    newly_retained += pages_[page].retains == 0;
    newly_held += !pages_[page].held();
  }
  if (retained_ + newly_retained > max_retained_) {
    return ResourceExhausted("pinned entries would hold " + std::to_string(retained_ + newly_retained) +
                             " pages of the KV pool, of which at most " + std::to_string(max_retained_) +
                             " can be pinned; unpin others first");
  }
  if (std::uint64_t{reserved_} + newly_held > std::uint64_t{usage().free} + Evictable()) {
    return ResourceExhausted("running requests need the pages of the KV pool that this entry would keep");
  }
  Pinned& pinned = pinned_entries_[index_.Context(last)];
  pinned.last = last;
  pinned.tokens = std::max(pinned.tokens, match.tokens());
  ++pinned.count;
  Retain(last, 1);
  return PinnedEntry{.key = index_.Context(last), .tokens = match.tokens()};
}

Status KvPool::Unpin(const Digest& key) {
  const auto it = pinned_entries_.find(key);
  if (it == pinned_entries_.end()) return NotFound("no entry is pinned under the key " + key.Hex());
  Unretain(it->second.last, 1);
  if (--it->second.count == 0) pinned_entries_.erase(it);
  return OkStatus();
}

void KvPool::Retain(PageIndex last, std::uint32_t count) {
  if (count == 0) return;
  for (PageIndex page = last; page != kNoPage; page = index_.Parent(page)) {
    const bool was_held = pages_[page].held();
    if (pages_[page].retains == 0) ++retained_;
    pages_[page].retains += count;
    if (was_held) continue;
    ++held_indexed_;
    UpdateEvictable(page);
  }
}

void KvPool::Unretain(PageIndex last, std::uint32_t count) {
  if (count == 0) return;
  for (PageIndex page = last; page != kNoPage; page = index_.Parent(page)) {
    KVS_CHECK(pages_[page].retains >= count);
    pages_[page].retains -= count;
    if (pages_[page].retains == 0) --retained_;
    if (pages_[page].held()) continue;
    --held_indexed_;
    UpdateEvictable(page);
  }
}

PageIndex KvPool::Evict(std::span<const TokenId> prefix) {
  PageIndex dropped = 0;
  for (PageIndex page : index_.Continuing(prefix)) dropped += EvictFrom(page);
  return dropped;
}

PageIndex KvPool::EvictFrom(PageIndex top) {
  const std::vector<PageIndex> pages = index_.Subtree(top);
  PageIndex dropped = 0;
  // Pages after those that continue them; what is held keeps all before it.
  for (auto page = pages.rbegin(); page != pages.rend(); ++page) {
    if (!CanBeEvicted(*page)) continue;
    RemoveFromIndex(*page, false);
    ++dropped;
  }
  return dropped;
}

StoredPage KvPool::Describe(PageIndex page) const {
  KVS_CHECK(index_.Contains(page));
  const Page& state = pages_[page];
  StoredPage entry;
  entry.page = page;
  entry.parent = index_.Parent(page);
  entry.start = std::int64_t{state.depth} * kPageTokens;
  entry.tokens = index_.Tokens(page);
  entry.context = index_.Context(page);
  entry.source = index_.Source(page);
  entry.idle_ms = state.pins > 0 ? 0 : now_ms_ - state.used_ms;
  entry.hits = state.hits;
  entry.pins = state.pins;
  entry.retained = state.retains > 0;
  return entry;
}

void KvPool::ForEachEntry(EntryOrder order, std::size_t limit,
                          const std::function<void(const StoredPage&)>& visit) const {
  std::vector<PageIndex> pages = index_.Subtree(kNoPage);
  const std::size_t shown = std::min(limit, pages.size());
  const auto first = [&](auto before) {
    std::partial_sort(pages.begin(), pages.begin() + static_cast<std::ptrdiff_t>(shown), pages.end(), before);
  };
  const auto recent = [this](PageIndex a, PageIndex b) { return pages_[a].last_used > pages_[b].last_used; };
  if (order == EntryOrder::kRecent) first(recent);
  if (order == EntryOrder::kHits) {
    first([&](PageIndex a, PageIndex b) {
      return pages_[a].hits != pages_[b].hits ? pages_[a].hits > pages_[b].hits : recent(a, b);
    });
  }
  for (std::size_t i = 0; i < shown; ++i) visit(Describe(pages[i]));
}

std::vector<PageIndex> KvPool::FindByKey(std::string_view hex, std::size_t limit) const {
  std::vector<PageIndex> found;
  for (PageIndex page : index_.Subtree(kNoPage)) {
    if (found.size() == limit) break;
    if (index_.Context(page).Hex().starts_with(hex)) found.push_back(page);
  }
  return found;
}

// Retained pages are those of the pinned entries, each as often as entries reach it.
Status KvPool::CheckPins() const {
  std::vector<std::uint32_t> retains(pages_.size());
  for (const auto& [key, pinned] : pinned_entries_) {
    if (pinned.count == 0 || !index_.Contains(pinned.last)) return Internal("KV pool: a pinned entry is not stored");
    for (PageIndex page = pinned.last; page != kNoPage; page = index_.Parent(page)) retains[page] += pinned.count;
  }
  PageIndex retained = 0;
  for (PageIndex page = 0; page < pages_.size(); ++page) {
    if (pages_[page].retains != retains[page]) {
      return Internal("KV pool: page " + std::to_string(page) + ": is not kept as often as entries pin it");
    }
    retained += retains[page] > 0;
  }
  if (retained != retained_ || retained > max_retained_) {
    return Internal("KV pool: the count of pages kept by pinned entries is wrong");
  }
  return OkStatus();
}

}  // namespace kvshare::agentd

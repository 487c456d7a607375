#include "agentd/pool/kv_pool.h"

#include <algorithm>
#include <string>

#include "libkvshare/core/check.h"

namespace kvshare::agentd {
namespace {

// Names of evicted pages remembered per page of the pool: a miss within a few turnovers of the pool is explained.
constexpr std::size_t kGhostsPerPage = 4;

PageIndex PagesFor(std::int64_t tokens) { return static_cast<PageIndex>((tokens + kPageTokens - 1) / kPageTokens); }

}  // namespace

KvHandle& KvHandle::operator=(KvHandle&& other) noexcept {
  if (this == &other) return *this;
  if (state_ != nullptr) state_->pool->Release(*state_);
  state_ = std::move(other.state_);
  return *this;
}

KvHandle::~KvHandle() {
  if (state_ != nullptr) state_->pool->Release(*state_);
}

KvPool::KvPool(PageIndex num_pages, const Digest& root)
    : index_(num_pages, root), ghosts_(kGhostsPerPage * num_pages), pages_(num_pages) {}

KvPool::~KvPool() { KVS_CHECK(handles_.empty()); }

PoolUsage KvPool::usage() const {
  PoolUsage usage;
  usage.total = static_cast<PageIndex>(pages_.size());
  usage.free = usage.total - high_water_ + static_cast<PageIndex>(free_.size());
  usage.indexed = index_.size();
  usage.pinned = pinned_;
  usage.reserved = reserved_;
  usage.evictions = evictions_;
  return usage;
}

Result<KvHandle> KvPool::Acquire(const PrefixMatch& match, std::int64_t tokens) {
  const PageIndex needed = std::max(PagesFor(tokens), static_cast<PageIndex>(match.pages.size())) -
                           static_cast<PageIndex>(match.pages.size());
  // Pinning takes pages out of what could be evicted for the promise.
  PageIndex newly_pinned = 0;
  for (PageIndex page : match.pages) newly_pinned += pages_[page].pins == 0;
  if (match.tail != kNoPage) newly_pinned += pages_[match.tail].pins == 0;
  const PoolUsage now = usage();
  const std::int64_t available = std::int64_t{now.free} + Evictable() - reserved_ - newly_pinned;
  if (available < needed) {
    return ResourceExhausted("the KV pool has " + std::to_string(std::max<std::int64_t>(available, 0)) +
                             " pages for this request, which needs " + std::to_string(needed));
  }
  KvHandle handle;
  handle.state_ = std::make_unique<KvHandle::State>();
  KvHandle::State& state = *handle.state_;
  state.pool = this;
  state.pages.reserve(match.pages.size() + needed);
  for (PageIndex page : match.pages) {
    Pin(page);
    state.pages.push_back(page);
  }
  state.indexed = match.pages.size();
  if (match.tail != kNoPage) {
    Pin(match.tail);
    state.tail = match.tail;
    state.tail_tokens = match.tail_tokens;
  }
  state.reserved = needed;
  reserved_ += needed;
  handles_.insert(&state);
  return handle;
}

void KvPool::ReleaseTail(KvHandle& handle) {
  KvHandle::State& state = *handle.state_;
  if (state.tail == kNoPage) return;
  pages_[state.tail].last_used = ++clock_;
  Unpin(state.tail);
  state.tail = kNoPage;
  state.tail_tokens = 0;
}

void KvPool::Extend(KvHandle& handle, std::int64_t tokens) {
  KvHandle::State& state = *handle.state_;
  while (state.pages.size() < PagesFor(tokens)) {
    KVS_CHECK(state.reserved > 0);
    const PageIndex page = TakePage();
    --state.reserved;
    --reserved_;
    Pin(page);
    state.pages.push_back(page);
  }
}

void KvPool::Publish(KvHandle& handle, std::span<const TokenId> tokens, std::uint32_t source) {
  KvHandle::State& state = *handle.state_;
  const std::size_t full = tokens.size() / kPageTokens;
  KVS_CHECK(full <= state.pages.size());
  for (; state.indexed < full; ++state.indexed) {
    const std::size_t i = state.indexed;
    const PageIndex parent = i == 0 ? kNoPage : state.pages[i - 1];
    const auto page_tokens = tokens.subspan(i * kPageTokens, kPageTokens);
    const PrefixIndex::Placement place = index_.Place(parent, page_tokens);
    if (place.existing != kNoPage) {
      const PageIndex ours = std::exchange(state.pages[i], place.existing);
      Pin(place.existing);
      Unpin(ours);
      continue;
    }
    if (place.superseded != kNoPage) RemoveFromIndex(place.superseded);
    InsertIntoIndex(state.pages[i], parent, page_tokens, place.context, source);
  }
}

void KvPool::Retire(KvHandle handle, std::span<const TokenId> tokens, std::uint32_t source) {
  Publish(handle, tokens, source);
  KvHandle::State& state = *handle.state_;
  const std::size_t full = tokens.size() / kPageTokens;
  const auto rest = tokens.subspan(full * kPageTokens);
  if (rest.empty()) return;
  KVS_CHECK(full < state.pages.size());
  const PageIndex parent = full == 0 ? kNoPage : state.pages[full - 1];
  const PrefixIndex::Placement place = index_.Place(parent, rest);
  if (place.existing != kNoPage) {
    Touch(place.existing);
    return;
  }
  if (place.superseded != kNoPage) RemoveFromIndex(place.superseded);
  InsertIntoIndex(state.pages[full], parent, rest, place.context, source);
}

void KvPool::Clear() {
  // Least recently used first is as good an order as any: a page becomes a leaf when those after it are gone.
  while (!leaves_.empty()) RemoveFromIndex(leaves_.begin()->second);
}

PageIndex KvPool::TakePage() {
  if (free_.empty() && high_water_ == pages_.size()) EvictOldest();
  if (free_.empty()) return high_water_++;
  const PageIndex page = free_.back();
  free_.pop_back();
  return page;
}

void KvPool::FreePage(PageIndex page) { free_.push_back(page); }

void KvPool::EvictOldest() {
  KVS_CHECK(!leaves_.empty());  // invariant 4
  const PageIndex page = leaves_.begin()->second;
  ghosts_.Add(index_.Context(index_.Parent(page)), index_.Context(page), index_.Tokens(page).size());
  ++evictions_;
  RemoveFromIndex(page);
}

void KvPool::RemoveFromIndex(PageIndex page) {
  const PageIndex parent = index_.Parent(page);
  leaves_.erase({pages_[page].last_used, page});
  index_.Remove(page);
  if (pages_[page].pins > 0) {
    --pinned_indexed_;  // whoever still reads it frees it
  } else {
    FreePage(page);
  }
  if (parent != kNoPage) UpdateLeaf(parent);
}

void KvPool::InsertIntoIndex(PageIndex page, PageIndex parent, std::span<const TokenId> tokens, const Digest& context,
                             std::uint32_t source) {
  KVS_CHECK(pages_[page].pins > 0);
  index_.Insert(page, parent, tokens, context, source);
  ++pinned_indexed_;
  ghosts_.Erase(context);
  if (parent != kNoPage) UpdateLeaf(parent);
}

void KvPool::UpdateLeaf(PageIndex page) {
  const std::pair<std::uint64_t, PageIndex> key = {pages_[page].last_used, page};
  if (index_.Contains(page) && pages_[page].pins == 0 && index_.IsLeaf(page)) {
    leaves_.insert(key);
  } else {
    leaves_.erase(key);
  }
}

void KvPool::Touch(PageIndex page) {
  leaves_.erase({pages_[page].last_used, page});
  pages_[page].last_used = ++clock_;
  UpdateLeaf(page);
}

void KvPool::Pin(PageIndex page) {
  if (pages_[page].pins++ > 0) return;
  ++pinned_;
  if (!index_.Contains(page)) return;
  ++pinned_indexed_;
  UpdateLeaf(page);
}

void KvPool::Unpin(PageIndex page) {
  KVS_CHECK(pages_[page].pins > 0);
  if (--pages_[page].pins > 0) return;
  --pinned_;
  if (!index_.Contains(page)) {
    FreePage(page);
    return;
  }
  --pinned_indexed_;
  UpdateLeaf(page);
}

void KvPool::Release(KvHandle::State& state) {
  // One moment for all: where the end of a sequence has been evicted, the pages before it come next.
  const std::uint64_t now = ++clock_;
  if (state.tail != kNoPage) {
    pages_[state.tail].last_used = now;
    Unpin(state.tail);
  }
  for (auto page = state.pages.rbegin(); page != state.pages.rend(); ++page) {
    pages_[*page].last_used = now;
    Unpin(*page);
  }
  reserved_ -= state.reserved;
  handles_.erase(&state);
}

Status KvPool::CheckIntegrity() const {
  if (const Status status = index_.CheckIntegrity(); !status.ok()) return status;
  const auto broken = [](PageIndex page, const char* what) {
    return Internal("KV pool: page " + std::to_string(page) + ": " + what);
  };
  std::vector<std::uint32_t> pins(pages_.size());
  std::uint64_t reserved = 0;
  for (const KvHandle::State* state : handles_) {
    for (PageIndex page : state->pages) ++pins[page];
    if (state->tail != kNoPage) ++pins[state->tail];
    reserved += state->reserved;
  }
  std::vector<bool> is_free(pages_.size());
  for (PageIndex page : free_) {
    if (page >= high_water_ || is_free[page])
      return broken(page, "stands twice in the free list, or is beyond its end");
    is_free[page] = true;
  }
  for (std::size_t page = high_water_; page < pages_.size(); ++page) is_free[page] = true;

  PageIndex pinned = 0, pinned_indexed = 0, leaves = 0, used = 0;
  for (PageIndex page = 0; page < pages_.size(); ++page) {
    const bool indexed = index_.Contains(page);
    if (pages_[page].pins != pins[page]) return broken(page, "its pins are not those of the live handles");
    const bool in_use = indexed || pins[page] > 0;
    if (is_free[page] == in_use) return broken(page, in_use ? "is used and free" : "is lost");
    used += in_use;
    pinned += pins[page] > 0;
    pinned_indexed += indexed && pins[page] > 0;
    if (indexed && pins[page] > 0 && index_.Parent(page) != kNoPage && pins[index_.Parent(page)] == 0) {
      return broken(page, "is pinned, and the page before it is not");
    }
    const bool leaf = indexed && pins[page] == 0 && index_.IsLeaf(page);
    leaves += leaf;
    if (leaf && !leaves_.contains({pages_[page].last_used, page}))
      return broken(page, "could be evicted and is not listed");
  }
  const PoolUsage now = usage();
  if (used + now.free != now.total) return Internal("KV pool: free and used pages do not add up to all");
  if (pinned != pinned_ || pinned_indexed != pinned_indexed_)
    return Internal("KV pool: the counts of pinned pages are wrong");
  if (leaves != leaves_.size()) return Internal("KV pool: a page is listed for eviction that must stay");
  if (reserved != reserved_) return Internal("KV pool: the promise counter is not the handles' promises");
  if (std::uint64_t{reserved_} > std::uint64_t{now.free} + Evictable())
    return Internal("KV pool: promised more than there is");
  return OkStatus();
}

}  // namespace kvshare::agentd

#include "agentd/pool/kv_pool.h"

#include <algorithm>
#include <cstring>
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

KvPool::KvPool(PageIndex num_pages, const Digest& root, KvPoolOptions options)
    : index_(num_pages, root),
      ghosts_(kGhostsPerPage * num_pages),
      policy_(options.policy != nullptr ? std::move(options.policy) : NewDefaultPolicy(num_pages)),
      max_retained_(std::min(options.max_retained, num_pages / 2)),
      generations_(options.generations),
      pages_(num_pages) {}

KvPool::~KvPool() { KVS_CHECK(handles_.empty()); }

PoolUsage KvPool::usage() const {
  PoolUsage usage;
  usage.total = static_cast<PageIndex>(pages_.size());
  usage.free = usage.total - high_water_ + static_cast<PageIndex>(free_.size());
  usage.indexed = index_.size();
  usage.pinned = pinned_;
  usage.reserved = reserved_;
  usage.retained = retained_;
  usage.evictions = evictions_;
  usage.hits = hits_;
  return usage;
}

Result<KvHandle> KvPool::Acquire(const PrefixMatch& match, std::int64_t tokens) {
  const PageIndex needed = std::max(PagesFor(tokens), static_cast<PageIndex>(match.pages.size())) -
                           static_cast<PageIndex>(match.pages.size());
  // Pinning takes pages out of what could be evicted for the promise.
  PageIndex newly_held = 0;
  for (PageIndex page : match.pages) newly_held += !pages_[page].held();
  if (match.tail != kNoPage) newly_held += !pages_[match.tail].held();
  const PoolUsage now = usage();
  const std::int64_t available = std::int64_t{now.free} + Evictable() - reserved_ - newly_held;
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
    CountHit(page);
    state.pages.push_back(page);
  }
  state.indexed = state.found = match.pages.size();
  if (match.tail != kNoPage) {
    Pin(match.tail);
    CountHit(match.tail);
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
  Touch({&state.tail, 1}, 1);
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

KvHandle KvPool::Split(KvHandle& handle, std::size_t begin, std::size_t end) {
  KvHandle::State& state = *handle.state_;
  KVS_CHECK(state.indexed <= begin && begin <= end && end <= state.pages.size());
  KvHandle split;
  split.state_ = std::make_unique<KvHandle::State>();
  split.state_->pool = this;
  split.state_->pages.assign(state.pages.begin() + static_cast<std::ptrdiff_t>(begin),
                             state.pages.begin() + static_cast<std::ptrdiff_t>(end));
  handles_.insert(split.state_.get());
  for (std::size_t i = end; i < state.pages.size(); ++i) Unpin(state.pages[i]);
  state.pages.resize(begin);
  reserved_ -= std::exchange(state.reserved, 0);
  return split;
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
    Supersede(place.superseded, state.pages[i], parent, page_tokens, place.context, source);
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
    Touch({&place.existing, 1}, 1);
    return;
  }
  Supersede(place.superseded, state.pages[full], parent, rest, place.context, source);
}

PageIndex KvPool::TakePage() {
  if (free_.empty() && high_water_ == pages_.size()) EvictOne();
  if (free_.empty()) return high_water_++;
  const PageIndex page = free_.back();
  free_.pop_back();
  return page;
}

void KvPool::FreePage(PageIndex page) {
  ++pages_[page].generation;
  // Before anything else is written there: a reader that sees any of it sees this too.
  if (generations_ != nullptr) generations_[page].exchange(pages_[page].generation, std::memory_order_seq_cst);
  free_.push_back(page);
}

void KvPool::EvictOne() {
  const PageIndex page = policy_->Victim();
  KVS_CHECK(page != kNoBlock && CanBeEvicted(page));  // invariants 3 and 4
  if (on_evict_) on_evict_(page);
  ghosts_.Add(index_.Context(index_.Parent(page)), index_.Context(page), index_.Tokens(page).size());
  ++evictions_;
  RemoveFromIndex(page, true);
}

void KvPool::RemoveFromIndex(PageIndex page, bool evicted) {
  const PageIndex parent = index_.Parent(page);
  if (on_drop_) on_drop_(page);
  policy_->OnRemove(page, evicted);
  index_.Remove(page);
  if (pages_[page].held()) --held_indexed_;
  if (pages_[page].pins == 0) FreePage(page);  // else whoever still reads it frees it
  if (parent != kNoPage) UpdateEvictable(parent);
}

void KvPool::Supersede(PageIndex old_page, PageIndex new_page, PageIndex parent, std::span<const TokenId> tokens,
                       const Digest& context, std::uint32_t source) {
  if (old_page == kNoPage) return InsertIntoIndex(new_page, parent, tokens, context, source);
  // The new page holds the old one's tokens, so it takes over what PinEntry promised of them, under the old key.
  const std::uint32_t retains = pages_[old_page].retains;
  const std::int64_t hits = pages_[old_page].hits;
  for (auto& [key, pinned] : pinned_entries_) {
    if (pinned.last == old_page) pinned.last = new_page;
  }
  Unretain(old_page, retains);
  RemoveFromIndex(old_page, false);
  InsertIntoIndex(new_page, parent, tokens, context, source);
  Retain(new_page, retains);
  pages_[new_page].hits = hits;
}

void KvPool::InsertIntoIndex(PageIndex page, PageIndex parent, std::span<const TokenId> tokens, const Digest& context,
                             std::uint32_t source) {
  Page& state = pages_[page];
  KVS_CHECK(state.pins > 0 && state.retains == 0);
  index_.Insert(page, parent, tokens, context, source);
  ++held_indexed_;
  ghosts_.Erase(context);
  state.depth = parent == kNoPage ? 0 : pages_[parent].depth + 1;
  state.hits = 0;
  state.used_ms = now_ms_;
  state.last_used = ++clock_;
  BlockInfo info;
  std::memcpy(&info.name, context.bytes.data(), sizeof info.name);
  info.parent = parent;
  info.depth = state.depth;
  info.tokens = static_cast<std::uint32_t>(tokens.size());
  policy_->OnInsert(page, info);
  if (parent != kNoPage) UpdateEvictable(parent);
}

bool KvPool::CanBeEvicted(PageIndex page) const {
  return index_.Contains(page) && !pages_[page].held() && index_.IsLeaf(page);
}

void KvPool::UpdateEvictable(PageIndex page) {
  if (index_.Contains(page)) policy_->SetEvictable(page, CanBeEvicted(page));
}

void KvPool::CountHit(PageIndex page) {
  ++pages_[page].hits;
  ++hits_;
}

void KvPool::Touch(std::span<const PageIndex> chain, std::size_t found) {
  // The deepest is the oldest.
  for (std::size_t i = chain.size(); i-- > 0;) {
    pages_[chain[i]].last_used = ++clock_;
    pages_[chain[i]].used_ms = now_ms_;
  }
  policy_->OnRequest(chain, found);
}

void KvPool::Pin(PageIndex page) {
  const bool was_held = pages_[page].held();
  if (pages_[page].pins++ > 0) return;
  ++pinned_;
  if (was_held || !index_.Contains(page)) return;
  ++held_indexed_;
  UpdateEvictable(page);
}

void KvPool::Unpin(PageIndex page) {
  KVS_CHECK(pages_[page].pins > 0);
  if (--pages_[page].pins > 0) return;
  --pinned_;
  if (!index_.Contains(page)) {
    FreePage(page);
    return;
  }
  if (pages_[page].held()) return;
  --held_indexed_;
  UpdateEvictable(page);
}

void KvPool::Release(KvHandle::State& state) {
  if (state.tail != kNoPage) {
    Touch({&state.tail, 1}, 1);
    Unpin(state.tail);
  }
  // The pages that are stored are a beginning of the sequence: those of the match, then what was published.
  std::size_t stored = state.indexed;
  while (stored < state.pages.size() && index_.Contains(state.pages[stored])) ++stored;
  if (stored > 0) Touch(std::span(state.pages).first(stored), state.found);
  for (auto page = state.pages.rbegin(); page != state.pages.rend(); ++page) Unpin(*page);
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

  PageIndex pinned = 0, held_indexed = 0, leaves = 0, used = 0;
  for (PageIndex page = 0; page < pages_.size(); ++page) {
    const Page& state = pages_[page];
    const bool indexed = index_.Contains(page);
    if (state.pins != pins[page]) return broken(page, "its pins are not those of the live handles");
    const bool in_use = indexed || pins[page] > 0;
    if (is_free[page] == in_use) return broken(page, in_use ? "is used and free" : "is lost");
    used += in_use;
    pinned += pins[page] > 0;
    held_indexed += indexed && state.held();
    const PageIndex parent = indexed ? index_.Parent(page) : kNoPage;
    if (indexed && state.held() && parent != kNoPage && !pages_[parent].held()) {
      return broken(page, "is held, and the page before it is not");
    }
    if (indexed && state.depth != (parent == kNoPage ? 0 : pages_[parent].depth + 1)) {
      return broken(page, "its depth is wrong");
    }
    leaves += CanBeEvicted(page);
    if (policy_->IsEvictable(page) != CanBeEvicted(page)) {
      return broken(page, "the policy is wrong about whether it can be evicted");
    }
  }
  const PoolUsage now = usage();
  if (used + now.free != now.total) return Internal("KV pool: free and used pages do not add up to all");
  if (pinned != pinned_ || held_indexed != held_indexed_)
    return Internal("KV pool: the counts of pinned and held pages are wrong");
  if (leaves != policy_->num_evictable()) return Internal("KV pool: the policy lists a page that must stay");
  if (const Status status = CheckPins(); !status.ok()) return status;
  if (reserved != reserved_) return Internal("KV pool: the promise counter is not the handles' promises");
  if (std::uint64_t{reserved_} > std::uint64_t{now.free} + Evictable())
    return Internal("KV pool: promised more than there is");
  return OkStatus();
}

}  // namespace kvshare::agentd

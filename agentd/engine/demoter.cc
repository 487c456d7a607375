#include "agentd/engine/demoter.h"

#include <algorithm>
#include <span>

#include "libkvshare/core/check.h"

namespace kvshare::agentd {

Demoter::Demoter(ColdTier* cold, KvPool* pool, const PageArena* arena, const StatsBook* names)
    : cold_(cold), pool_(pool), arena_(arena), names_(names), out_(cold == nullptr ? nullptr : arena) {
  if (cold_ == nullptr) return;
  slots_.resize(arena->pages().num_pages);
  if (!arena->in_place()) copy_.resize(arena->pages().layout.page_bytes());
  // Stored again even where it was stored before: the tier may have evicted it meanwhile, and knows when there is
  // nothing to copy.
  pool_->SetEvictionObserver([this](PageIndex page) { OnEvict(page); });
  pool_->SetDropObserver([this](PageIndex page) { OnDrop(page); });
}

Demoter::~Demoter() {
  if (cold_ == nullptr) return;
  pool_->SetEvictionObserver(nullptr);
  pool_->SetDropObserver(nullptr);
  // The last occasion: what the tier does not take, it counts.
  if (!unreadable_ && out_.Wait().ok()) {
    static_cast<void>(out_.Offer(
        [this](const CopyOut::Outgoing& page, std::span<const std::byte> kv) { return cold_->Store(page.cold, kv); }));
  }
}

void Demoter::SetState(PageIndex page, State state) {
  Slot& slot = slots_[page];
  backlog_ -= slot.state == State::kWaiting;
  backlog_ += state == State::kWaiting;
  slot.state = state;
}

void Demoter::Computed(PageIndex page, const SessionName& session) {
  if (cold_ == nullptr || slots_[page].state != State::kUnknown) return;
  const PageIndex parent = pool_->index().Parent(page);
  const Digest before = parent == kNoPage ? ContentChainRoot() : slots_[parent].content_chain;
  slots_[page].content_chain = ContentChain(before, pool_->index().Tokens(page));
  slots_[page].session = session;
  SetState(page, State::kWaiting);
  queue_.push_back({page, pool_->index().Context(page)});
}

void Demoter::Loaded(PageIndex page, const Digest& content_chain) {
  if (cold_ == nullptr || slots_[page].state != State::kUnknown) return;
  slots_[page].content_chain = content_chain;
  SetState(page, State::kKept);
}

PageIndex Demoter::NextWaiting() {
  for (; !queue_.empty(); queue_.pop_front()) {
    const Waiting& next = queue_.front();
    if (slots_[next.page].state == State::kWaiting && pool_->index().Contains(next.page) &&
        pool_->index().Context(next.page) == next.context) {
      return next.page;
    }
  }
  return kNoPage;
}

bool Demoter::Work(std::size_t bytes) {
  if (cold_ == nullptr || unreadable_) return false;
  if (out_.has_memory()) {
    const bool offered = Offer();
    return CopySome(bytes) || offered;
  }
  std::size_t left = bytes;
  bool any = false;
  for (PageIndex page = NextWaiting(); page != kNoPage && left > 0; page = NextWaiting()) {
    if (!cold_->CanStore() || !Store(page)) break;
    SetState(page, State::kKept);
    left -= std::min(left, arena_->pages().layout.page_bytes());
    any = true;
  }
  return any;
}

bool Demoter::Finish() {
  if (cold_ == nullptr || unreadable_ || out_.pages() == 0) return false;
  unreadable_ = !out_.Wait().ok();
  return !unreadable_ && Offer();
}

// As many as there is room for: what the tier has not taken yet holds the memory.
bool Demoter::CopySome(std::size_t bytes) {
  const std::size_t page_bytes = arena_->pages().layout.page_bytes();
  const std::size_t most = std::min(out_.room(), std::max<std::size_t>(bytes / page_bytes, 1));
  std::vector<CopyOut::Outgoing> pages;
  bool any = false;
  if (unreadable_ || !cold_->CanStore()) return false;
  for (PageIndex page = NextWaiting(); page != kNoPage && pages.size() < most; page = NextWaiting()) {
    any = true;
    // What the tier has already, it would not take; so it need not be fetched from the device.
    if (cold_->Contains(pool_->index().Context(page))) {
      SetState(page, State::kKept);
      continue;
    }
    pages.push_back({.page = page, .cold = RecordOf(page)});
    SetState(page, State::kOnItsWay);
  }
  return pages.empty() ? any : Begin(std::move(pages));
}

bool Demoter::Begin(std::vector<CopyOut::Outgoing> pages) {
  unreadable_ = !out_.Begin(std::move(pages)).ok();
  return !unreadable_;
}

bool Demoter::Offer() {
  const Result<bool> any = out_.Offer([this](const CopyOut::Outgoing& page, std::span<const std::byte> kv) {
    if (!cold_->CanStore() || !cold_->Store(page.cold, kv)) return false;
    if (page.in_memory) SetState(page.page, State::kKept);
    return true;
  });
  unreadable_ = !any.ok();
  return any.ok() && *any;
}

ColdPage Demoter::RecordOf(PageIndex page) const {
  const PrefixIndex& index = pool_->index();
  const PageIndex parent = index.Parent(page);
  ColdPage cold;
  cold.parent = parent == kNoPage ? index.root() : index.Context(parent);
  cold.context = index.Context(page);
  const std::span<const TokenId> tokens = index.Tokens(page);
  cold.tokens.assign(tokens.begin(), tokens.end());
  cold.content_chain = slots_[page].content_chain;
  cold.start = pool_->Describe(page).start;
  cold.source = names_->AgentName(index.Source(page));
  if (slots_[page].session != nullptr) cold.session = *slots_[page].session;
  return cold;
}

// Whether the tier has it, or will have it.
bool Demoter::Store(PageIndex page) {
  ColdPage cold = RecordOf(page);
  if (arena_->in_place()) {
    const kernels::KvPages& pages = arena_->pages();
    return cold_->Store(cold, std::span(pages.slab(page, 0, 0, 0), pages.layout.page_bytes()));
  }
  if (cold_->Contains(cold.context)) return true;  // as above
  if (unreadable_) return false;
  if (out_.room() > 0) {
    std::vector<CopyOut::Outgoing> pages;
    pages.push_back({.page = page, .cold = std::move(cold)});
    return Begin(std::move(pages));
  }
  unreadable_ = !arena_->Read(page, copy_).ok();
  return !unreadable_ && cold_->Store(cold, copy_);
}

void Demoter::OnEvict(PageIndex page) {
  evicted_ = page;
  if (slots_[page].state != State::kOnItsWay) Store(page);
}

void Demoter::OnDrop(PageIndex page) {
  const bool keep = keep_dropped_ || page == evicted_;
  if (keep_dropped_ && slots_[page].state == State::kWaiting) Store(page);
  if (out_.pages() > 0) out_.Leaves(page, pool_->index().Context(page), /*forget=*/!keep);
  evicted_ = kNoPage;
  SetState(page, State::kUnknown);
  slots_[page] = Slot{};
}

}  // namespace kvshare::agentd

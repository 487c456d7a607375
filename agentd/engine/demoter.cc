#include "agentd/engine/demoter.h"

#include <algorithm>
#include <span>

#include "libkvshare/core/check.h"

namespace kvshare::agentd {

Demoter::Demoter(ColdTier* cold, KvPool* pool, const kernels::KvPages& pages, const StatsBook* names)
    : cold_(cold), pool_(pool), pages_(pages), names_(names) {
  if (cold_ == nullptr) return;
  slots_.resize(pages.num_pages);
  // Stored again even where it was stored before: the tier may have evicted it meanwhile, and knows when there is
  // nothing to copy.
  pool_->SetEvictionObserver([this](PageIndex page) { Store(page); });
  pool_->SetDropObserver([this](PageIndex page) { OnDrop(page); });
}

Demoter::~Demoter() {
  if (cold_ == nullptr) return;
  pool_->SetEvictionObserver(nullptr);
  pool_->SetDropObserver(nullptr);
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

bool Demoter::Work(std::size_t bytes) {
  if (cold_ == nullptr) return false;
  std::size_t left = bytes;
  bool any = false;
  while (!queue_.empty() && left > 0) {
    const Waiting& next = queue_.front();
    const bool waits = slots_[next.page].state == State::kWaiting && pool_->index().Contains(next.page) &&
                       pool_->index().Context(next.page) == next.context;
    if (waits) {
      if (!cold_->CanStore() || !Store(next.page)) break;
      SetState(next.page, State::kKept);
      left -= std::min(left, pages_.layout.page_bytes());
      any = true;
    }
    queue_.pop_front();
  }
  return any;
}

bool Demoter::Store(PageIndex page) {
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
  return cold_->Store(cold, std::span(pages_.slab(page, 0, 0, 0), pages_.layout.page_bytes()));
}

void Demoter::OnDrop(PageIndex page) {
  if (keep_dropped_ && slots_[page].state == State::kWaiting) Store(page);
  SetState(page, State::kUnknown);
  slots_[page] = Slot{};
}

}  // namespace kvshare::agentd

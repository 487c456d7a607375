#include "agentd/engine/demoter.h"

#include <algorithm>
#include <span>

#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {

Demoter::Demoter(ColdTier* cold, KvPool* pool, const PageArena* arena, const StatsBook* names)
    : cold_(cold), pool_(pool), arena_(arena), names_(names) {
  if (cold_ == nullptr) return;
  slots_.resize(arena->pages().num_pages);
  if (!arena->in_place()) copy_.resize(arena->pages().layout.page_bytes());
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
  if (cold_ == nullptr || unreadable_) return false;
  std::size_t left = bytes;
  bool any = false;
  while (!queue_.empty() && left > 0) {
    const Waiting& next = queue_.front();
    const bool waits = slots_[next.page].state == State::kWaiting && pool_->index().Contains(next.page) &&
                       pool_->index().Context(next.page) == next.context;
    if (waits) {
      if (!cold_->CanStore() || !Store(next.page)) break;
      SetState(next.page, State::kKept);
      left -= std::min(left, arena_->pages().layout.page_bytes());
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
  // What the tier has already, it would not take; so it need not be fetched from the device.
  if (!arena_->in_place() && cold_->Contains(cold.context)) return true;
  const auto kv = BytesOf(page);
  return kv.ok() && cold_->Store(cold, *kv);
}

Result<std::span<const std::byte>> Demoter::BytesOf(PageIndex page) {
  const kernels::KvPages& pages = arena_->pages();
  if (arena_->in_place()) return std::span<const std::byte>(pages.slab(page, 0, 0, 0), pages.layout.page_bytes());
  if (unreadable_) return Unavailable("the device has failed");
  const Status read = arena_->Read(page, copy_);
  unreadable_ = !read.ok();
  KVS_RETURN_IF_ERROR(read);
  return std::span<const std::byte>(copy_);
}

void Demoter::OnDrop(PageIndex page) {
  if (keep_dropped_ && slots_[page].state == State::kWaiting) Store(page);
  SetState(page, State::kUnknown);
  slots_[page] = Slot{};
}

}  // namespace kvshare::agentd

#include "agentd/engine/copy_out.h"

#include <algorithm>
#include <utility>

#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {

CopyOut::CopyOut(const PageArena* arena)
    : arena_(arena), page_bytes_(arena == nullptr ? 0 : arena->pages().layout.page_bytes()) {
  if (arena_ == nullptr || arena_->movers() == nullptr) return;
  const std::size_t most = std::max<std::size_t>(arena_->pages().num_pages, 2);
  const std::size_t pages = std::clamp<std::size_t>(kMemoryBytes / page_bytes_, 2, most);
  Result<std::unique_ptr<kernels::Buffer>> memory = arena_->movers()->AllocatePinned(pages * page_bytes_);
  missing_ = memory.status();
  if (!memory.ok()) return;
  memory_ = *std::move(memory);
  capacity_ = pages;
}

CopyOut::~CopyOut() { static_cast<void>(Wait()); }

std::size_t CopyOut::room() const {
  if (batches_.empty()) return capacity_;
  const std::size_t first = batches_.front().at;
  return next_ > first ? capacity_ - next_ : first - next_;
}

// A page whose taking is outstanding keeps its place, and a batch lies in one piece.
Status CopyOut::Begin(std::vector<Outgoing> pages) {
  KVS_CHECK(!pages.empty() && pages.size() <= room());
  if (batches_.empty()) next_ = 0;
  Batch batch;
  batch.at = next_;
  std::vector<PageIndex> from;
  for (const Outgoing& page : pages) from.push_back(page.page);
  KVS_ASSIGN_OR_RETURN(batch.copy,
                       arena_->movers()->DemotePages(arena_->pages(), from, memory_->data() + next_ * page_bytes_));
  pages_ += pages.size();
  next_ = (next_ + pages.size()) % capacity_;
  batch.pages = std::move(pages);
  batches_.push_back(std::move(batch));
  return OkStatus();
}

void CopyOut::Leaves(PageIndex page, const Digest& context, bool forget) {
  for (Batch& batch : batches_) {
    for (Outgoing& outgoing : batch.pages) {
      if (outgoing.page != page || !outgoing.in_memory || !(outgoing.cold.context == context)) continue;
      outgoing.in_memory = false;
      if (batch.copy != nullptr && !batch.followed) {
        batch.copy->AwaitLayer(arena_->pages().layout.num_layers - 1);
        batch.followed = true;
      }
      if (forget && !outgoing.taken) {
        outgoing.taken = true;
        --pages_;
      }
    }
  }
}

void CopyOut::ForgetLeft() {
  for (Batch& batch : batches_) {
    for (Outgoing& outgoing : batch.pages) {
      if (outgoing.in_memory || outgoing.taken) continue;
      outgoing.taken = true;
      --pages_;
    }
  }
}

Result<bool> CopyOut::Offer(const Take& take) {
  bool any = false;
  for (Batch& batch : batches_) {
    if (batch.copy != nullptr) {
      KVS_ASSIGN_OR_RETURN(const bool over, batch.copy->Done());
      if (!over) break;
      batch.copy.reset();
    }
    for (std::size_t i = 0; i < batch.pages.size(); ++i) {
      Outgoing& page = batch.pages[i];
      if (page.taken) continue;
      page.taken = take(page, std::span(memory_->data() + (batch.at + i) * page_bytes_, page_bytes_));
      pages_ -= page.taken;
      any |= page.taken;
    }
  }
  while (!batches_.empty() && batches_.front().copy == nullptr &&
         std::all_of(batches_.front().pages.begin(), batches_.front().pages.end(),
                     [](const Outgoing& page) { return page.taken; })) {
    batches_.pop_front();
  }
  return any;
}

Status CopyOut::Wait() {
  for (Batch& batch : batches_) {
    if (batch.copy == nullptr) continue;
    KVS_RETURN_IF_ERROR(batch.copy->Wait());
    batch.copy.reset();
  }
  return OkStatus();
}

}  // namespace kvshare::agentd

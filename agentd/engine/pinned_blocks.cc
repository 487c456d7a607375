#include "agentd/engine/pinned_blocks.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "agentd/tiers/record.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

PinnedBlocks::PinnedBlocks(kernels::DeviceKv* movers, std::size_t page_bytes, std::size_t most_pages)
    : pages_(std::clamp<std::size_t>(kBlockBytes / page_bytes, 1, std::max<std::size_t>(most_pages, 1))) {
  if (movers == nullptr) return;
  const std::size_t block = (pages_ * page_bytes + kRecordAlign - 1) / kRecordAlign * kRecordAlign;
  Result<std::unique_ptr<kernels::Buffer>> memory = movers->AllocatePinned(kBlocks * block + kRecordAlign);
  missing_ = memory.status();
  if (!memory.ok()) return;
  memory_ = *std::move(memory);
  const auto address = reinterpret_cast<std::uintptr_t>(memory_->data());
  std::byte* const first = memory_->data() + (kRecordAlign - address % kRecordAlign) % kRecordAlign;
  for (std::size_t i = kBlocks; i-- > 0;) free_.push_back(first + i * block);
}

std::byte* PinnedBlocks::Take() {
  if (free_.empty()) return nullptr;
  std::byte* const block = free_.back();
  free_.pop_back();
  return block;
}

}  // namespace kvshare::agentd

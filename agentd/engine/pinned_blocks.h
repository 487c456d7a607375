// PinnedBlocks: the pinned host memory that loads onto a device go through, in a few blocks that loads borrow.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "kernels/backend.h"
#include "kernels/device_kv.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

// Allocated at once: pinning memory takes a device longer than copying it. The engine's thread.
class PinnedBlocks {
 public:
  // Blocks of about kBlockBytes, one page at least and at most `most_pages`, as long as any run. There are none where
  // `movers` is null or has no such memory to give.
  PinnedBlocks(kernels::DeviceKv* movers, std::size_t page_bytes, std::size_t most_pages);
  PinnedBlocks(const PinnedBlocks&) = delete;
  PinnedBlocks& operator=(const PinnedBlocks&) = delete;

  // What disks read well in one go.
  static constexpr std::size_t kBlockBytes = std::size_t{16} << 20;
  // Two loads at a time, of which one half is read while the other is copied.
  static constexpr std::size_t kBlocks = 4;

  // Why there are none although there is a device. OK otherwise.
  const Status& missing() const { return missing_; }

  std::size_t pages_per_block() const { return pages_; }
  // Pages side by side, the first one aligned for direct reads. Null: none is left.
  std::byte* Take();
  // Its copies are over.
  void Give(std::byte* block) { free_.push_back(block); }

 private:
  const std::size_t pages_;
  Status missing_;
  std::unique_ptr<kernels::Buffer> memory_;
  std::vector<std::byte*> free_;
};

}  // namespace kvshare::agentd

// CopyOut: pages on their way from a device to the cold tier, copied into pinned host memory beside the engine's steps.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "agentd/pool/kv_pool.h"
#include "agentd/pool/page_arena.h"
#include "agentd/tiers/cold_tier.h"
#include "kernels/backend.h"
#include "kernels/device_kv.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

// The engine's thread. Must not outlive `arena`.
class CopyOut {
 public:
  struct Outgoing {
    PageIndex page = kNoPage;
    ColdPage cold;          // what is stored with it
    bool in_memory = true;  // `page` still holds it
    bool taken = false;     // or not wanted any more
  };
  // What the tier makes of a page: false to be asked again later.
  using Take = std::function<bool(const Outgoing& page, std::span<const std::byte> kv)>;

  // Takes pinned memory of about kMemoryBytes, two pages at least. `arena` null, its pages read in place, or none of
  // that memory to be had: room() is 0 for ever.
  explicit CopyOut(const PageArena* arena);
  // Waits for the copies.
  ~CopyOut();
  CopyOut(const CopyOut&) = delete;
  CopyOut& operator=(const CopyOut&) = delete;

  static constexpr std::size_t kMemoryBytes = std::size_t{32} << 20;

  bool has_memory() const { return memory_ != nullptr; }
  // Why it has none although there is a device. OK otherwise.
  const Status& missing() const { return missing_; }
  // Pages that can be begun now.
  std::size_t room() const;
  // Pages that were begun and not taken yet.
  std::size_t pages() const { return pages_; }

  // Copies at most room() pages, as they are after all that was enqueued on the backend. Until their copies are over,
  // what they hold may change only behind Leaves.
  Status Begin(std::vector<Outgoing> pages);
  // `page`, which holds `context`, is about to hold something else: what is enqueued on the backend from now on comes
  // after its copy. With `forget`, it is not to be stored any more either.
  void Leaves(PageIndex page, const Digest& context, bool forget);
  // Those that memory does not hold any more are not to be stored.
  void ForgetLeft();

  // Shows `take` every page whose copy is over and that it did not take yet, in the order they were begun. Whether it
  // took any. An error: the device has failed, and nothing that was not here is coming.
  Result<bool> Offer(const Take& take);
  // Until all copies are over. The same error.
  Status Wait();

 private:
  struct Batch {
    std::size_t at = 0;  // of its first page in memory_, in pages
    std::vector<Outgoing> pages;
    std::unique_ptr<kernels::PageTransfer> copy;  // null: over
    bool followed = false;                        // by all that was enqueued since
  };
  const PageArena* const arena_;
  const std::size_t page_bytes_;
  Status missing_;
  std::unique_ptr<kernels::Buffer> memory_;
  std::size_t capacity_ = 0;   // in pages, as the next two
  std::size_t next_ = 0;       // in memory_: batches follow each other there, round and round
  std::size_t pages_ = 0;      // not taken yet
  std::deque<Batch> batches_;  // oldest first, as the copies end
};

}  // namespace kvshare::agentd

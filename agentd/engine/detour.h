// Detour: the way of a run's pages onto a device. They are read into host memory, a block at a time, and sent on from
// there: out of pinned memory beside the engine's steps and the next read, else by the engine's thread.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "agentd/engine/pinned_blocks.h"
#include "agentd/engine/planner.h"
#include "agentd/pool/page_arena.h"
#include "agentd/tiers/aligned_buffer.h"
#include "agentd/tiers/cold_tier.h"
#include "kernels/device_kv.h"

namespace kvshare::agentd {

// The engine's thread. A read's destination is the detour's own: it must outlive the read, and the copies.
class Detour {
 public:
  // `places`: where the run's pages go, at least one. Borrows two blocks, or one where that is all there is or all that
  // it needs; without any it takes as much of the host's ordinary memory.
  Detour(std::vector<PageIndex> places, PageArena* arena, PinnedBlocks* blocks);
  ~Detour();
  Detour(const Detour&) = delete;
  Detour& operator=(const Detour&) = delete;

  // The reads of the next pages of the run. None while a read is under way or there is no room for another, and when
  // there is nothing left to read.
  std::vector<ColdLoad> NextLoads(const ColdRun& run);
  // These have ended: what they brought is on its way. Behind the first page that could not be had, none is of use.
  void SendOn(std::vector<ColdLoaded> loaded);
  // Every page has been sent, or given up.
  bool all_sent() const { return sent_.size() == places_.size(); }
  // What became of each page so far.
  std::span<const ColdLoaded> sent() const { return sent_; }

  // Copies are under way, as far as was looked.
  bool copying() const;
  // Looks, and does not wait: copies that are over make room for the next read.
  void Look();
  // What is enqueued on the backend from now on finds this layer of all pages that were sent.
  void AwaitLayer(int layer);
  // Once all are sent: waits for the copies, then says what became of each page.
  std::vector<ColdLoaded> TakeLoaded();

 private:
  struct Part {
    std::byte* memory = nullptr;
    std::size_t begin = 0;  // its first page is this one of the run
    std::unique_ptr<kernels::PageTransfer> copy;
  };

  Status Send(Part* part, std::span<const PageIndex> places);
  // The copy of this part is over. A failure: none of its pages has come, nor any behind them.
  void EndCopy(Part* part, const Status& status);

  const std::vector<PageIndex> places_;
  PageArena* const arena_;
  PinnedBlocks* const blocks_;
  std::size_t at_once_;                  // pages in a part
  std::size_t stride_;                   // between two of them
  std::optional<AlignedBuffer> memory_;  // where there are no pinned blocks
  std::vector<Part> parts_;              // used in turns
  std::size_t turn_ = 0;
  bool reading_ = false;  // into the part whose turn it is
  Status failed_;         // a copy did: the device has failed
  std::vector<ColdLoaded> sent_;
};

}  // namespace kvshare::agentd

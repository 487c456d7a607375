#include "agentd/pool/s3fifo_policy.h"

#include <algorithm>

namespace kvshare::agentd {
namespace {

constexpr std::size_t kSmallShare = 10;  // the small queue's part of the capacity: a tenth
constexpr std::uint8_t kMostUses = 3;
constexpr std::uint8_t kProven = 2;  // uses that move a block from the small queue to the main one

}  // namespace

S3FifoPolicy::S3FifoPolicy(std::size_t capacity)
    : small_capacity_(std::max<std::size_t>(1, capacity / kSmallShare)),
      ghost_capacity_(std::max<std::size_t>(1, capacity)) {}

void S3FifoPolicy::OnInsert(BlockId block, const BlockInfo& info) {
  if (block >= entries_.size()) entries_.resize(std::size_t{block} + 1);
  entries_[block] = {.name = info.name};
  const bool returned = ghosts_.erase(info.name) > 0;
  Join(block, returned ? kMain : kSmall);
}

void S3FifoPolicy::Join(BlockId block, Queue queue) {
  Entry& entry = entries_[block];
  entry.queue = queue;
  entry.serial = ++clock_;
  entry.uses = 0;
  ++size_[queue];
}

void S3FifoPolicy::OnRequest(std::span<const BlockId> chain, std::size_t found) {
  for (BlockId block : chain.first(found))
    entries_[block].uses = std::min<std::uint8_t>(entries_[block].uses + 1, kMostUses);
}

void S3FifoPolicy::SetEvictable(BlockId block, bool evictable) {
  Entry& entry = entries_[block];
  if (entry.evictable == evictable) return;
  entry.evictable = evictable;
  if (evictable) {
    order_[entry.queue].insert({entry.serial, block});
  } else {
    order_[entry.queue].erase({entry.serial, block});
  }
}

void S3FifoPolicy::OnRemove(BlockId block, bool evicted) {
  SetEvictable(block, false);
  --size_[entries_[block].queue];
  if (evicted && entries_[block].queue == kSmall) Remember(entries_[block].name);
}

void S3FifoPolicy::Remember(std::uint64_t name) {
  ghosts_[name] = ++clock_;
  ghost_order_.emplace_back(name, clock_);
  while (ghosts_.size() > ghost_capacity_ || ghost_order_.size() > 2 * ghost_capacity_) {
    const auto [oldest, when] = ghost_order_.front();
    ghost_order_.pop_front();
    const auto it = ghosts_.find(oldest);
    if (it != ghosts_.end() && it->second == when) ghosts_.erase(it);
  }
}

BlockId S3FifoPolicy::Victim() {
  // Every turn moves a block to the main queue or takes a chance from one, so this ends.
  while (num_evictable() > 0) {
    const bool from_small = !order_[kSmall].empty() && (size_[kSmall] > small_capacity_ || order_[kMain].empty());
    const Queue queue = from_small ? kSmall : order_[kMain].empty() ? kSmall : kMain;
    const BlockId block = order_[queue].begin()->second;
    Entry& entry = entries_[block];
    if (entry.uses < (queue == kSmall ? kProven : 1)) return block;
    const std::uint8_t chances = queue == kSmall ? 0 : entry.uses - 1;
    SetEvictable(block, false);
    --size_[queue];
    Join(block, kMain);
    entry.uses = chances;
    SetEvictable(block, true);
  }
  return kNoBlock;
}

bool S3FifoPolicy::IsEvictable(BlockId block) const { return block < entries_.size() && entries_[block].evictable; }

}  // namespace kvshare::agentd

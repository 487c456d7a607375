// S3-FIFO (Yang et al., SOSP 2023): a small queue where new blocks prove themselves, a main queue with second chances,
// and the names of blocks that left the small queue, which go straight to the main one when they return.
#pragma once

#include <array>
#include <deque>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "agentd/pool/eviction_policy.h"

namespace kvshare::agentd {

// Where the paper takes the head of a queue, this takes the oldest block in it that can be evicted.
class S3FifoPolicy : public EvictionPolicy {
 public:
  explicit S3FifoPolicy(std::size_t capacity);

  std::string_view name() const override { return "s3fifo"; }
  void OnInsert(BlockId block, const BlockInfo& info) override;
  void OnRequest(std::span<const BlockId> chain, std::size_t found) override;
  void SetEvictable(BlockId block, bool evictable) override;
  void OnRemove(BlockId block, bool evicted) override;
  BlockId Victim() override;
  bool IsEvictable(BlockId block) const override;
  std::size_t num_evictable() const override { return order_[kSmall].size() + order_[kMain].size(); }

 private:
  enum Queue : std::uint8_t { kSmall, kMain };
  struct Entry {
    std::uint64_t name = 0;
    std::uint64_t serial = 0;  // place in its queue
    Queue queue = kSmall;
    std::uint8_t uses = 0;  // since it joined the queue, 0..3; in the main queue, second chances left
    bool evictable = false;
  };
  void Join(BlockId block, Queue queue);
  void Remember(std::uint64_t name);

  std::size_t small_capacity_;
  std::size_t ghost_capacity_;
  std::vector<Entry> entries_;
  std::array<std::size_t, 2> size_{};
  std::array<std::set<std::pair<std::uint64_t, BlockId>>, 2> order_;  // the evictable blocks of each queue
  std::uint64_t clock_ = 0;
  std::unordered_map<std::uint64_t, std::uint64_t> ghosts_;          // name -> when it left
  std::deque<std::pair<std::uint64_t, std::uint64_t>> ghost_order_;  // the same; may hold ghosts that came back
};

}  // namespace kvshare::agentd

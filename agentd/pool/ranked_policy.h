// RankedPolicy: what policies share that give every block a rank and evict the lowest rank first. A policy decides when
// a rank changes; the order of the evictable blocks is kept here.
#pragma once

#include <set>
#include <utility>
#include <vector>

#include "agentd/pool/eviction_policy.h"
#include "libkvshare/core/check.h"

namespace kvshare::agentd {

// Rank: anything ordered. Ties go by block number, so that runs repeat.
template <typename Rank>
class RankedPolicy : public EvictionPolicy {
 public:
  void SetEvictable(BlockId block, bool evictable) override {
    Slot& slot = At(block);
    if (slot.evictable == evictable) return;
    slot.evictable = evictable;
    if (evictable) {
      order_.insert({slot.rank, block});
    } else {
      order_.erase({slot.rank, block});
    }
  }
  void OnRemove(BlockId block, bool) override { SetEvictable(block, false); }
  BlockId Victim() override { return order_.empty() ? kNoBlock : order_.begin()->second; }
  bool IsEvictable(BlockId block) const override { return block < slots_.size() && slots_[block].evictable; }
  std::size_t num_evictable() const override { return order_.size(); }

 protected:
  void SetRank(BlockId block, const Rank& rank) {
    Slot& slot = At(block);
    if (!slot.evictable) {
      slot.rank = rank;
      return;
    }
    // The tree's node moves with its rank: no allocation on the way.
    auto node = order_.extract({slot.rank, block});
    KVS_CHECK(!node.empty());
    slot.rank = rank;
    node.value() = {rank, block};
    order_.insert(std::move(node));
  }

 private:
  struct Slot {
    Rank rank{};
    bool evictable = false;
  };
  Slot& At(BlockId block) {
    if (block >= slots_.size()) slots_.resize(std::size_t{block} + 1);
    return slots_[block];
  }

  std::vector<Slot> slots_;
  std::set<std::pair<Rank, BlockId>> order_;  // evictable blocks
};

}  // namespace kvshare::agentd

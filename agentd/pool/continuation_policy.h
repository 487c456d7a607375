// The daemon's default policy: a block is kept for as long as the conversation it belongs to is likely to go on
// (docs/design/eviction.md).
#pragma once

#include <array>
#include <cstddef>
#include <deque>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "agentd/pool/eviction_policy.h"
#include "agentd/pool/reuse_statistics.h"

namespace kvshare::agentd {

// Every request puts its blocks into classes, by how often its sequence was continued, how much was new this time, how
// soon it came and what several sequences have in common. ReuseStatistics learns how likely blocks of a class and age
// are to be used again; the block that is worth least goes first. Within a class that is the one used longest ago, or
// (where blocks are the likelier to be used the older they are) the newest. What is known of a block outlives its
// eviction for a while, so that a conversation that comes back late is known to be one.
class ContinuationPolicy : public EvictionPolicy {
 public:
  explicit ContinuationPolicy(std::size_t capacity);

  std::string_view name() const override { return "default"; }
  void OnInsert(BlockId block, const BlockInfo& info) override;
  void OnRequest(std::span<const BlockId> chain, std::size_t found) override;
  void SetEvictable(BlockId block, bool evictable) override;
  void OnRemove(BlockId block, bool evicted) override;
  BlockId Victim() override;
  bool IsEvictable(BlockId block) const override { return block < entries_.size() && entries_[block].evictable; }
  std::size_t num_evictable() const override { return num_evictable_; }

  static constexpr std::size_t kClasses = 30;

 private:
  struct History {
    std::uint32_t uses = 0;      // requests that it was part of
    std::uint32_t turns = 0;     // how often the sequence of its last use had been continued by then
    std::uint32_t from_end = 0;  // blocks after it at its last use
    std::uint64_t last = 0;      // when that was, in block uses
    ReuseStatistics::Interval interval;
  };
  struct Entry {
    std::uint64_t name = 0;
    std::uint64_t stamp = 0;  // place in its class
    History history;
    std::uint32_t depth = 0;
    std::uint8_t klass = 0;
    bool remembered = false;  // stored again after an eviction, and not used since
    bool open = false;
    bool evictable = false;
  };
  struct Ghost {
    History history;
    std::uint64_t serial = 0;
  };
  void Remember(const Entry& entry);

  std::size_t capacity_;
  ReuseStatistics statistics_;
  std::uint32_t block_tokens_ = 1;  // of a full block, as far as seen
  std::uint64_t now_ = 0;           // blocks used so far
  std::uint64_t clock_ = 0;
  std::uint64_t serial_ = 0;
  std::vector<Entry> entries_;
  std::array<std::set<std::pair<std::uint64_t, BlockId>>, kClasses> order_;  // evictable blocks by stamp
  std::size_t num_evictable_ = 0;
  std::unordered_map<std::uint64_t, Ghost> ghosts_;                  // by name
  std::deque<std::pair<std::uint64_t, std::uint64_t>> ghost_order_;  // (name, serial), the oldest first
};

}  // namespace kvshare::agentd

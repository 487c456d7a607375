// The daemon's default policy: a block is kept for as long as the conversation it belongs to is likely to go on
// (docs/design/eviction.md).
#pragma once

#include <cstddef>
#include <deque>
#include <unordered_map>
#include <utility>
#include <vector>

#include "agentd/pool/ranked_policy.h"

namespace kvshare::agentd {

// Every request gives its blocks a credit, in turnovers of the pool (as many block uses as the pool has blocks); a
// block expires when its credit is spent since its last use, and the block that expires first, or expired longest ago,
// goes first. The credit is larger the more often the sequence was continued and the less was new in it this time; what
// many sequences begin with has the most. What is known of a block outlives its eviction for a while, so that a
// conversation that comes back late is known to be one.
class ContinuationPolicy : public RankedPolicy<std::uint64_t> {
 public:
  explicit ContinuationPolicy(std::size_t capacity);

  std::string_view name() const override { return "default"; }
  void OnInsert(BlockId block, const BlockInfo& info) override;
  void OnRequest(std::span<const BlockId> chain, std::size_t found) override;
  void OnRemove(BlockId block, bool evicted) override;

 private:
  struct History {
    std::uint32_t uses = 0;      // requests that it was part of
    std::uint32_t turns = 0;     // how often the sequence of its last use had been continued by then
    std::uint32_t from_end = 0;  // blocks after it at its last use
  };
  struct Entry {
    std::uint64_t name = 0;
    History history;
    std::uint32_t depth = 0;
    bool remembered = false;  // stored again after an eviction, and not used since
    bool open = false;
  };
  struct Ghost {
    History history;
    std::uint64_t serial = 0;
  };
  void Remember(const Entry& entry);

  std::size_t capacity_;
  std::uint64_t now_ = 0;  // blocks used so far
  std::uint64_t serial_ = 0;
  std::vector<Entry> entries_;
  std::unordered_map<std::uint64_t, Ghost> ghosts_;                  // by name
  std::deque<std::pair<std::uint64_t, std::uint64_t>> ghost_order_;  // (name, serial), the oldest first
};

}  // namespace kvshare::agentd

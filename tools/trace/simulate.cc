#include "tools/trace/simulate.h"

#include <algorithm>
#include <cmath>
#include <queue>
#include <tuple>
#include <vector>

#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::trace {
namespace {

using agentd::BlockId;
using agentd::BlockInfo;
using agentd::EvictionPolicy;
using agentd::kNoBlock;

constexpr std::uint32_t kNever = static_cast<std::uint32_t>(-1);

// The stored blocks: a forest that loses leaves only, in slots that are used again.
class Cache {
 public:
  Cache(EvictionPolicy& policy, std::uint32_t unique_blocks) : policy_(policy), slot_of_(unique_blocks, kNoBlock) {}

  bool Contains(std::uint32_t block) const { return slot_of_[block] != kNoBlock; }
  std::size_t size() const { return slots_.size() - free_.size(); }
  std::int64_t evictions() const { return evictions_; }

  void Use(std::span<const std::uint32_t> blocks, std::size_t found, std::uint32_t tokens_per_block, bool open) {
    chain_.clear();
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      if (!Contains(blocks[i])) Insert(blocks[i], i, tokens_per_block, open && i + 1 == blocks.size());
      chain_.push_back(slot_of_[blocks[i]]);
    }
    policy_.OnRequest(chain_, found);
    for (BlockId slot : chain_) policy_.SetEvictable(slot, slots_[slot].children == 0);
  }

  void EvictDownTo(std::size_t capacity) {
    while (size() > capacity) {
      const BlockId victim = policy_.Victim();
      KVS_CHECK(victim != kNoBlock && slots_[victim].children == 0);  // a forest has leaves
      policy_.OnRemove(victim, true);
      ++evictions_;
      slot_of_[slots_[victim].block] = kNoBlock;
      free_.push_back(victim);
      const BlockId parent = slots_[victim].parent;
      if (parent != kNoBlock && --slots_[parent].children == 0) policy_.SetEvictable(parent, true);
    }
  }

 private:
  struct Slot {
    std::uint32_t block = 0;
    BlockId parent = kNoBlock;
    std::uint32_t children = 0;
  };

  void Insert(std::uint32_t block, std::size_t depth, std::uint32_t tokens, bool open) {
    if (free_.empty()) {
      free_.push_back(static_cast<BlockId>(slots_.size()));
      slots_.emplace_back();
    }
    const BlockId slot = free_.back();
    free_.pop_back();
    const BlockId parent = chain_.empty() ? kNoBlock : chain_.back();
    slots_[slot] = {.block = block, .parent = parent};
    slot_of_[block] = slot;
    if (parent != kNoBlock && slots_[parent].children++ == 0) policy_.SetEvictable(parent, false);
    // Any fixed mapping of blocks to names will do; this one spreads them, as digests are spread.
    const std::uint64_t name = (std::uint64_t{block} + 1) * 0x9e3779b97f4a7c15u;
    policy_.OnInsert(
        slot,
        {.name = name, .parent = parent, .depth = static_cast<std::uint32_t>(depth), .tokens = tokens, .open = open});
  }

  EvictionPolicy& policy_;
  std::vector<BlockId> slot_of_;  // by block
  std::vector<Slot> slots_;
  std::vector<BlockId> free_;
  std::vector<BlockId> chain_;  // of the request at hand
  std::int64_t evictions_ = 0;
};

template <typename IsStored>
std::size_t LeadingHits(std::span<const std::uint32_t> blocks, const IsStored& is_stored) {
  std::size_t n = 0;
  while (n < blocks.size() && is_stored(blocks[n])) ++n;
  return n;
}

double TokensPerBlock(const BlockTrace::Request& request) {
  return static_cast<double>(request.tokens) / static_cast<double>(std::max<std::size_t>(request.count, 1));
}

SimulationResult ResultOf(const BlockTrace& trace, std::int64_t capacity, double hits, std::int64_t evictions) {
  SimulationResult result;
  result.capacity_blocks = capacity;
  result.hit_tokens = std::llround(hits);
  result.hit_ratio = trace.tokens == 0 ? 0 : hits / static_cast<double>(trace.tokens);
  result.evictions = evictions;
  return result;
}

}  // namespace

SimulationResult Simulate(const BlockTrace& trace, EvictionPolicy& policy, std::int64_t capacity) {
  KVS_CHECK(capacity >= 1);
  Cache cache(policy, trace.unique_blocks);
  double hits = 0;
  for (const BlockTrace::Request& request : trace.requests) {
    const auto blocks = trace.BlocksOf(request);
    const std::size_t found = LeadingHits(blocks, [&](std::uint32_t block) { return cache.Contains(block); });
    const double tokens = TokensPerBlock(request);
    hits += static_cast<double>(found) * tokens;
    const bool open = request.tokens < static_cast<std::int64_t>(request.count) * trace.block_tokens;
    cache.Use(blocks, found, static_cast<std::uint32_t>(std::llround(tokens)), open);
    cache.EvictDownTo(static_cast<std::size_t>(capacity));
  }
  return ResultOf(trace, capacity, hits, cache.evictions());
}

SimulationResult SimulateBelady(const BlockTrace& trace, std::int64_t capacity) {
  KVS_CHECK(capacity >= 1);
  std::vector<std::uint32_t> next_use(trace.blocks.size());  // request that uses the block next, by access
  std::vector<std::uint32_t> upcoming(trace.unique_blocks, kNever);
  for (std::size_t r = trace.requests.size(); r-- > 0;) {
    const auto& request = trace.requests[r];
    for (std::size_t i = 0; i < request.count; ++i) {
      next_use[request.first + i] = upcoming[trace.blocks[request.first + i]];
    }
    for (std::uint32_t block : trace.BlocksOf(request)) upcoming[block] = static_cast<std::uint32_t>(r);
  }

  std::vector<std::uint32_t> stored_until(trace.unique_blocks, kNever);  // next use; kNever: not stored
  std::size_t stored = 0;
  std::int64_t evictions = 0;
  // Farthest next use first, then the deeper block. Entries that no longer agree with stored_until are stale.
  std::priority_queue<std::tuple<std::uint32_t, std::uint32_t, std::uint32_t>> farthest;
  double hits = 0;
  for (const BlockTrace::Request& request : trace.requests) {
    const auto blocks = trace.BlocksOf(request);
    const std::size_t found = LeadingHits(blocks, [&](std::uint32_t block) { return stored_until[block] != kNever; });
    hits += static_cast<double>(found) * TokensPerBlock(request);
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const std::uint32_t block = blocks[i];
      const std::uint32_t next = next_use[request.first + i];
      stored += next != kNever;
      stored -= stored_until[block] != kNever;
      stored_until[block] = next;
      if (next != kNever) farthest.emplace(next, static_cast<std::uint32_t>(i), block);
    }
    while (stored > static_cast<std::size_t>(capacity)) {
      const auto [next, depth, block] = farthest.top();
      farthest.pop();
      if (stored_until[block] != next) continue;
      stored_until[block] = kNever;
      --stored;
      ++evictions;
    }
  }
  return ResultOf(trace, capacity, hits, evictions);
}

Result<SimulationResult> Simulate(const BlockTrace& trace, std::string_view policy, double pool_fraction) {
  if (!(pool_fraction > 0 && pool_fraction <= 1)) {
    return InvalidArgument("a pool fraction must be above 0 and at most 1, not " + std::to_string(pool_fraction));
  }
  const auto capacity = std::max<std::int64_t>(1, static_cast<std::int64_t>(trace.unique_blocks * pool_fraction));
  if (policy == "belady") return SimulateBelady(trace, capacity);
  KVS_ASSIGN_OR_RETURN(const auto instance, agentd::NewEvictionPolicy(policy, static_cast<std::size_t>(capacity)));
  return Simulate(trace, *instance, capacity);
}

}  // namespace kvshare::trace

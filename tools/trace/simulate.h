// What a pool of a given size would have hit on a trace: the daemon's eviction policies, and the clairvoyant bound, on
// block names alone. ../shared/traces/tools/ceilings.py is the reference for what a hit is and how LRU and Belady work.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "agentd/pool/eviction_policy.h"
#include "kvshare/status.h"
#include "tools/trace/block_trace.h"

namespace kvshare::trace {

struct SimulationResult {
  std::int64_t capacity_blocks = 0;
  std::int64_t hit_tokens = 0;  // rounded; a block holds an equal part of its prompt's tokens
  double hit_ratio = 0;         // of all prompt tokens
  std::int64_t evictions = 0;
};

// A hit is a chained prefix: leading blocks of the prompt that are all stored. A request is looked up, then all its
// blocks are stored, then blocks are evicted until `capacity` are left (>= 1).
SimulationResult Simulate(const BlockTrace& trace, agentd::EvictionPolicy& policy, std::int64_t capacity);

// Belady's MIN with bypass: the block whose next use is farthest goes first, the deeper one of two; what is never used
// again is not stored.
SimulationResult SimulateBelady(const BlockTrace& trace, std::int64_t capacity);

// `policy`: "belady" or one of EvictionPolicyNames(). `pool_fraction`: of the trace's unique blocks, in (0, 1].
// InvalidArgument naming the known policies, or the fraction.
Result<SimulationResult> Simulate(const BlockTrace& trace, std::string_view policy, double pool_fraction);

}  // namespace kvshare::trace

// EvictionPolicy: which stored block goes when room is needed. It knows blocks by small numbers and by the names of
// their content, never their KV, so that the pool and the trace simulator (tools/trace/simulate.h) run the same code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "kvshare/status.h"

namespace kvshare::agentd {

using BlockId = std::uint32_t;  // a page of the pool, or a slot of the simulator
inline constexpr BlockId kNoBlock = static_cast<BlockId>(-1);

// What a policy may know about a block when it is stored.
struct BlockInfo {
  std::uint64_t name = 0;     // of its content and all before it; the same whenever it is stored again
  BlockId parent = kNoBlock;  // the block before it, stored too
  std::uint32_t depth = 0;    // blocks before it
  std::uint32_t tokens = 0;   // that it holds
  bool open = false;          // partly filled, and of use only to a request that ends just there
};

// One thread. Blocks form chains: a block is of use only while all before it are stored, so its owner offers only
// leaves (SetEvictable). Every call is O(log capacity) per block or better, amortised; memory is bounded by the
// capacity. For a request: OnInsert for each block it stores, the first one first, and at its end OnRequest.
class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;

  virtual std::string_view name() const = 0;

  // `block` is stored from now on, and not evictable until SetEvictable says so.
  virtual void OnInsert(BlockId block, const BlockInfo& info) = 0;
  // A request has ended that used `chain`: consecutive blocks, all stored now, of which the first `found` were stored
  // before it.
  virtual void OnRequest(std::span<const BlockId> chain, std::size_t found) = 0;
  // Whether nothing holds it and nothing stored continues it. Idempotent.
  virtual void SetEvictable(BlockId block, bool evictable) = 0;
  // It is gone. `evicted`: because room was needed; then the policy may remember its name.
  virtual void OnRemove(BlockId block, bool evicted) = 0;
  // The evictable block that should go next; kNoBlock if there is none. May reorder the policy's own lists.
  virtual BlockId Victim() = 0;

  // For integrity checks.
  virtual bool IsEvictable(BlockId block) const = 0;
  virtual std::size_t num_evictable() const = 0;
};

// The policies by name: "lru", "s3fifo", "cost" and "default", which is what the daemon uses (docs/design/eviction.md).
// `capacity`: blocks that can be stored at once; ids are of that order. InvalidArgument naming the known ones.
Result<std::unique_ptr<EvictionPolicy>> NewEvictionPolicy(std::string_view name, std::size_t capacity);
std::span<const std::string_view> EvictionPolicyNames();

std::unique_ptr<EvictionPolicy> NewDefaultPolicy(std::size_t capacity);

}  // namespace kvshare::agentd

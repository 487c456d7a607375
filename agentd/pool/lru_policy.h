// Least recently used: the block whose last request ended longest ago goes first.
#pragma once

#include "agentd/pool/ranked_policy.h"

namespace kvshare::agentd {

class LruPolicy : public RankedPolicy<std::uint64_t> {
 public:
  using RankedPolicy::RankedPolicy;

  std::string_view name() const override { return "lru"; }
  void OnInsert(BlockId block, const BlockInfo&) override { SetRank(block, ++clock_); }
  void OnHit(BlockId) override {}
  // Releases come deepest first, so the end of a sequence is always older than its beginning.
  void OnRelease(BlockId block) override { SetRank(block, ++clock_); }

 private:
  std::uint64_t clock_ = 0;
};

}  // namespace kvshare::agentd

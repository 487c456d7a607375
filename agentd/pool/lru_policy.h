// Least recently used: the block whose last request ended longest ago goes first.
#pragma once

#include "agentd/pool/ranked_policy.h"

namespace kvshare::agentd {

class LruPolicy : public RankedPolicy<std::uint64_t> {
 public:
  std::string_view name() const override { return "lru"; }
  void OnInsert(BlockId block, const BlockInfo&) override { SetRank(block, ++clock_); }
  // The deepest is the oldest, so a sequence is taken from its end.
  void OnRequest(std::span<const BlockId> chain, std::size_t) override {
    for (std::size_t i = chain.size(); i-- > 0;) SetRank(chain[i], ++clock_);
  }

 private:
  std::uint64_t clock_ = 0;
};

}  // namespace kvshare::agentd

// Cost per byte (GreedyDual-Size-Frequency, Cherkasova 1998): a block is worth what computing it again costs, times how
// often it was used, per byte that it holds. All lose worth at the rate at which the pool turns over.
#pragma once

#include <vector>

#include "agentd/pool/ranked_policy.h"

namespace kvshare::agentd {

class CostPolicy : public RankedPolicy<double> {
 public:
  std::string_view name() const override { return "cost"; }
  void OnInsert(BlockId block, const BlockInfo& info) override;
  void OnRequest(std::span<const BlockId> chain, std::size_t found) override;
  void OnRemove(BlockId block, bool evicted) override;

 private:
  struct Entry {
    double worth = 0;  // of one use: cost per byte, relative to that of a first block
    double uses = 0;
    double rank = 0;
  };
  void Rank(BlockId block);

  std::vector<Entry> entries_;
  double age_ = 0;  // the rank of the last block evicted: what is new starts from here
};

}  // namespace kvshare::agentd

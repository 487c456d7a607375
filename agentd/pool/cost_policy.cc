#include "agentd/pool/cost_policy.h"

#include <algorithm>

namespace kvshare::agentd {
namespace {

// A token's cost is its linear layers, always the same, and attention over all before it. They are about equal here
// (in tokens) for models of a few thousand hidden channels.
constexpr double kAttentionParity = 16384;

}  // namespace

void CostPolicy::OnInsert(BlockId block, const BlockInfo& info) {
  if (block >= entries_.size()) entries_.resize(std::size_t{block} + 1);
  const double tokens_before = static_cast<double>(info.depth) * std::max<double>(info.tokens, 1);
  // Pages are of one size: cost per byte is cost per page, and a partly filled page is worth its part.
  entries_[block] = {.worth = 1 + tokens_before / kAttentionParity};
  Rank(block);
}

void CostPolicy::OnRequest(std::span<const BlockId> chain, std::size_t found) {
  for (std::size_t i = 0; i < chain.size(); ++i) {
    entries_[chain[i]].uses += i < found ? 1 : 0;
    Rank(chain[i]);
  }
}

void CostPolicy::Rank(BlockId block) {
  Entry& entry = entries_[block];
  entry.rank = age_ + entry.worth * (1 + entry.uses);
  SetRank(block, entry.rank);
}

void CostPolicy::OnRemove(BlockId block, bool evicted) {
  RankedPolicy::OnRemove(block, evicted);
  if (evicted) age_ = std::max(age_, entries_[block].rank);
}

}  // namespace kvshare::agentd

#include "agentd/pool/continuation_policy.h"

#include <algorithm>
#include <cmath>

namespace kvshare::agentd {
namespace {

constexpr std::size_t kGhostsPerBlock = 16;

// Credits, in turnovers of the pool. Fitted to the Mooncake conversation trace at a pool of 5 % of its blocks, and
// checked on the others at 1 to 50 % (docs/design/eviction.md has the numbers).
constexpr double kFirstTurn = 0.95;         // a sequence seen for the first time
constexpr double kFirstTurnLonger = 0.045;  // less for every doubling of its length
constexpr double kNextTurn = 1.3;           // a sequence that continues an earlier one
constexpr double kPerTurn = 0.3;            // more for every time it did
constexpr double kMuchNew = 0.35;     // less for every doubling of what is new in this turn: then it is a document
constexpr double kMuchNewFrom = 1.2;  // rather than a conversation
constexpr double kBranch = 0.15;      // what leaves an earlier sequence before its end
constexpr double kBranched = 1.75;    // what it has in common with it
constexpr double kShared = 2;         // what several sequences begin with
constexpr double kOpen = 0.006;       // of use only to the very same prompt
constexpr double kLeast = 0.02;
constexpr std::uint32_t kMostTurns = 8;

double Log2Of(std::size_t n) { return std::log2(1 + static_cast<double>(n)); }

}  // namespace

ContinuationPolicy::ContinuationPolicy(std::size_t capacity) : capacity_(std::max<std::size_t>(1, capacity)) {}

void ContinuationPolicy::OnInsert(BlockId block, const BlockInfo& info) {
  if (block >= entries_.size()) entries_.resize(std::size_t{block} + 1);
  Entry& entry = entries_[block];
  entry = {.name = info.name, .depth = info.depth, .open = info.open};
  if (const auto ghost = ghosts_.find(info.name); ghost != ghosts_.end()) {
    entry.history = ghost->second.history;
    entry.remembered = true;
    ghosts_.erase(ghost);
  }
  SetRank(block, now_);
}

void ContinuationPolicy::OnRequest(std::span<const BlockId> chain, std::size_t found) {
  if (chain.empty()) return;
  // Blocks that were seen before, stored or not.
  std::size_t known = found;
  while (known < chain.size() && entries_[chain[known]].remembered) ++known;
  const std::size_t fresh = chain.size() - known;
  const std::size_t length = entries_[chain[0]].depth + chain.size();

  // Where this sequence leaves what was there before.
  const History last = known > 0 ? entries_[chain[known - 1]].history : History{};
  const bool continues = known > 0 && last.from_end <= 1;
  const bool branches = !continues && known > 1;
  const std::uint32_t turns = continues ? std::min(last.turns + 1, kMostTurns) : 0;
  double credit = kFirstTurn - kFirstTurnLonger * (Log2Of(length) - 4);
  if (continues) credit = kNextTurn + kPerTurn * turns - kMuchNew * std::max(0.0, Log2Of(fresh) - kMuchNewFrom);
  if (branches) credit = kBranch;
  credit = std::max(credit, kLeast);

  now_ += chain.size();
  for (std::size_t i = chain.size(); i-- > 0;) {
    Entry& entry = entries_[chain[i]];
    double own = credit;
    if (i < known && !continues) own = std::max(own, kBranched);
    // Used much more often than where the sequence was left: other sequences begin with it, too.
    if (i < known && entry.history.uses > last.uses + last.uses / 2 + 1) own = std::max(own, kShared);
    if (entry.open) own = kOpen;
    entry.history = {
        .uses = entry.history.uses + 1, .turns = turns, .from_end = static_cast<std::uint32_t>(chain.size() - 1 - i)};
    entry.remembered = false;
    SetRank(chain[i], now_ + static_cast<std::uint64_t>(own * static_cast<double>(capacity_)));
  }
}

void ContinuationPolicy::OnRemove(BlockId block, bool evicted) {
  RankedPolicy::OnRemove(block, evicted);
  if (evicted) Remember(entries_[block]);
}

void ContinuationPolicy::Remember(const Entry& entry) {
  ghosts_[entry.name] = {.history = entry.history, .serial = ++serial_};
  ghost_order_.emplace_back(entry.name, serial_);
  const std::size_t most = kGhostsPerBlock * capacity_;
  // Names that came back stand in the order still, so its length, too, is bounded.
  while (ghosts_.size() > most || ghost_order_.size() > 2 * most) {
    const auto [name, serial] = ghost_order_.front();
    ghost_order_.pop_front();
    const auto ghost = ghosts_.find(name);
    if (ghost != ghosts_.end() && ghost->second.serial == serial) ghosts_.erase(ghost);
  }
}

}  // namespace kvshare::agentd

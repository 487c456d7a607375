#include "agentd/pool/continuation_policy.h"

#include <algorithm>
#include <cmath>

namespace kvshare::agentd {
namespace {

constexpr std::size_t kGhostsPerBlock = 16;
constexpr std::uint32_t kMostTurns = 200;

constexpr double kMuchNewTokens = 3400;  // in one turn: a document rather than an answer
constexpr double kAtOnce = 0;            // turnovers since the turn before: two copies of a request
constexpr double kLongAgo = 3.7;         // turnovers
constexpr double kLengthUnit = 512;      // tokens
constexpr int kLengths = 8, kTurns = 4, kShortTurns = 2, kGaps = 3;

enum Class : std::uint8_t {
  kOpen,                                    // of use only to the very same prompt
  kShared,                                  // what several sequences begin with
  kTrunk,                                   // what a branch has in common with the sequence it leaves
  kBranch,                                  // and what it has not
  kNew,                                     // sequences seen for the first time, by length
  kContinued = kNew + kLengths,             // sequences that continue an earlier one, by turns and gap
  kDocument = kContinued + kTurns * kGaps,  // the same with much that is new
  kEnd = kDocument + kShortTurns * kGaps,
};
static_assert(kEnd == ContinuationPolicy::kClasses);

// How much likelier than others they are to be used again, until there is evidence. Chosen with the constants of
// reuse_statistics.cc on the Mooncake conversation trace at a pool of 5 % of its blocks, and checked on the others at 1
// to 50 % (docs/design/eviction.md says what they do and do not change).
constexpr std::array<double, kEnd> AssumedOdds() {
  std::array<double, kEnd> odds{};
  odds[kOpen] = 0.13;
  odds[kShared] = 3;
  odds[kTrunk] = 3;
  odds[kBranch] = 0.1;
  double assumed = 0.9;
  for (int length = 0; length < kLengths; ++length, assumed *= 0.58) {
    odds[static_cast<std::size_t>(kNew + length)] = assumed;
  }
  assumed = 8;
  for (int turn = 0; turn < kTurns; ++turn, assumed *= 1.5) {
    for (int gap = 0; gap < kGaps; ++gap) odds[static_cast<std::size_t>(kContinued + turn * kGaps + gap)] = assumed;
  }
  for (int i = kDocument; i < kEnd; ++i) odds[static_cast<std::size_t>(i)] = 0.44;
  return odds;
}
constexpr std::array<double, kEnd> kAssumedOdds = AssumedOdds();

std::uint8_t ClassOfNew(double tokens) {
  const int length = static_cast<int>(std::log2(1 + tokens / kLengthUnit) / 2);
  return static_cast<std::uint8_t>(kNew + std::min(length, kLengths - 1));
}

std::uint8_t ClassOfContinued(std::uint32_t turns, double fresh_tokens, double gap_turnovers) {
  const int turn = turns >= 5 ? 3 : turns >= 3 ? 2 : static_cast<int>(turns) - 1;
  const int gap = gap_turnovers <= kAtOnce ? 0 : gap_turnovers <= kLongAgo ? 1 : 2;
  if (fresh_tokens <= kMuchNewTokens) return static_cast<std::uint8_t>(kContinued + turn * kGaps + gap);
  return static_cast<std::uint8_t>(kDocument + std::min(turn, kShortTurns - 1) * kGaps + gap);
}

}  // namespace

ContinuationPolicy::ContinuationPolicy(std::size_t capacity)
    : capacity_(std::max<std::size_t>(1, capacity)), statistics_(capacity_, kAssumedOdds) {}

void ContinuationPolicy::OnInsert(BlockId block, const BlockInfo& info) {
  if (block >= entries_.size()) entries_.resize(std::size_t{block} + 1);
  Entry& entry = entries_[block];
  entry = {.name = info.name, .stamp = ++clock_, .depth = info.depth, .open = info.open};
  if (!info.open) block_tokens_ = std::max(block_tokens_, info.tokens);
  if (const auto ghost = ghosts_.find(info.name); ghost != ghosts_.end()) {
    entry.history = ghost->second.history;
    entry.remembered = true;
    ghosts_.erase(ghost);
  }
}

void ContinuationPolicy::OnRequest(std::span<const BlockId> chain, std::size_t found) {
  if (chain.empty()) return;
  // Blocks that were seen before, stored or not.
  std::size_t known = found;
  while (known < chain.size() && entries_[chain[known]].remembered) ++known;
  const double fresh = static_cast<double>(chain.size() - known) * block_tokens_;
  const double length = static_cast<double>(entries_[chain[0]].depth + chain.size()) * block_tokens_;

  // Where this sequence leaves what was there before.
  const History last = known > 0 ? entries_[chain[known - 1]].history : History{};
  const bool continues = known > 0 && last.from_end <= 1;
  const bool branches = !continues && known > 1;
  const std::uint32_t turns = continues ? std::min(last.turns + 1, kMostTurns) : 0;
  const double gap = static_cast<double>(now_ - last.last) / static_cast<double>(capacity_);
  const std::uint8_t of_sequence = continues  ? ClassOfContinued(turns, fresh, gap)
                                   : branches ? static_cast<std::uint8_t>(kBranch)
                                              : ClassOfNew(length);

  for (BlockId block : chain) {
    statistics_.End(entries_[block].history.interval);
    entries_[block].history.interval = {};
  }
  for (std::size_t i = 0; i < chain.size(); ++i) statistics_.Advance();
  now_ += chain.size();
  // A request is one event, however long it is.
  const float weight = 1 / static_cast<float>(chain.size());
  for (std::size_t i = chain.size(); i-- > 0;) {
    Entry& entry = entries_[chain[i]];
    std::uint8_t klass = of_sequence;
    if (i < known && !continues) klass = kTrunk;
    // Used more often than this sequence had turns: other sequences begin with it, too.
    if (i < known && entry.history.uses > turns + 1) klass = kShared;
    if (entry.open) klass = kOpen;
    entry.history = {.uses = entry.history.uses + 1,
                     .turns = turns,
                     .from_end = static_cast<std::uint32_t>(chain.size() - 1 - i),
                     .last = now_,
                     .interval = statistics_.Begin(klass, weight)};
    entry.remembered = false;
    const bool evictable = entry.evictable;
    SetEvictable(chain[i], false);
    entry.klass = klass;
    entry.stamp = ++clock_;  // the deepest is the oldest, so a sequence is taken from its end
    SetEvictable(chain[i], evictable);
  }
}

void ContinuationPolicy::SetEvictable(BlockId block, bool evictable) {
  Entry& entry = entries_[block];
  if (entry.evictable == evictable) return;
  entry.evictable = evictable;
  if (evictable) {
    order_[entry.klass].insert({entry.stamp, block});
    ++num_evictable_;
  } else {
    order_[entry.klass].erase({entry.stamp, block});
    --num_evictable_;
  }
}

BlockId ContinuationPolicy::Victim() {
  BlockId victim = kNoBlock;
  std::pair<double, std::uint64_t> least;  // worth, and of equals the one used longest ago
  const auto offer = [&](const std::pair<std::uint64_t, BlockId>& candidate) {
    const std::pair worth(statistics_.Worth(entries_[candidate.second].history.interval), candidate.first);
    if (victim == kNoBlock || worth < least) {
      victim = candidate.second;
      least = worth;
    }
  };
  for (const auto& blocks : order_) {
    if (blocks.empty()) continue;
    offer(*blocks.begin());
    offer(*blocks.rbegin());
  }
  return victim;
}

void ContinuationPolicy::OnRemove(BlockId block, bool evicted) {
  SetEvictable(block, false);
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

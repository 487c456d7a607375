// Planner: decides, for every token of a prompt, whether its KV is reused or computed, and says why.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "agentd/engine/stats_book.h"
#include "agentd/pool/kv_pool.h"
#include "agentd/tiers/cold_tier.h"
#include "kvshare/types.h"

namespace kvshare::agentd {

// Why a prompt token is computed; docs/miss-reasons.md explains each to users.
enum class MissKind {
  kLastToken,
  kNeverStored,
  kMessagesChanged,
  kEvicted,
  kDisabled,
  kPoolFull,
  kModelChanged,
  kLoadSlower,
  kColdEvicted,
  kColdDamaged,
  kColdUnreadable,
  kMoveSlower,
  kNotTrusted,
  kOtherCompany,
  kExactAgent,
  kQualityGuard,
  kNoAnchor,
  kNotOnDevice
};
std::string_view MissKindName(MissKind kind);

enum class Tier { kHost, kCold };

enum class Fate {
  kExact,     // reused: a stored prefix
  kMoved,     // reused: stored elsewhere, repaired by the request's mode
  kDeclined,  // computed, although it was found elsewhere
  kFresh      // computed
};

// One stretch of the prompt with one fate.
struct PlanSpan {
  Fate fate = Fate::kFresh;
  std::int64_t start = 0;
  std::int64_t length = 0;
  AgentId source = 0;                      // reused: whose request stored it
  Tier tier = Tier::kHost;                 // reused: where it was found
  MissKind miss = MissKind::kNeverStored;  // computed
};

// Pages that memory lacks and the cold tier has, one after the other.
struct ColdRun {
  struct Page {
    Digest parent;
    Digest context;
    int tokens = 0;      // leading tokens that the prompt shares: 64, and 1..64 on the last page
    AgentId source = 0;  // whose request stored it
  };
  std::vector<Page> pages;

  std::int64_t tokens() const {
    return pages.empty() ? 0 : static_cast<std::int64_t>(pages.size() - 1) * kPageTokens + pages.back().tokens;
  }
};

// The longest prefix of some tokens that is stored anywhere.
//
//   tokens:  0 ............ host.full_tokens() ............ tokens() ......... n
//            |-- full pages in memory --|-- the host's tail, or --|-- not stored --|
//                                       |-- pages of the cold tier: what is longer --|
struct StoredPrefix {
  PrefixMatch host;  // without its tail where there is a cold run
  ColdRun cold;
  bool diverges = false;  // something stored shares these tokens, of at least one, and goes on differently

  std::int64_t tokens() const { return host.tokens() + cold.tokens(); }
  // No more than the first `tokens`.
  void Cut(std::int64_t tokens);
};

// tokens:  0 ............. stored.tokens() ............................... n-1 ... n
//          |-- reused: exact --|-- computed: a reason for each stretch --| last |
// Spans are in order and cover the prompt without gap or overlap; none is empty.
struct ReusePlan {
  StoredPrefix stored;
  std::vector<PlanSpan> spans;
  ReuseMode repair = ReuseMode::kExact;  // of the moved spans
  std::int64_t repaired = 0;             // tokens of the moved spans that were computed anew
  bool approximate = false;              // an answer's token came of moved KV
};

// Tokens before `end` that are stored and yet not reused, because of `why`.
struct Declined {
  std::int64_t end = 0;
  MissKind why = MissKind::kPoolFull;
};

// Looks at pool and tier as they are at each call; changes neither. The engine's thread; all must outlive it.
class Planner {
 public:
  // `cold` may be null.
  Planner(const KvPool* pool, const ColdTier* cold, StatsBook* names) : pool_(pool), cold_(cold), names_(names) {}

  // The longest stored prefix of `tokens`, whole or in memory alone.
  StoredPrefix Find(std::span<const TokenId> tokens) const;
  StoredPrefix FindInMemory(std::span<const TokenId> tokens) const;
  // What of a prompt may be reused: all but its last token, which is computed whatever is stored, because its output is
  // what the first generated token is drawn from. Nothing in mode off.
  StoredPrefix FindReusable(std::span<const TokenId> prompt, ReuseMode mode) const;

  // A fate for every token, when `stored` is what is reused. Requires a prompt of at least one token.
  ReusePlan Plan(std::span<const TokenId> prompt, ReuseMode mode, StoredPrefix stored, Declined declined = {}) const;

 private:
  void ExtendIntoCold(std::span<const TokenId> tokens, StoredPrefix* stored) const;
  AgentId SourceOf(const ColdEntry& entry) const { return names_->Intern(entry.page.source); }
  // Tokens of the prompt, from its beginning, that another space holds in the cold tier.
  std::int64_t TokensOfAnotherSpace(std::span<const TokenId> prompt) const;

  const KvPool* const pool_;
  const ColdTier* const cold_;
  StatsBook* const names_;
};

// prompt[fate.start, fate.start + fate.length) has this fate, whatever it had before.
void Mark(const PlanSpan& fate, ReusePlan* plan);
// The same of those tokens alone that are fresh and not the prompt's last: another reason for them.
void MarkFresh(const PlanSpan& fate, ReusePlan* plan);
// The moved spans were computed after all.
void MarkDeclined(MissKind why, ReusePlan* plan);

// The plan as replies and explanations give it.
ReuseReport ReportOf(const ReusePlan& plan);
Explanation ExplanationOf(const ReusePlan& plan, const StatsBook& names);

}  // namespace kvshare::agentd

// Planner: decides, for every token of a prompt, whether its KV is reused or computed, and says why.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "agentd/engine/stats_book.h"
#include "agentd/pool/kv_pool.h"
#include "kvshare/types.h"

namespace kvshare::agentd {

// Why a prompt token is computed; docs/miss-reasons.md explains each to users.
enum class MissKind { kLastToken, kNeverStored, kMessagesChanged, kEvicted, kDisabled, kPoolFull };
std::string_view MissKindName(MissKind kind);

// One stretch of the prompt with one fate.
struct PlanSpan {
  bool reused = false;
  std::int64_t start = 0;
  std::int64_t length = 0;
  AgentId source = 0;                      // reused: whose request stored it
  MissKind miss = MissKind::kNeverStored;  // not reused
};

// tokens:  0 ................. match.tokens() ......................... n-1 ... n
//          |-- reused: exact --|-- computed: a reason for each stretch --| last |
// Spans are in order and cover the prompt without gap or overlap; none is empty.
struct ReusePlan {
  PrefixMatch match;
  std::vector<PlanSpan> spans;
};

// Plans against the pool as it is now; changes nothing. Same thread as the pool. Requires a prompt of at least one
// token.
//
// The last token is computed whatever is stored: its output is what the first generated token is drawn from.
ReusePlan PlanReuse(const KvPool& pool, std::span<const TokenId> prompt, ReuseMode mode);

// The same plan without the copy of the partly matching page, for when the pool cannot hold source and copy together.
ReusePlan PlanWithoutTail(const KvPool& pool, std::span<const TokenId> prompt, const ReusePlan& plan);

// The plan as replies and explanations give it.
ReuseReport ReportOf(const ReusePlan& plan);
Explanation ExplanationOf(const ReusePlan& plan, const StatsBook& names);

}  // namespace kvshare::agentd

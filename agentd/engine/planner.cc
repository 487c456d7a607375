#include "agentd/engine/planner.h"

#include <algorithm>
#include <string>

#include "libkvshare/core/check.h"

namespace kvshare::agentd {
namespace {

class SpanList {
 public:
  void Reused(std::int64_t end, AgentId source) { Add({.reused = true, .source = source}, end); }
  void Missed(std::int64_t end, MissKind miss) { Add({.miss = miss}, end); }
  std::int64_t end() const { return end_; }
  std::vector<PlanSpan> Take() { return std::move(spans_); }

 private:
  // Appends [end(), end) with this fate; neighbours of one fate become one span.
  void Add(PlanSpan span, std::int64_t end) {
    if (end <= end_) return;
    span.start = end_;
    span.length = end - end_;
    end_ = end;
    if (!spans_.empty()) {
      PlanSpan& last = spans_.back();
      if (last.reused == span.reused && last.source == span.source && last.miss == span.miss) {
        last.length += span.length;
        return;
      }
    }
    spans_.push_back(span);
  }

  std::vector<PlanSpan> spans_;
  std::int64_t end_ = 0;
};

// Reasons for the tokens from spans.end() to the last: evicted where a page that held them is remembered, else `other`.
void ExplainMisses(const KvPool& pool, std::span<const TokenId> prompt, const PrefixMatch& match, MissKind other,
                   SpanList& spans) {
  const std::int64_t end = static_cast<std::int64_t>(prompt.size()) - 1;
  if (!pool.ghosts().empty()) {
    Digest parent = match.contexts.empty() ? pool.index().root() : match.contexts.back();
    for (std::int64_t start = match.full_tokens(); start < end; start += kPageTokens) {
      const auto rest = prompt.subspan(static_cast<std::size_t>(start));
      const auto page = rest.first(std::min<std::size_t>(rest.size(), kPageTokens));
      const auto held = static_cast<std::int64_t>(pool.ghosts().Lookup(parent, page));
      spans.Missed(std::min(end, start + held), MissKind::kEvicted);
      spans.Missed(std::min(end, start + kPageTokens), other);
      if (page.size() == kPageTokens) parent = ChainContext(parent, page);
    }
  }
  spans.Missed(end, other);
  spans.Missed(end + 1, MissKind::kLastToken);
}

std::vector<PlanSpan> SpansOf(const KvPool& pool, std::span<const TokenId> prompt, const PrefixMatch& match,
                              std::int64_t declined) {
  SpanList spans;
  for (const PageIndex page : match.pages) spans.Reused(spans.end() + kPageTokens, pool.index().Source(page));
  if (match.tail != kNoPage) spans.Reused(match.tokens(), pool.index().Source(match.tail));
  spans.Missed(spans.end() + declined, MissKind::kPoolFull);
  ExplainMisses(pool, prompt, match, match.diverges ? MissKind::kMessagesChanged : MissKind::kNeverStored, spans);
  return spans.Take();
}

}  // namespace

std::string_view MissKindName(MissKind kind) {
  switch (kind) {
    case MissKind::kLastToken: return "last_token";
    case MissKind::kNeverStored: return "never_stored";
    case MissKind::kMessagesChanged: return "messages_changed";
    case MissKind::kEvicted: return "evicted";
    case MissKind::kDisabled: return "disabled";
    case MissKind::kPoolFull: return "pool_full";
  }
  return "unknown";
}

ReusePlan PlanReuse(const KvPool& pool, std::span<const TokenId> prompt, ReuseMode mode) {
  KVS_CHECK(!prompt.empty());
  ReusePlan plan;
  if (mode == ReuseMode::kOff) {
    SpanList spans;
    spans.Missed(static_cast<std::int64_t>(prompt.size()) - 1, MissKind::kDisabled);
    spans.Missed(static_cast<std::int64_t>(prompt.size()), MissKind::kLastToken);
    plan.spans = spans.Take();
    return plan;
  }
  plan.match = pool.index().Find(prompt.first(prompt.size() - 1));
  plan.spans = SpansOf(pool, prompt, plan.match, 0);
  return plan;
}

ReusePlan PlanWithoutTail(const KvPool& pool, std::span<const TokenId> prompt, const ReusePlan& plan) {
  ReusePlan without;
  without.match = plan.match;
  without.match.DropTail();
  without.spans = SpansOf(pool, prompt, without.match, plan.match.tail_tokens);
  return without;
}

ReuseReport ReportOf(const ReusePlan& plan) {
  ReuseReport report;
  for (const PlanSpan& span : plan.spans) {
    if (span.reused) {
      report.prefix_tokens += span.length;
      continue;
    }
    report.fresh_tokens += span.length;
    const std::string_view reason = MissKindName(span.miss);
    const auto known = std::find_if(report.miss_reasons.begin(), report.miss_reasons.end(),
                                    [reason](const MissReason& miss) { return miss.reason == reason; });
    if (known != report.miss_reasons.end()) {
      known->tokens += span.length;
    } else {
      report.miss_reasons.push_back({.reason = std::string(reason), .tokens = span.length});
    }
  }
  return report;
}

Explanation ExplanationOf(const ReusePlan& plan, const StatsBook& names) {
  Explanation explanation;
  for (const PlanSpan& span : plan.spans) {
    ExplainSpan out;
    out.kind = span.reused ? "exact" : "fresh";
    out.start = span.start;
    out.length = span.length;
    if (span.reused) {
      out.source = names.AgentName(span.source);
      out.tier = "host";
      out.repair = "none";
    } else {
      out.miss_reason = MissKindName(span.miss);
    }
    explanation.spans.push_back(std::move(out));
  }
  return explanation;
}

}  // namespace kvshare::agentd

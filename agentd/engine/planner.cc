#include "agentd/engine/planner.h"

#include <algorithm>
#include <string>
#include <utility>

#include "libkvshare/core/check.h"

namespace kvshare::agentd {
namespace {

// Tokens of moved chunks that a repair policy chose to compute: a reason of replies, not of spans.
constexpr std::string_view kRepaired = "repaired";

class SpanList {
 public:
  void Reused(std::int64_t end, AgentId source, Tier tier) {
    Add({.fate = Fate::kExact, .source = source, .tier = tier}, end);
  }
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
      if (last.fate == span.fate && last.source == span.source && last.tier == span.tier && last.miss == span.miss) {
        last.length += span.length;
        return;
      }
    }
    spans_.push_back(span);
  }

  std::vector<PlanSpan> spans_;
  std::int64_t end_ = 0;
};

// Full pages of a stored prefix, and the context after them.
struct FullPart {
  std::int64_t tokens = 0;
  Digest context;
};

FullPart FullPartOf(const KvPool& pool, const StoredPrefix& stored) {
  FullPart full{.tokens = stored.host.full_tokens(), .context = pool.index().root()};
  if (!stored.host.contexts.empty()) full.context = stored.host.contexts.back();
  for (const ColdRun::Page& page : stored.cold.pages) {
    if (page.tokens < kPageTokens) break;
    full.tokens += kPageTokens;
    full.context = page.context;
  }
  return full;
}

// Reasons for the tokens from spans.end() to the last: evicted where a page that held them is remembered, else `other`.
void ExplainMisses(const KvPool& pool, std::span<const TokenId> prompt, const StoredPrefix& stored, MissKind other,
                   SpanList& spans) {
  const std::int64_t end = static_cast<std::int64_t>(prompt.size()) - 1;
  if (!pool.ghosts().empty()) {
    FullPart full = FullPartOf(pool, stored);
    for (std::int64_t start = full.tokens; start < end; start += kPageTokens) {
      const auto rest = prompt.subspan(static_cast<std::size_t>(start));
      const auto page = rest.first(std::min<std::size_t>(rest.size(), kPageTokens));
      const auto held = static_cast<std::int64_t>(pool.ghosts().Lookup(full.context, page));
      spans.Missed(std::min(end, start + held), MissKind::kEvicted);
      spans.Missed(std::min(end, start + kPageTokens), other);
      if (page.size() == kPageTokens) full.context = ChainContext(full.context, page);
    }
  }
  spans.Missed(end, other);
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
    case MissKind::kModelChanged: return "model_changed";
    case MissKind::kLoadSlower: return "load_slower_than_recompute";
    case MissKind::kColdEvicted: return "cold_evicted";
    case MissKind::kColdDamaged: return "cold_damaged";
    case MissKind::kColdUnreadable: return "cold_unreadable";
    case MissKind::kMoveSlower: return "move_slower_than_recompute";
    case MissKind::kNotTrusted: return "not_trusted";
    case MissKind::kOtherCompany: return "other_company";
    case MissKind::kExactAgent: return "exact_agent";
    case MissKind::kQualityGuard: return "quality_guard";
    case MissKind::kNoAnchor: return "no_anchor";
    case MissKind::kNotOnDevice: return "not_on_device";
  }
  return "unknown";
}

void StoredPrefix::Cut(std::int64_t tokens) {
  std::int64_t left = std::max<std::int64_t>(tokens - host.tokens(), 0);
  std::size_t kept = 0;
  for (; kept < cold.pages.size() && left > 0; ++kept) {
    ColdRun::Page& page = cold.pages[kept];
    page.tokens = static_cast<int>(std::min<std::int64_t>(page.tokens, left));
    left -= page.tokens;
  }
  cold.pages.resize(kept);
  host.Cut(tokens);
}

StoredPrefix Planner::FindInMemory(std::span<const TokenId> tokens) const {
  StoredPrefix stored;
  stored.host = pool_->index().Find(tokens);
  stored.diverges = stored.host.diverges;
  return stored;
}

StoredPrefix Planner::Find(std::span<const TokenId> tokens) const {
  StoredPrefix stored = FindInMemory(tokens);
  if (cold_ != nullptr) ExtendIntoCold(tokens, &stored);
  return stored;
}

StoredPrefix Planner::FindReusable(std::span<const TokenId> prompt, ReuseMode mode) const {
  if (mode == ReuseMode::kOff) return {};
  return Find(prompt.first(prompt.size() - 1));
}

void Planner::ExtendIntoCold(std::span<const TokenId> tokens, StoredPrefix* stored) const {
  ColdRun run;
  FullPart at = FullPartOf(*pool_, *stored);
  auto rest = tokens.subspan(static_cast<std::size_t>(at.tokens));
  bool diverges = false;
  while (rest.size() >= kPageTokens) {
    const auto page = rest.first(kPageTokens);
    const Digest context = ChainContext(at.context, page);
    if (!cold_->Contains(context)) break;
    const Result<ColdEntry> entry = cold_->Find(context);
    if (!entry.ok()) break;  // evicted just now
    run.pages.push_back({.parent = at.context, .context = context, .tokens = kPageTokens, .source = SourceOf(*entry)});
    at.context = context;
    rest = rest.subspan(kPageTokens);
  }
  const ColdTail tail = rest.empty()
                            ? ColdTail{}
                            : cold_->FindTail(at.context, rest.first(std::min<std::size_t>(rest.size(), kPageTokens)));
  if (tail.tokens > 0) {
    const Result<ColdEntry> entry = cold_->Find(tail.context);
    if (entry.ok()) {
      run.pages.push_back(
          {.parent = at.context, .context = tail.context, .tokens = tail.tokens, .source = SourceOf(*entry)});
      diverges = static_cast<std::size_t>(tail.tokens) < rest.size() &&
                 entry->page.tokens.size() > static_cast<std::size_t>(tail.tokens);
    }
  }
  // What stands in memory already is never loaded.
  if (run.tokens() <= stored->host.tail_tokens) return;
  stored->host.DropTail();
  stored->cold = std::move(run);
  stored->diverges = diverges;
}

std::int64_t Planner::TokensOfAnotherSpace(std::span<const TokenId> prompt) const {
  std::int64_t tokens = 0;
  Digest chain = ContentChainRoot();
  while (prompt.size() >= kPageTokens) {
    chain = ContentChain(chain, prompt.first(kPageTokens));
    if (!cold_->StoredUnderAnotherSpace(chain)) break;
    tokens += kPageTokens;
    prompt = prompt.subspan(kPageTokens);
  }
  return tokens;
}

ReusePlan Planner::Plan(std::span<const TokenId> prompt, ReuseMode mode, StoredPrefix stored, Declined declined) const {
  KVS_CHECK(!prompt.empty());
  const auto last = static_cast<std::int64_t>(prompt.size()) - 1;
  SpanList spans;
  if (mode == ReuseMode::kOff) {
    spans.Missed(last, MissKind::kDisabled);
  } else {
    const PrefixMatch& host = stored.host;
    for (const PageIndex page : host.pages) {
      spans.Reused(spans.end() + kPageTokens, pool_->index().Source(page), Tier::kHost);
    }
    if (host.tail != kNoPage) spans.Reused(host.tokens(), pool_->index().Source(host.tail), Tier::kHost);
    for (const ColdRun::Page& page : stored.cold.pages) {
      spans.Reused(spans.end() + page.tokens, page.source, Tier::kCold);
    }
    spans.Missed(std::min(declined.end, last), declined.why);
    MissKind other = stored.diverges ? MissKind::kMessagesChanged : MissKind::kNeverStored;
    if (other == MissKind::kNeverStored && cold_ != nullptr && stored.tokens() < last) {
      spans.Missed(std::min(TokensOfAnotherSpace(prompt), last), MissKind::kModelChanged);
    }
    ExplainMisses(*pool_, prompt, stored, other, spans);
  }
  spans.Missed(last + 1, MissKind::kLastToken);
  ReusePlan plan;
  plan.stored = std::move(stored);
  plan.spans = spans.Take();
  return plan;
}

void Mark(const PlanSpan& fate, ReusePlan* plan) {
  const std::int64_t end = fate.start + fate.length;
  std::vector<PlanSpan> spans;
  const auto add = [&spans](PlanSpan span, std::int64_t from, std::int64_t to) {
    if (from >= to) return;
    span.start = from;
    span.length = to - from;
    spans.push_back(span);
  };
  for (const PlanSpan& span : plan->spans) {
    const std::int64_t span_end = span.start + span.length;
    add(span, span.start, std::min(span_end, fate.start));
    if (span.start <= fate.start && fate.start < span_end) add(fate, fate.start, end);
    add(span, std::max(span.start, end), span_end);
  }
  plan->spans = std::move(spans);
}

void MarkFresh(const PlanSpan& fate, ReusePlan* plan) {
  for (const PlanSpan& span : std::vector<PlanSpan>(plan->spans)) {
    const std::int64_t begin = std::max(span.start, fate.start);
    const std::int64_t end = std::min(span.start + span.length, fate.start + fate.length);
    if (span.fate != Fate::kFresh || span.miss == MissKind::kLastToken || begin >= end) continue;
    PlanSpan part = fate;
    part.start = begin;
    part.length = end - begin;
    Mark(part, plan);
  }
}

void MarkDeclined(MissKind why, ReusePlan* plan) {
  for (PlanSpan& span : plan->spans) {
    if (span.fate == Fate::kMoved) span = {Fate::kDeclined, span.start, span.length, 0, Tier::kHost, why};
  }
  plan->repaired = 0;
}

ReuseReport ReportOf(const ReusePlan& plan) {
  ReuseReport report;
  const auto add_reason = [&report](std::string_view reason, std::int64_t tokens) {
    const auto known = std::find_if(report.miss_reasons.begin(), report.miss_reasons.end(),
                                    [reason](const MissReason& miss) { return miss.reason == reason; });
    if (known != report.miss_reasons.end()) {
      known->tokens += tokens;
    } else {
      report.miss_reasons.push_back({.reason = std::string(reason), .tokens = tokens});
    }
  };
  for (const PlanSpan& span : plan.spans) {
    switch (span.fate) {
      case Fate::kExact: report.prefix_tokens += span.length; continue;
      case Fate::kMoved: report.moved_tokens += span.length; continue;
      case Fate::kDeclined: report.recomputed_tokens += span.length; break;
      case Fate::kFresh: report.fresh_tokens += span.length; break;
    }
    add_reason(MissKindName(span.miss), span.length);
  }
  report.moved_tokens -= plan.repaired;
  report.recomputed_tokens += plan.repaired;
  if (plan.repaired > 0) add_reason(kRepaired, plan.repaired);
  report.approximate = plan.approximate;
  return report;
}

Explanation ExplanationOf(const ReusePlan& plan, const StatsBook& names) {
  Explanation explanation;
  for (const PlanSpan& span : plan.spans) {
    ExplainSpan out;
    out.start = span.start;
    out.length = span.length;
    if (span.fate == Fate::kExact || span.fate == Fate::kMoved) {
      const bool exact = span.fate == Fate::kExact;
      out.kind = exact ? "exact" : "moved";
      out.source = names.AgentName(span.source);
      out.tier = span.tier == Tier::kHost ? "host" : "cold";
      out.repair = exact ? "none" : ReuseModeName(plan.repair);
    } else {
      out.kind = "fresh";
      out.miss_reason = MissKindName(span.miss);
    }
    explanation.spans.push_back(std::move(out));
  }
  return explanation;
}

}  // namespace kvshare::agentd

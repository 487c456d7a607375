// Engine: what stands in a step, and which waiting request is next.
#include <algorithm>
#include <utility>

#include "agentd/engine/engine.h"
#include "libkvshare/core/check.h"

namespace kvshare::agentd {
namespace {

// Tokens of whole pages that both sequences begin with.
std::int64_t CommonPages(std::span<const TokenId> a, std::span<const TokenId> b) {
  const std::size_t longest = std::min(a.size(), b.size());
  const auto differ = std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(longest), b.begin());
  return (differ.first - a.begin()) / kPageTokens * kPageTokens;
}

}  // namespace

// Fills the step: a row for every sequence that generates, then prompts in order of admission. A waiting request is
// planned only when there are rows for it, so that it finds what was stored until this moment; but pages that must be
// loaded first can be on their way before there are.
void Engine::Plan() {
  work_.clear();
  std::int64_t rows_left = model_->max_batch_rows();
  for (const auto& sequence : running_) {
    if (!sequence->prefilling()) AddWork(sequence.get(), &rows_left);
  }
  std::int64_t prefill_left = std::min(rows_left, options_.prefill_chunk_tokens);
  for (const auto& sequence : running_) {
    if (!sequence->prefilling() || prefill_left == 0) continue;
    if (sequence->loading == 0 || MayOverlap(*sequence, prefill_left)) AddWork(sequence.get(), &prefill_left);
  }
  while (replan_ && (prefill_left > 0 || cold_ != nullptr)) replan_ = AdmitNext(&prefill_left);
}

void Engine::AddWork(Sequence* sequence, std::int64_t* row_budget) {
  // What is being loaded counts as computed here; Commit sees whether it is.
  const std::int64_t begin = sequence->loading != 0 ? sequence->plan.stored.tokens() : sequence->computed;
  const std::int64_t left = static_cast<std::int64_t>(sequence->tokens.size()) - begin;
  const std::int64_t count = std::min(left, *row_budget);
  KVS_CHECK(count > 0);
  *row_budget -= count;
  if (sequence->started == SteadyTime{}) sequence->started = std::chrono::steady_clock::now();
  work_.push_back({.sequence = sequence, .begin = begin, .count = count});
}

// Admits the waiting request whose turn it is, or has what it needs loaded first. False when neither can be done of any
// until something changes.
bool Engine::AdmitNext(std::int64_t* row_budget) {
  if (waiting_.empty() || static_cast<std::int64_t>(running_.size()) >= options_.max_running) return false;
  std::vector<StoredPrefix> stored;
  std::vector<Prospect> prospects;
  for (std::size_t i = 0; i < waiting_.window(); ++i) {
    const EngineRequest& request = waiting_.at(i);
    stored.push_back(planner_.FindReusable(request.prompt, request.reuse));
    prospects.push_back({.reusable = stored[i].tokens(),
                         .prompt = static_cast<std::int64_t>(request.prompt.size()),
                         .held = (IsLoadingChunks(request.id) && !MayComputeOverLoads(request, stored[i])) ||
                                 WorthWaitingFor(request, stored[i])});
  }
  bool first = true;
  for (const std::size_t i : waiting_.Order(prospects)) {
    const bool due = waiting_.IsDue(i);
    // Whoever found no room may have had others give pages up, and with them what had been found.
    StoredPrefix now =
        first ? std::move(stored[i]) : planner_.FindReusable(waiting_.at(i).prompt, waiting_.at(i).reuse);
    first = false;
    if (TryAdmit(i, prospects, std::move(now), row_budget)) return true;
    if (due) return false;  // whoever came later would take from it what it waits for
  }
  return false;
}

// True when a longer prefix of this prompt than what is stored is just being computed, or what is to be loaded is just
// being loaded, for somebody else: its pages will be there before this request could have them itself.
bool Engine::WorthWaitingFor(const EngineRequest& request, const StoredPrefix& stored) const {
  if (request.reuse == ReuseMode::kOff) return false;
  const auto reusable = std::span(request.prompt).first(request.prompt.size() - 1);
  for (const auto& sequence : running_) {
    if (!sequence->prefilling() || sequence->request.reuse == ReuseMode::kOff) continue;
    const std::int64_t have = sequence->loading != 0 ? stored.host.tokens() : stored.tokens();
    const auto prompt = std::span(sequence->tokens).first(static_cast<std::size_t>(sequence->prompt_tokens));
    if (CommonPages(reusable, prompt) > have) return true;
  }
  for (const auto& [id, promotion] : promotions_) {
    const auto end = static_cast<std::size_t>(promotion->start + promotion->run.tokens());
    if (CommonPages(reusable, std::span(promotion->tokens).first(end)) > stored.host.tokens()) return true;
  }
  return false;
}

// Whether what of it is on disk, if any is, comes sooner than it is computed.
bool Engine::PrefixPays(const StoredPrefix& stored) {
  if (stored.cold.pages.empty() || options_.always_load) return true;
  return costs_.ShouldLoad(stored.cold.tokens(), cold_->EstimateLoadSeconds(stored.cold.pages.size()));
}

// What the request would reuse, loads included where they are cheaper than computing.
ReusePlan Engine::PlanFor(const EngineRequest& request, StoredPrefix stored) {
  if (PrefixPays(stored)) return planner_.Plan(request.prompt, request.reuse, std::move(stored));
  const auto reusable = std::span(request.prompt).first(request.prompt.size() - 1);
  return planner_.Plan(request.prompt, request.reuse, planner_.FindInMemory(reusable),
                       {.end = stored.tokens(), .why = MissKind::kLoadSlower});
}

bool Engine::TryAdmit(std::size_t i, std::span<const Prospect> prospects, StoredPrefix stored,
                      std::int64_t* row_budget) {
  const EngineRequest& waiting = waiting_.at(i);
  if (IsLoadingChunks(waiting.id)) return TryAdmitOverLoads(i, prospects, stored, row_budget);
  MovedPlan moved = PlanWithLoads(waiting, stored);
  if (!moved.loads.empty()) {
    BeginChunkLoads(waiting, std::move(moved));
    return true;
  }
  if (moved.work.prompt != nullptr) {
    if (*row_budget == 0) return false;
    if (TryAdmitMoved(i, prospects, moved, row_budget)) return true;
    moved = {};  // no room for it; there may be for less
  }
  ReusePlan plan = moved.plan.has_value() ? *std::move(moved.plan) : PlanFor(waiting, std::move(stored));
  const bool loads = !plan.stored.cold.pages.empty();
  if (*row_budget == 0 && !loads) return false;
  Result<KvHandle> kv = pool_->Acquire(plan.stored.host, waiting.tokens_to_hold());
  if (!kv.ok() && plan.stored.host.tail != kNoPage) {
    const Declined tail = {.end = plan.stored.tokens(), .why = MissKind::kPoolFull};
    plan.stored.host.DropTail();
    plan = planner_.Plan(waiting.prompt, waiting.reuse, std::move(plan.stored), tail);
    kv = pool_->Acquire(plan.stored.host, waiting.tokens_to_hold());
  }
  if (!kv.ok() && (healer_.Yield() || moved_.Yield())) {
    return TryAdmit(i, prospects, planner_.FindReusable(waiting.prompt, waiting.reuse), row_budget);
  }
  if (!kv.ok()) {
    // An idle pool holds one full context beside what leases and pins may hold: NewService saw to it.
    KVS_CHECK(!running_.empty() || !promotions_.empty());
    return false;
  }

  Sequence* sequence = Admit(i, prospects, std::move(plan), std::move(*kv));
  sequence->distrusted = moved.distrusted;
  moved_.Admitted(moved.trial_rows);
  if (loads) {
    auto promotion = std::make_unique<Promotion>();
    promotion->tokens = sequence->tokens;
    promotion->start = sequence->computed;
    promotion->run = sequence->plan.stored.cold;
    promotion->sequence = sequence;
    BeginPromotion(std::move(promotion), sequence->kv);
  } else {
    AddWork(sequence, row_budget);
  }
  return true;
}

// From the queue to the running ones.
Sequence* Engine::Admit(std::size_t i, std::span<const Prospect> prospects, ReusePlan plan, KvHandle kv) {
  const bool loads = !plan.stored.cold.pages.empty();
  auto sequence = std::make_unique<Sequence>();
  sequence->request = waiting_.Take(i, prospects);
  if (!IsLoadingChunks(sequence->request.id)) chunk_loads_.erase(sequence->request.id);
  {
    const std::lock_guard lock(mutex_);
    --waiting_count_;
  }
  sequence->plan = std::move(plan);
  sequence->kv = std::move(kv);
  sequence->tokens = sequence->request.prompt;
  sequence->tokens.reserve(static_cast<std::size_t>(sequence->request.tokens_to_hold() + 1));
  sequence->prompt_tokens = static_cast<std::int64_t>(sequence->request.prompt.size());
  sequence->published = sequence->plan.stored.host.pages.size();
  sequence->computed = loads ? sequence->plan.stored.host.full_tokens() : sequence->plan.stored.host.tokens();
  if (model_->tokenizer() != nullptr) sequence->text.emplace(model_->tokenizer(), sequence->request.stop);
  RememberPlan(*sequence);
  if (cold_ != nullptr) {
    for (const Digest& context : sequence->plan.stored.host.contexts) cold_->Touch(context);
  }
  running_.push_back(std::move(sequence));
  return running_.back().get();
}

}  // namespace kvshare::agentd

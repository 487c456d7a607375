// Engine: prompts whose parts stand elsewhere (agentd/repair). Such a prompt is computed by itself, between two steps;
// the tokens generated after it share steps with everybody's. What it computes is approximate and is stored nowhere,
// until the guard has it computed exactly: then it is a sequence like any other.
#include <algorithm>
#include <cmath>
#include <utility>

#include "agentd/engine/engine.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"
#include "runtime/sampler.h"

namespace kvshare::agentd {
namespace {

MissKind KindOf(std::string_view reason) {
  for (const MissKind kind : {MissKind::kNoAnchor, MissKind::kQualityGuard, MissKind::kColdEvicted,
                              MissKind::kColdDamaged, MissKind::kColdUnreadable, MissKind::kPoolFull}) {
    if (reason == MissKindName(kind)) return kind;
  }
  return MissKind::kMoveSlower;
}

// Tokens that may follow a prompt and need a place.
std::int64_t NewTokens(const EngineRequest& request) {
  return request.tokens_to_hold() - static_cast<std::int64_t>(request.prompt.size());
}

}  // namespace

// What a request that may be answered approximately would take from its session. Nothing where only the prompt is asked
// for: that is stored, so it must be exact. Disk::kAsMemory: what has to be loaded counts as if it were there;
// kOnTheWay: the same, and pages are named where they are being loaded to; otherwise nothing is moved while a prefix is
// to be loaded. `gone`: why what the session has seen is not in memory.
Engine::MovedPlan Engine::PlanMoved(const EngineRequest& request, const StoredPrefix& stored, Disk disk,
                                    MissKind gone) {
  MovedPlan moved;
  if (request.reuse == ReuseMode::kOff || request.reuse == ReuseMode::kExact) return moved;
  if (request.session == nullptr || request.max_tokens == 0) return moved;
  RecallSession(*request.session);
  if (request.reuse == ReuseMode::kKvcomm) moved_.anchors().Of(*request.session);  // what is on disk is on its way
  if (disk == Disk::kUnread && !stored.cold.pages.empty()) return moved;
  OnTheWay on_the_way;
  if (disk == Disk::kOnTheWay) {
    on_the_way = [&](std::span<const TokenId> run, const StoredPrefix& there) {
      return PagesOnTheWay(request.id, run, there);
    };
  }
  FoundChunks found = moved_.Find(request, stored.tokens(), NewTokens(request),
                                  disk == Disk::kUnread ? nullptr : &planner_, on_the_way);
  if (found.chunks.empty() && found.strays.empty() && found.gone.empty()) return moved;
  if (found.chunks.empty() && !stored.cold.pages.empty()) return moved;  // PlanFor decides on the prefix
  StoredPrefix exact = stored;
  if (!found.chunks.empty()) exact.Cut(found.chunks.front().chunk.start);
  ReusePlan& plan = moved.plan.emplace(planner_.Plan(request.prompt, request.reuse, exact));
  plan.repair = request.reuse;
  for (const FoundChunk& found_chunk : found.chunks) {
    const MovedChunk& chunk = found_chunk.chunk;
    Mark({.fate = Fate::kMoved,
          .start = chunk.start,
          .length = chunk.length,
          .source = found_chunk.source,
          .tier = found_chunk.tier},
         &plan);
  }
  for (const FoundChunk& stray : found.strays) {
    const MovedChunk& chunk = stray.chunk;
    Mark({.fate = Fate::kDeclined, .start = chunk.start, .length = chunk.length, .miss = MissKind::kOtherCompany},
         &plan);
  }
  for (const auto& [start, length] : found.gone) MarkFresh({.start = start, .length = length, .miss = gone}, &plan);
  if (found.chunks.empty()) return moved;
  MissKind why = MissKind::kExactAgent;
  if (!request.exact_agent || request.reuse != ReuseMode::kAuto) {
    moved.loads = std::move(found.loads);
    moved.work = moved_.Prepare(request, exact, found, disk == Disk::kOnTheWay ? RowsWhileLoading(request) : 0);
    why = MissKind::kNotOnDevice;
  }
  if (moved.work.prompt != nullptr && moved.work.prompt->RunsOnBackend()) {
    const auto plain = static_cast<std::int64_t>(request.prompt.size()) - stored.tokens();
    const MovedReuse::Decision decision = moved_.Decide(request, *moved.work.prompt, plain, costs_.moved_row());
    moved.trial_rows = decision.trial_rows;
    moved.distrusted = decision.distrusted;
    if (decision.use) {
      if (!stored.cold.pages.empty()) {
        const auto prefix = request.prompt.begin() + static_cast<std::ptrdiff_t>(stored.tokens());
        // First: the prompt can be computed over chunks that are on their way, but not over such a prefix.
        moved.loads.insert(moved.loads.begin(),
                           {.tokens = {request.prompt.begin(), prefix}, .pages = stored.cold.pages.size()});
      }
      // In memory is what needs no load.
      moved.saved = plain + stored.cold.tokens() - static_cast<std::int64_t>(std::ceil(decision.rows));
      return moved;
    }
    why = decision.distrusted ? MissKind::kNotTrusted : MissKind::kMoveSlower;
  }
  moved.work = {};
  moved.loads.clear();
  if (exact.tokens() < stored.tokens() || !stored.cold.pages.empty()) {
    moved.plan.reset();  // all that is stored is worth more, and what is on disk is decided on by PlanFor
  } else {
    MarkDeclined(why, &plan);
  }
  return moved;
}

bool Engine::TryAdmitMoved(std::size_t i, std::span<const Prospect> prospects, MovedPlan& moved,
                           std::int64_t* row_budget) {
  MovedPrompt& prompt = *moved.work.prompt;
  const EngineRequest& waiting = waiting_.at(i);
  const std::int64_t new_tokens = NewTokens(waiting);
  const PrefixMatch& prefix = moved.plan->stored.host;
  Result<KvHandle> kv = pool_->Acquire(prefix, prefix.full_tokens() + prompt.PagesNeeded(new_tokens) * kPageTokens);
  if (!kv.ok()) return false;
  pool_->Extend(*kv, prefix.full_tokens() + prompt.PagesToBegin(new_tokens) * kPageTokens);
  arena_->ExpectUse(pool_->high_water());
  const auto own = kv->pages().subspan(prefix.pages.size());
  prompt.GivePages({own.begin(), own.end()}, new_tokens);
  pool_->ReleaseTail(*kv);  // copied
  *row_budget = std::max<std::int64_t>(0, *row_budget - prompt.RowsToCompute());
  Sequence* sequence = Admit(i, prospects, *std::move(moved.plan), std::move(*kv));
  sequence->moved = std::move(moved.work);
  moved_.Admitted(moved.trial_rows);
  return true;
}

// The prompts that were admitted to be computed over moved chunks.
void Engine::ComputeMoved() {
  bool computed = false;
  for (const auto& running : running_) {
    Sequence& sequence = *running;
    if (sequence.moved.prompt == nullptr || !sequence.prefilling()) continue;
    computed = true;
    arena_->ExpectUse(pool_->high_water());
    GrowLogits(1);
    sequence.started = std::chrono::steady_clock::now();
    MovedPrompt& prompt = *sequence.moved.prompt;
    GateChunkLoads(sequence);
    Status status = prompt.Prefill(logits_.data());
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - sequence.started).count();
    if (status.ok() && sequence.request.reuse == ReuseMode::kAuto) {
      costs_.MeasuredMoved(prompt.RowsToCompute(), seconds - gate_.waited_seconds());
    }
    const std::optional<MissKind> lost = EndChunkLoads(sequence);
    const auto row = std::span(logits_).first(static_cast<std::size_t>(model_->config().vocab_size));
    // Whatever was wrong with reusing, computing may still work.
    if (!status.ok() || (lost.has_value() && !prompt.counts().exact)) {
      status = ComputeExactly(sequence, logits_.data(), MissKindName(lost.value_or(MissKind::kQualityGuard)));
    } else if (prompt.Doubtful(row)) {
      status = SendBack(sequence, row);
    }
    if (status.ok()) status = runtime::CheckLogits(row);
    if (!status.ok()) {
      Fail(sequence, status.WithContext("computing the prompt"));
      continue;
    }
    sequence.computed = sequence.prompt_tokens;
    sequence.plan.repaired = prompt.counts().exact ? 0 : prompt.counts().recomputed;
    if (prompt.counts().exact) BecomeExact(sequence);
    sequence.plan.approximate = sequence.moved.prompt != nullptr;
    RememberPlan(sequence);
    replan_ = true;
    if (sequence.moved.prompt != nullptr) {
      sequence.audits.push_back({.at = sequence.prompt_tokens, .logits = {row.begin(), row.end()}});
      sequence.one_thread = prompt.OneThread();
      for (const MovedChunk& chunk : prompt.chunks()) sequence.depth = std::max(sequence.depth, chunk.depth + 1);
    }
    AcceptToken(sequence, runtime::SampleToken(row, sequence.request.sampling, sequence.generated()));
    Teach(sequence);  // after the first token, which nobody waits for any more
  }
  DropEnded();
  if (computed) PublishLoad();
}

// The session's anchors learn from a prompt that was computed although its chunks were found. Until then these, and the
// prompt's pages, stay as they are.
void Engine::Teach(Sequence& sequence) {
  if (sequence.lesson.prompt == nullptr) return;
  sequence.lesson.prompt->Teach(sequence.kv.pages());
  moved_.anchors().Taught(*sequence.request.session);
  sequence.lesson = {};
}

// The guard does not trust an answer's next token: all up to it is computed, and the sequence goes on as an exact one.
Status Engine::Recompute(Sequence& sequence, std::span<float> logits) {
  KVS_CHECK(sequence.moved.prompt->tokens() == sequence.computed);
  const Status status = SendBack(sequence, logits);
  if (!status.ok()) return status;
  BecomeExact(sequence);
  RememberPlan(sequence);
  return status;
}

// `logits` are doubtful: they become exact, and how far they were from it is an audit that costs nothing.
Status Engine::SendBack(Sequence& sequence, std::span<float> logits) {
  const std::vector<float> doubtful(logits.begin(), logits.end());
  KVS_RETURN_IF_ERROR(ComputeExactly(sequence, logits.data(), MissKindName(MissKind::kQualityGuard)));
  moved_.Audited(sequence.moved.prompt->OneThread(), anchors::Margin(doubtful),
                 anchors::KlDivergence(logits, doubtful));
  return OkStatus();
}

// Keeps what the answer's next token was chosen by, beside the first one's: of all after that, in the end, one at
// random, each as likely as any other (reservoir sampling).
void Engine::MayAudit(Sequence& sequence, std::span<const float> logits) {
  const std::int64_t later = sequence.generated();  // >= 1
  if (std::uniform_int_distribution<std::int64_t>(1, later)(audit_draw_) != 1) return;
  sequence.audits.resize(2);
  sequence.audits[1].at = sequence.computed;
  sequence.audits[1].logits.assign(logits.begin(), logits.end());
}

// With the pages that were promised for it.
Status Engine::ComputeExactly(Sequence& sequence, float* logits, std::string_view reason) {
  const std::size_t given = sequence.kv.pages().size();
  pool_->Extend(sequence.kv, sequence.request.tokens_to_hold());
  arena_->ExpectUse(pool_->high_water());
  sequence.moved.prompt->GiveMorePages(sequence.kv.pages().subspan(given));
  return sequence.moved.prompt->Recompute(logits, reason);
}

void Engine::BecomeExact(Sequence& sequence) {
  const RepairCounts& counts = sequence.moved.prompt->counts();
  KVS_CHECK(counts.exact);
  const MissKind why = KindOf(counts.reason);
  // Computing over chunks may also have failed, before any token was looked at: that says nothing of answers.
  if (why == MissKind::kQualityGuard && std::isfinite(sequence.moved.prompt->least_margin())) {
    moved_.Answered(sequence.request, *sequence.moved.prompt);
    stats_->SentBack();
  }
  MarkDeclined(why, &sequence.plan);
  if (sequence.moved.prompt->HasLesson()) sequence.lesson = std::move(sequence.moved);
  sequence.moved = {};
  Publish(sequence);
  Record(sequence);
}

// An approximate answer is given: what it stands on stays for the session's next; what of it is exact, its lead, is
// left to be stored like any other.
void Engine::KeepMoved(Sequence& sequence) {
  const MovedPrompt& prompt = *sequence.moved.prompt;
  const auto done = std::span(sequence.tokens).first(static_cast<std::size_t>(sequence.computed));
  moved_.Answered(sequence.request, prompt);
  sequence.kept = moved_.Keep(sequence.request, done, prompt, sequence.kv);
  sequence.computed = prompt.lead_tokens();
}

// And what it stands on is computed exactly when there is time.
void Engine::HealLater(Sequence& sequence) {
  HealJob job;
  job.tokens = sequence.tokens;
  job.prompt_tokens = sequence.prompt_tokens;
  job.agent = sequence.request.agent;
  job.session = sequence.request.session;
  job.audits = std::move(sequence.audits);
  job.guarded = sequence.request.reuse == ReuseMode::kAuto;
  job.one_thread = sequence.one_thread;
  job.depth = sequence.depth;
  job.kept = sequence.kept;
  healer_.Add(std::move(job));
}

// What this answer would have been over its chunks is looked at when there is time.
void Engine::ShadowLater(Sequence& sequence) {
  const std::int64_t watched = std::min(sequence.generated(), MovedPrompt::kGuardedTokens);
  if (sequence.first_logits.empty() || watched == 0) return;
  ShadowJob job;
  job.request.prompt = sequence.request.prompt;
  job.request.agent = sequence.request.agent;
  job.request.session = sequence.request.session;
  job.request.reuse = sequence.request.reuse;
  job.stored = sequence.plan.stored.host.tokens();
  const auto answer = sequence.tokens.begin() + sequence.prompt_tokens;
  job.answer.assign(answer, answer + watched);
  job.logits = std::move(sequence.first_logits);
  shadow_.Add(std::move(job));
}

Healer::Events Engine::HealerEvents() {
  Healer::Events events;
  events.on_stored = [this](PageIndex page, const HealJob& job) { demoter_.Computed(page, job.session); };
  events.on_healed = [this](const HealJob& job) {
    stats_->Healed();
    moved_.Healed(*job.session, job.tokens, job.agent, job.kept);
    PublishLoad();
  };
  events.on_audit = [this](const HealJob& job, const AuditPoint& point, double kl) {
    const std::int64_t token = point.at - job.prompt_tokens;
    stats_->Audited(job.depth, /*later=*/token > 0, kl);
    // One audit of each answer: more would not be independent, which the guard's confidence stands on.
    if (job.guarded && token == 0) moved_.Audited(job.one_thread, anchors::Margin(point.logits), kl);
  };
  return events;
}

// What is computed of it can be found by its session from now on.
void Engine::Record(const Sequence& sequence) {
  if (sequence.request.session == nullptr || sequence.request.reuse == ReuseMode::kOff) return;
  RecallSession(*sequence.request.session);
  moved_.Record(*sequence.request.session,
                std::span(sequence.tokens).first(static_cast<std::size_t>(sequence.computed)), sequence.request.agent);
}

}  // namespace kvshare::agentd

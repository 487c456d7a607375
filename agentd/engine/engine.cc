#include "agentd/engine/engine.h"

#include <algorithm>
#include <future>
#include <string>
#include <utility>

#include "libkvshare/core/check.h"
#include "runtime/sampler.h"

namespace kvshare::agentd {
namespace {

// Plans kept for `explain --request`.
constexpr std::size_t kRememberedPlans = 1024;

// Rows of logits there is room for at start; more companions make it grow once.
constexpr std::int64_t kFirstLogitRows = 16;

double Milliseconds(SteadyTime from, SteadyTime to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}

}  // namespace

Engine::Engine(runtime::Model* model, KvPool* pool, PageArena* arena, StatsBook* stats, const EngineOptions& options)
    : model_(model), pool_(pool), arena_(arena), stats_(stats), options_(options) {
  KVS_CHECK(options.max_running >= 1 && options.max_waiting >= 1 && options.prefill_chunk_tokens >= 1);
  KVS_CHECK(options.max_running <= model->max_batch_rows());
  GrowLogits(std::min(options.max_running, kFirstLogitRows));  // touched here, not in a request
  PublishLoad();
  thread_ = std::thread([this] { Run(); });
}

Engine::~Engine() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    draining_ = true;
  }
  inbox_changed_.notify_one();
  thread_.join();
}

Result<std::uint64_t> Engine::Submit(EngineRequest request) {
  std::uint64_t id = 0;
  {
    const std::lock_guard lock(mutex_);
    if (draining_) return Unavailable("the daemon is shutting down and takes no new requests");
    if (waiting_count_ >= options_.max_waiting) {
      return ResourceExhausted("the queue is full: " + std::to_string(waiting_count_) +
                               " requests are waiting; try again later");
    }
    id = request.id = next_id_++;
    arrived_.push_back(std::move(request));
    ++waiting_count_;
    ++outstanding_count_;
  }
  inbox_changed_.notify_one();
  return id;
}

void Engine::Cancel(std::uint64_t request_id) {
  {
    const std::lock_guard lock(mutex_);
    if (outstanding_count_ == 0) return;  // so that cancelling what has ended cannot fill the inbox
    cancelled_.push_back(request_id);
  }
  inbox_changed_.notify_one();
}

void Engine::OnEngineThread(const std::function<void()>& task) {
  std::promise<void> done;
  {
    const std::lock_guard lock(mutex_);
    tasks_.push_back([&] {
      task();
      done.set_value();
    });
  }
  inbox_changed_.notify_one();
  done.get_future().wait();
}

Explanation Engine::Explain(std::span<const TokenId> prompt, ReuseMode mode) {
  Explanation explanation;
  OnEngineThread([&] { explanation = ExplanationOf(PlanReuse(*pool_, prompt, mode), *stats_); });
  return explanation;
}

Result<Explanation> Engine::ExplainRequest(std::uint64_t request_id) {
  Result<Explanation> result = NotFound("request " + std::to_string(request_id) + " is not among the last " +
                                        std::to_string(kRememberedPlans) + " requests that were started");
  OnEngineThread([&] {
    const auto plan = plans_.find(request_id);
    if (plan != plans_.end()) result = ExplanationOf({.match = {}, .spans = plan->second}, *stats_);
  });
  return result;
}

void Engine::ClearPool() {
  OnEngineThread([&] {
    pool_->Clear();
    PublishLoad();
  });
}

Status Engine::CheckIntegrity() {
  Status status;
  OnEngineThread([&] { status = pool_->CheckIntegrity(); });
  return status;
}

void Engine::Drain() {
  std::unique_lock lock(mutex_);
  draining_ = true;
  all_ended_.wait(lock, [this] { return outstanding_count_ == 0; });
}

void Engine::Run() {
  while (Step()) {
  }
  const Status stopped = Unavailable("the daemon stopped before this request was done");
  for (const auto& sequence : running_) Fail(*sequence, stopped);
  DropEnded();
  for (const EngineRequest& request : std::exchange(waiting_, {})) FailWaiting(request, stopped);
}

bool Engine::Step() {
  if (!Receive()) return false;
  Plan();
  if (work_.empty()) return true;
  Materialize();
  const Status forward = Forward();
  Commit(forward);
  return true;
}

// Takes what other threads left in the inbox; sleeps only when there is nothing to do at all.
bool Engine::Receive() {
  std::vector<EngineRequest> arrived;
  std::vector<std::uint64_t> cancelled;
  std::vector<std::function<void()>> tasks;
  bool stopping = false;
  {
    std::unique_lock lock(mutex_);
    inbox_changed_.wait(lock, [this] {
      return !running_.empty() || !waiting_.empty() || !arrived_.empty() || !cancelled_.empty() || !tasks_.empty() ||
             stopping_;
    });
    arrived.swap(arrived_);
    cancelled.swap(cancelled_);
    tasks.swap(tasks_);
    stopping = stopping_;
  }
  for (EngineRequest& request : arrived) waiting_.push_back(std::move(request));
  EndLateAndCancelled(cancelled);
  for (const auto& task : tasks) task();
  return !stopping;
}

void Engine::EndLateAndCancelled(const std::vector<std::uint64_t>& cancelled) {
  const SteadyTime now = std::chrono::steady_clock::now();
  const auto verdict = [&](const EngineRequest& request) -> Status {
    if (std::find(cancelled.begin(), cancelled.end(), request.id) != cancelled.end()) {
      return Cancelled("the request was cancelled");
    }
    if (now >= request.deadline) return DeadlineExceeded("the request's timeout passed before it was done");
    return OkStatus();
  };
  for (const auto& sequence : running_) {
    if (const Status status = verdict(sequence->request); !status.ok()) Fail(*sequence, status);
  }
  DropEnded();
  std::erase_if(waiting_, [&](const EngineRequest& request) {
    const Status status = verdict(request);
    if (!status.ok()) FailWaiting(request, status);
    return !status.ok();
  });
}

// Fills the step: a row for every sequence that generates, then prompts in order of arrival. A waiting request is
// planned only when there are rows for it, so that it finds what was stored until this moment.
void Engine::Plan() {
  work_.clear();
  std::int64_t rows_left = model_->max_batch_rows();
  for (const auto& sequence : running_) {
    if (!sequence->prefilling()) AddWork(sequence.get(), &rows_left);
  }
  std::int64_t prefill_left = std::min(rows_left, options_.prefill_chunk_tokens);
  for (const auto& sequence : running_) {
    if (sequence->prefilling() && prefill_left > 0) AddWork(sequence.get(), &prefill_left);
  }
  while (prefill_left > 0 && AdmitNext(&prefill_left)) {
  }
}

void Engine::AddWork(Sequence* sequence, std::int64_t* row_budget) {
  const std::int64_t left = static_cast<std::int64_t>(sequence->tokens.size()) - sequence->computed;
  const std::int64_t count = std::min(left, *row_budget);
  KVS_CHECK(count > 0);
  *row_budget -= count;
  work_.push_back({.sequence = sequence, .begin = sequence->computed, .count = count});
}

bool Engine::AdmitNext(std::int64_t* row_budget) {
  if (waiting_.empty() || static_cast<std::int64_t>(running_.size()) >= options_.max_running) return false;
  EngineRequest& request = waiting_.front();
  ReusePlan plan = PlanReuse(*pool_, request.prompt, request.reuse);
  if (WorthWaitingFor(request, plan.match)) return false;
  const auto prompt_tokens = static_cast<std::int64_t>(request.prompt.size());
  // The last generated token is never an input, so it needs no place.
  const std::int64_t tokens_to_hold = prompt_tokens + request.max_tokens - 1;
  Result<KvHandle> kv = pool_->Acquire(plan.match, tokens_to_hold);
  if (!kv.ok() && plan.match.tail != kNoPage) {
    plan = PlanWithoutTail(*pool_, request.prompt, plan);
    kv = pool_->Acquire(plan.match, tokens_to_hold);
  }
  if (!kv.ok()) {
    KVS_CHECK(!running_.empty());  // an idle pool holds one full context: NewService saw to it
    return false;
  }

  auto sequence = std::make_unique<Sequence>();
  sequence->request = std::move(request);
  waiting_.pop_front();
  {
    const std::lock_guard lock(mutex_);
    --waiting_count_;
  }
  sequence->plan = std::move(plan);
  sequence->kv = std::move(*kv);
  sequence->tokens = sequence->request.prompt;
  sequence->tokens.reserve(static_cast<std::size_t>(tokens_to_hold + 1));
  sequence->computed = sequence->plan.match.tokens();
  sequence->prompt_tokens = prompt_tokens;
  if (model_->tokenizer() != nullptr) sequence->text.emplace(model_->tokenizer(), sequence->request.stop);
  sequence->started = std::chrono::steady_clock::now();
  RememberPlan(*sequence);
  AddWork(sequence.get(), row_budget);
  running_.push_back(std::move(sequence));
  return true;
}

// True when a running request is just computing a longer prefix of this prompt than what is stored: its pages will be
// there before this request could have computed them itself, at half the work.
bool Engine::WorthWaitingFor(const EngineRequest& request, const PrefixMatch& match) const {
  if (request.reuse == ReuseMode::kOff) return false;
  const auto reusable = static_cast<std::int64_t>(request.prompt.size()) - 1;
  for (const auto& sequence : running_) {
    if (!sequence->prefilling() || sequence->request.reuse == ReuseMode::kOff) continue;
    const auto longest = static_cast<std::size_t>(std::min(reusable, sequence->prompt_tokens));
    const auto differ =
        std::mismatch(request.prompt.begin(), request.prompt.begin() + static_cast<std::ptrdiff_t>(longest),
                      sequence->tokens.begin());
    const std::int64_t common = differ.first - request.prompt.begin();
    if (common / kPageTokens * kPageTokens > match.tokens()) return true;
  }
  return false;
}

// Makes real what was planned: page tables long enough for this step's rows, and private copies of partly matching
// pages.
void Engine::Materialize() {
  for (const Work& work : work_) {
    KvHandle& kv = work.sequence->kv;
    pool_->Extend(kv, work.begin + work.count);
    if (kv.tail() == kNoPage) continue;
    model_->backend().CopyPageRows(arena_->pages(), kv.tail(), kv.pages()[work.sequence->plan.match.pages.size()],
                                   kv.tail_tokens());
    pool_->ReleaseTail(kv);
  }
  arena_->ExpectUse(pool_->high_water());
}

Status Engine::Forward() {
  batch_.ids.clear();
  batch_.positions.clear();
  batch_.slots.clear();
  batch_.segments.clear();
  batch_.logit_rows.clear();
  for (Work& work : work_) {
    const Sequence& sequence = *work.sequence;
    const auto pages = sequence.kv.pages();
    const auto row_begin = static_cast<std::int64_t>(batch_.ids.size());
    for (std::int64_t t = work.begin; t < work.begin + work.count; ++t) {
      batch_.ids.push_back(sequence.tokens[static_cast<std::size_t>(t)]);
      batch_.positions.push_back(t);
      batch_.slots.push_back(
          {.page = pages[static_cast<std::size_t>(t / kPageTokens)], .offset = static_cast<int>(t % kPageTokens)});
    }
    // One segment from position 0, whoever computed its pages: where splits fall, and so the bits, is the same for all.
    kernels::KvSegment segment;
    segment.length = work.begin + work.count;
    segment.pages = pages.first(static_cast<std::size_t>((segment.length + kPageTokens - 1) / kPageTokens));
    segment.row_begin = row_begin;
    segment.row_end = row_begin + work.count;
    batch_.segments.push_back(segment);
    if (work.begin + work.count == static_cast<std::int64_t>(sequence.tokens.size())) {
      work.logits_row = static_cast<std::int64_t>(batch_.logit_rows.size());
      batch_.logit_rows.push_back(segment.row_end - 1);
    }
  }
  GrowLogits(static_cast<std::int64_t>(batch_.logit_rows.size()));
  return model_->Forward(batch_, arena_->pages(), batch_.logit_rows.empty() ? nullptr : logits_.data());
}

void Engine::GrowLogits(std::int64_t rows) {
  const auto needed = static_cast<std::size_t>(rows * model_->config().vocab_size);
  if (logits_.size() < needed) logits_.resize(needed);
}

void Engine::Commit(const Status& forward) {
  const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
  for (const Work& work : work_) {
    Sequence& sequence = *work.sequence;
    if (!forward.ok()) {
      Fail(sequence, forward.WithContext("forward step"));
      continue;
    }
    const bool was_prefilling = sequence.prefilling();
    sequence.computed += work.count;
    if (was_prefilling && sequence.request.reuse != ReuseMode::kOff) {
      pool_->Publish(sequence.kv, std::span(sequence.tokens).first(static_cast<std::size_t>(sequence.computed)),
                     sequence.request.agent);
    }
    if (work.logits_row < 0) continue;
    const auto row = std::span(logits_).subspan(static_cast<std::size_t>(work.logits_row) * vocab, vocab);
    AcceptToken(sequence, runtime::SampleToken(row, sequence.request.sampling, sequence.generated()));
  }
  DropEnded();
  PublishLoad();
}

void Engine::AcceptToken(Sequence& sequence, TokenId token) {
  sequence.last_token = std::chrono::steady_clock::now();
  if (sequence.generated() == 0 && sequence.first_token == SteadyTime{}) sequence.first_token = sequence.last_token;
  const std::vector<TokenId>& eos = model_->config().eos_ids;
  if (!sequence.request.ignore_eos && std::find(eos.begin(), eos.end(), token) != eos.end()) {
    Complete(sequence, FinishReason::kStop, {});
    return;
  }
  sequence.tokens.push_back(token);
  const bool stopped = sequence.text.has_value() && sequence.text->Push(token);
  TokenChunk chunk;
  chunk.ids.push_back(token);
  if (stopped) {
    Complete(sequence, FinishReason::kStop, std::move(chunk));
  } else if (sequence.generated() == sequence.request.max_tokens) {
    Complete(sequence, FinishReason::kLength, std::move(chunk));
  } else {
    if (sequence.text.has_value()) chunk.text = sequence.text->TakeDelta();
    sequence.request.sink->OnChunk(std::move(chunk));
  }
}

void Engine::Complete(Sequence& sequence, FinishReason reason, TokenChunk last_chunk) {
  GenerateReply reply;
  if (sequence.text.has_value()) {
    sequence.text->Finish();
    last_chunk.text = sequence.text->TakeDelta();
    reply.text = sequence.text->text();
  }
  reply.request_id = sequence.request.id;
  reply.ids.assign(sequence.tokens.begin() + sequence.prompt_tokens, sequence.tokens.end());
  reply.finish_reason = reason;
  reply.prompt_tokens = sequence.prompt_tokens;
  reply.reuse = ReportOf(sequence.plan);
  const EngineRequest& request = sequence.request;
  reply.timings.queue_ms = Milliseconds(request.arrival, sequence.started);
  reply.timings.ttft_ms = Milliseconds(request.arrival, sequence.first_token);
  reply.timings.prompt_ms = Milliseconds(sequence.started, sequence.first_token);
  reply.timings.predicted_ms = Milliseconds(sequence.first_token, sequence.last_token);

  // All is stored and counted before the caller can know: its next call finds both.
  stats_->Completed(request.agent, reply);
  EndSequence(sequence);
  PublishLoad();
  if (!last_chunk.ids.empty() || !last_chunk.text.empty()) request.sink->OnChunk(std::move(last_chunk));
  request.sink->OnDone(std::move(reply));
  RequestEnded();
}

void Engine::Fail(Sequence& sequence, const Status& status) {
  stats_->Failed();
  EndSequence(sequence);
  PublishLoad();
  sequence.request.sink->OnError(status);
  RequestEnded();
}

void Engine::FailWaiting(const EngineRequest& request, const Status& status) {
  {
    const std::lock_guard lock(mutex_);
    --waiting_count_;
  }
  stats_->Failed();
  PublishLoad();
  request.sink->OnError(status);
  RequestEnded();
}

// Whatever was computed is good KV, also of a request that failed: it is stored, unless the request wanted no reuse.
void Engine::EndSequence(Sequence& sequence) {
  sequence.ended = true;
  if (sequence.request.reuse == ReuseMode::kOff) {
    sequence.kv = KvHandle();
    return;
  }
  const auto done = std::span(sequence.tokens).first(static_cast<std::size_t>(sequence.computed));
  pool_->Retire(std::move(sequence.kv), done, sequence.request.agent);
}

void Engine::DropEnded() {
  std::erase_if(running_, [](const auto& sequence) { return sequence->ended; });
}

void Engine::RememberPlan(const Sequence& sequence) {
  plans_[sequence.request.id] = sequence.plan.spans;
  plan_order_.push_back(sequence.request.id);
  if (plan_order_.size() <= kRememberedPlans) return;
  plans_.erase(plan_order_.front());
  plan_order_.pop_front();
}

void Engine::PublishLoad() {
  const PoolUsage usage = pool_->usage();
  const auto page_bytes = static_cast<std::int64_t>(model_->kv_layout().page_bytes());
  PoolStats pool;
  pool.capacity_bytes = usage.total * page_bytes;
  pool.pages = usage.total - usage.free;
  pool.used_bytes = pool.pages * page_bytes;
  pool.leases = usage.pinned;
  pool.evictions = usage.evictions;
  const auto running = std::count_if(running_.begin(), running_.end(), [](const auto& s) { return !s->ended; });
  std::int64_t waiting = 0;
  {
    const std::lock_guard lock(mutex_);
    waiting = waiting_count_;
  }
  stats_->SetLoad(running, waiting, pool);
}

void Engine::RequestEnded() {
  const std::lock_guard lock(mutex_);
  if (--outstanding_count_ == 0) all_ended_.notify_all();
}

}  // namespace kvshare::agentd

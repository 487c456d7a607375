// Engine: what a step has brought, and how requests end.
#include <algorithm>
#include <utility>

#include "agentd/engine/engine.h"
#include "libkvshare/core/check.h"
#include "runtime/sampler.h"

namespace kvshare::agentd {
namespace {

double Milliseconds(SteadyTime from, SteadyTime to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}

}  // namespace

void Engine::Commit(const Status& forward) {
  const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
  for (const Work& work : work_) {
    Sequence& sequence = *work.sequence;
    if (sequence.loading != 0) EndPromotion(sequence.loading);
    if (sequence.computed < work.begin) continue;  // not all that the rows were computed over has come: once more
    const auto row = work.logits_row < 0
                         ? std::span<float>()
                         : std::span(logits_).subspan(static_cast<std::size_t>(work.logits_row) * vocab, vocab);
    Status status = forward;
    // What no token can be chosen by is not stored, either. An answer over chunks may be right when it is computed.
    if (status.ok() && !row.empty() && sequence.moved.prompt == nullptr) status = runtime::CheckLogits(row);
    if (!status.ok()) {
      Fail(sequence, status.WithContext("forward step"));
      continue;
    }
    const bool was_prefilling = sequence.prefilling();
    sequence.computed += work.count;
    if (was_prefilling) {
      Publish(sequence);
      if (!sequence.prefilling()) Record(sequence);
      replan_ = true;  // rows are free again, and others may find what was stored
    }
    if (!row.empty()) {
      if (sequence.moved.prompt != nullptr && sequence.moved.prompt->Doubtful(row)) {
        status = Recompute(sequence, row);
        if (status.ok()) status = runtime::CheckLogits(row);
        if (!status.ok()) {
          Fail(sequence, status.WithContext("computing the prompt"));
          continue;
        }
      }
      if (sequence.moved.prompt != nullptr) MayAudit(sequence, row);
      if (sequence.distrusted && sequence.generated() == 0) sequence.first_logits.assign(row.begin(), row.end());
      AcceptToken(sequence, runtime::SampleToken(row, sequence.request.sampling, sequence.generated()));
    } else if (!sequence.prefilling()) {
      sequence.first_token = sequence.last_token = std::chrono::steady_clock::now();
      Complete(sequence, FinishReason::kLength, {});  // only the prompt was asked for
    }
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
  const bool approximate = sequence.moved.prompt != nullptr;
  EndSequence(sequence);
  if (approximate) HealLater(sequence);
  if (sequence.distrusted) ShadowLater(sequence);
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
  chunk_loads_.erase(request.id);
  {
    const std::lock_guard lock(mutex_);
    --waiting_count_;
  }
  stats_->Failed();
  PublishLoad();
  request.sink->OnError(status);
  RequestEnded();
}

// The full pages that are complete so far.
void Engine::Publish(Sequence& sequence) {
  if (sequence.request.reuse == ReuseMode::kOff) return;
  const auto done = std::span(sequence.tokens).first(static_cast<std::size_t>(sequence.computed));
  pool_->Publish(sequence.kv, done, sequence.request.agent);
  for (; sequence.published < done.size() / kPageTokens; ++sequence.published) {
    demoter_.Computed(sequence.kv.pages()[sequence.published], sequence.request.session);
  }
}

// Whatever was computed is good KV, also of a request that failed: it is stored, unless the request wanted no reuse.
void Engine::EndSequence(Sequence& sequence) {
  sequence.ended = true;
  replan_ = true;
  if (sequence.loading != 0) {
    // Its pages are being written to. They stay where they are, and are stored, when that is done.
    Promotion& promotion = *promotions_.at(sequence.loading);
    promotion.kv = std::move(sequence.kv);
    promotion.sequence = nullptr;
    return;
  }
  Teach(sequence);  // if its first token was its last
  if (sequence.moved.prompt != nullptr) {
    // Also where the answer ended before its first token: what was computed over chunks is never stored as exact.
    if (!sequence.prefilling()) KeepMoved(sequence);
    sequence.moved = {};
  }
  if (sequence.request.reuse == ReuseMode::kOff || sequence.computed == 0) {
    sequence.kv = KvHandle();
    return;
  }
  Publish(sequence);
  Record(sequence);
  const auto done = std::span(sequence.tokens).first(static_cast<std::size_t>(sequence.computed));
  const std::size_t full = done.size() / kPageTokens;
  const PageIndex last = full < sequence.kv.pages().size() ? sequence.kv.pages()[full] : kNoPage;
  pool_->Retire(std::move(sequence.kv), done, sequence.request.agent);
  if (last != kNoPage && pool_->index().Contains(last)) demoter_.Computed(last, sequence.request.session);
}

void Engine::DropEnded() {
  std::erase_if(running_, [](const auto& sequence) { return sequence->ended; });
}

void Engine::PublishLoad() {
  const PoolUsage usage = pool_->usage();
  const auto page_bytes = static_cast<std::int64_t>(model_->kv_layout().page_bytes());
  Load load;
  load.pool.capacity_bytes = usage.total * page_bytes;
  load.pool.pages = usage.total - usage.free;
  load.pool.used_bytes = load.pool.pages * page_bytes;
  load.pool.leases = std::max<std::int64_t>(0, usage.pinned - healer_.pages() - moved_.kept_pages());
  load.pool.evictions = usage.evictions;
  load.pinned_bytes = usage.retained * page_bytes;
  load.client_leases = leases_.leases();
  load.kept_bytes = moved_.kept_pages() * page_bytes;
  load.guard_margin = moved_.margin(/*one_thread=*/true);
  load.guard_margin_elsewhere = moved_.margin(/*one_thread=*/false);
  load.moved_row = costs_.moved_row();
  load.running = std::count_if(running_.begin(), running_.end(), [](const auto& s) { return !s->ended; });
  {
    const std::lock_guard lock(mutex_);
    load.waiting = waiting_count_;
  }
  stats_->SetLoad(load);
}

void Engine::RequestEnded() {
  const std::lock_guard lock(mutex_);
  if (--outstanding_count_ == 0) all_ended_.notify_all();
}

}  // namespace kvshare::agentd

#include "agentd/engine/healer.h"

#include <algorithm>
#include <utility>

#include "anchors/confidence.h"

namespace kvshare::agentd {

void Healer::Add(HealJob job) {
  if (jobs_.size() == kMaxJobs) jobs_.pop_front();
  jobs_.push_back(std::move(job));
}

bool Healer::Work() {
  if (!current_.has_value() && !Begin()) return false;
  const auto n = static_cast<std::int64_t>(current_->tokens.size());
  // A step ends before an audited token: its last row says what that should have been.
  const AuditPoint* point = audited_ < current_->audits.size() ? &current_->audits[audited_] : nullptr;
  const std::int64_t end = std::min(point != nullptr ? point->at : n, computed_ + kRowsPerStep);
  std::vector<float> logits;
  if (point != nullptr && end == point->at) logits.resize(point->logits.size());
  if (!Compute(end, logits.empty() ? nullptr : logits.data()).ok()) {
    End();
    return true;
  }
  if (!logits.empty()) {
    events_.on_audit(*current_, *point, anchors::KlDivergence(logits, point->logits));
    ++audited_;
  }
  Store();
  if (computed_ == n) {
    events_.on_healed(*current_);
    End();
  }
  return true;
}

// False when no job is left.
bool Healer::Begin() {
  while (!jobs_.empty()) {
    HealJob job = std::move(jobs_.front());
    jobs_.pop_front();
    const auto tokens = std::span<const TokenId>(job.tokens);
    PrefixMatch match = pool_->index().Find(tokens.first(static_cast<std::size_t>(job.prompt_tokens) - 1));
    match.DropTail();
    Result<KvHandle> kv = pool_->Acquire(match, static_cast<std::int64_t>(tokens.size()));
    if (!kv.ok()) continue;  // no room: it is done without
    kv_ = std::move(*kv);
    computed_ = match.full_tokens();
    stored_ = match.pages.size();
    audited_ = 0;
    current_ = std::move(job);
    return true;
  }
  return false;
}

// Rows [computed_, end); the last one's logits, if wanted.
Status Healer::Compute(std::int64_t end, float* logits) {
  pool_->Extend(kv_, end);
  arena_->ExpectUse(pool_->high_water());
  batch_ = {};
  const auto pages = kv_.pages();
  for (std::int64_t t = computed_; t < end; ++t) {
    batch_.ids.push_back(current_->tokens[static_cast<std::size_t>(t)]);
    batch_.positions.push_back(t);
    batch_.slots.push_back(
        {.page = pages[static_cast<std::size_t>(t / kPageTokens)], .offset = static_cast<int>(t % kPageTokens)});
  }
  batch_.segments.push_back({.pages = pages.first(static_cast<std::size_t>((end + kPageTokens - 1) / kPageTokens)),
                             .length = end,
                             .row_end = end - computed_});
  if (logits != nullptr) batch_.logit_rows.push_back(end - computed_ - 1);
  const Status status = model_->Forward(batch_, arena_->pages(), logits);
  if (status.ok()) computed_ = end;
  return status;
}

void Healer::Store() {
  const auto done = std::span<const TokenId>(current_->tokens).first(static_cast<std::size_t>(computed_));
  pool_->Publish(kv_, done, current_->agent);
  const std::size_t full = done.size() / kPageTokens;
  for (; stored_ < full; ++stored_) events_.on_stored(kv_.pages()[stored_], *current_);
}

// What is computed stays stored, the partly filled last page too.
void Healer::End() {
  const auto done = std::span<const TokenId>(current_->tokens).first(static_cast<std::size_t>(computed_));
  const std::size_t full = done.size() / kPageTokens;
  const PageIndex last = full < kv_.pages().size() ? kv_.pages()[full] : kNoPage;
  pool_->Retire(std::move(kv_), done, current_->agent);
  if (last != kNoPage && pool_->index().Contains(last)) events_.on_stored(last, *current_);
  current_.reset();
}

bool Healer::Yield() {
  if (!current_.has_value()) return false;
  End();
  return true;
}

void Healer::Clear() {
  jobs_.clear();
  current_.reset();
  kv_ = KvHandle();
}

}  // namespace kvshare::agentd

#include "agentd/engine/shadow_auditor.h"

#include <algorithm>
#include <span>
#include <utility>

#include "anchors/confidence.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {

void ShadowAuditor::Add(ShadowJob job) {
  if (jobs_.size() == kMaxJobs) jobs_.pop_front();
  jobs_.push_back(std::move(job));
}

bool ShadowAuditor::Work() {
  if (jobs_.empty()) return false;
  ShadowJob job = std::move(jobs_.front());
  jobs_.pop_front();
  // Whatever fails is done without; only who was interrupted tries again.
  const Status status = Audit(job);
  if (status.code() == StatusCode::kCancelled && ++job.tries < kMaxTries) jobs_.push_front(std::move(job));
  return true;
}

Status ShadowAuditor::Audit(const ShadowJob& job) {
  // The answer's last token is not computed: what comes after it nobody looks at.
  const auto given = std::span(job.answer).first(job.answer.size() - 1);
  const auto new_tokens = static_cast<std::int64_t>(given.size());
  FoundChunks found = moved_->Find(job.request, job.stored, new_tokens, nullptr, nullptr);
  if (found.chunks.empty()) return NotFound("its chunks are not in memory any more");
  // What is in front of them has been computed since, exactly.
  const auto lead = static_cast<std::size_t>(found.chunks.front().chunk.start);
  StoredPrefix stored = {.host = pool_->index().Find(std::span(job.request.prompt).first(lead))};
  PrefixMatch& prefix = stored.host;
  prefix.DropTail();
  const MovedWork work = moved_->Prepare(job.request, stored, found, 0);
  MovedPrompt& prompt = *work.prompt;
  KVS_ASSIGN_OR_RETURN(KvHandle kv,
                       pool_->Acquire(prefix, prefix.full_tokens() + prompt.PagesToBegin(new_tokens) * kPageTokens));
  pool_->Extend(kv, prefix.full_tokens() + prompt.PagesToBegin(new_tokens) * kPageTokens);
  arena_->ExpectUse(pool_->high_water());
  const auto own = kv.pages().subspan(prefix.pages.size());
  prompt.GivePages({own.begin(), own.end()}, new_tokens);
  prompt.Interruptible(kRowsPerStep, go_on_);

  const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
  std::vector<float> logits(job.answer.size() * vocab);
  KVS_RETURN_IF_ERROR(prompt.Prefill(logits.data()));
  if (!given.empty()) KVS_RETURN_IF_ERROR(prompt.Append(given, logits.data() + vocab));
  // Of all of them, whether or not the guard would have stopped at one: how often answers miss a margin will be asked
  // of other margins than today's.
  double least = anchors::Margin(std::span(logits).first(vocab));
  const double first = least;
  for (std::size_t row = 1; row < job.answer.size(); ++row) {
    least = std::min(least, anchors::Margin(std::span(logits).subspan(row * vocab, vocab)));
  }
  const double kl = anchors::KlDivergence(job.logits, std::span(logits).first(vocab));
  moved_->Watched(prompt.OneThread(), least);
  moved_->Audited(prompt.OneThread(), first, kl);
  on_audit_(kl);
  return OkStatus();
}

}  // namespace kvshare::agentd

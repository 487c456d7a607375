#include "bench/quality/exact_prefill.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "libkvshare/core/status_macros.h"

namespace kvshare::quality {

ExactPrefill::ExactPrefill(runtime::Model* model, std::unique_ptr<kernels::Buffer> memory,
                           std::vector<kernels::PageIndex> table, const ExactOptions& options)
    : model_(model), memory_(std::move(memory)), table_(std::move(table)), options_(options) {
  options_.piece_rows = std::clamp<std::int64_t>(options_.piece_rows, 1, model->max_batch_rows());
}

Result<std::unique_ptr<ExactPrefill>> ExactPrefill::New(runtime::Model* model, const PrefillLimits& limits,
                                                        const ExactOptions& options) {
  const auto pages = static_cast<std::size_t>((limits.max_tokens + kernels::kPageTokens - 1) / kernels::kPageTokens);
  KVS_ASSIGN_OR_RETURN(auto memory, model->backend().Allocate(pages * model->kv_layout().page_bytes()));
  std::vector<kernels::PageIndex> table(pages);
  std::iota(table.begin(), table.end(), kernels::PageIndex{0});
  return std::unique_ptr<ExactPrefill>(new ExactPrefill(model, std::move(memory), std::move(table), options));
}

Result<PrefillOutcome> ExactPrefill::Prefill(const Case& c) {
  if (c.prompt.empty()) return InvalidArgument("the prompt is empty");
  std::size_t common = 0;
  if (options_.share_prefix) {
    const auto differ = std::mismatch(ids_.begin(), ids_.end(), c.prompt.begin(), c.prompt.end());
    common = static_cast<std::size_t>(differ.first - ids_.begin());
  }
  common = std::min(common, c.prompt.size() - 1);  // the last token's logits are wanted
  ids_ = c.prompt;
  prompt_tokens_ = ids_.size();
  costs_.clear();
  PrefillOutcome outcome;
  outcome.logits.resize(static_cast<std::size_t>(model_->config().vocab_size));
  KVS_RETURN_IF_ERROR(Compute(common, prompt_tokens_ - 1, outcome.logits.data()));
  for (const Chunk& chunk : c.chunks) {
    const std::int64_t tokens = chunk.end - chunk.begin;
    costs_.push_back({.cached_tokens = tokens, .computed_pairs = tokens * model_->config().num_layers});
  }
  outcome.chunks = costs_;
  return outcome;
}

Status ExactPrefill::Extend(std::span<const TokenId> ids, float* logits) {
  const std::size_t done = ids_.size();
  ids_.insert(ids_.end(), ids.begin(), ids.end());
  return Compute(done, done, logits);
}

Status ExactPrefill::Compute(std::size_t done, std::size_t first_logit_row, float* logits) {
  if (ids_.size() > table_.size() * kernels::kPageTokens) {
    const std::size_t tokens = ids_.size();
    ids_.clear();
    return ResourceExhausted(std::to_string(tokens) + " tokens, and room for " +
                             std::to_string(table_.size() * kernels::kPageTokens));
  }
  const kernels::KvPages pages{.base = memory_->data(),
                               .num_pages = static_cast<kernels::PageIndex>(table_.size()),
                               .layout = model_->kv_layout()};
  const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
  while (done < ids_.size()) {
    const std::size_t rows = std::min(ids_.size() - done, static_cast<std::size_t>(options_.piece_rows));
    runtime::ForwardBatch batch;
    std::size_t wanted = 0;
    for (std::size_t p = done; p < done + rows; ++p) {
      batch.ids.push_back(ids_[p]);
      batch.positions.push_back(static_cast<std::int64_t>(p));
      batch.slots.push_back({table_[p / kernels::kPageTokens], static_cast<int>(p % kernels::kPageTokens)});
      if (p < first_logit_row) continue;
      batch.logit_rows.push_back(static_cast<std::int64_t>(p - done));
      ++wanted;
    }
    kernels::KvSegment segment;
    segment.pages = std::span(table_).first((done + rows + kernels::kPageTokens - 1) / kernels::kPageTokens);
    segment.length = static_cast<std::int64_t>(done + rows);
    segment.row_end = static_cast<std::int64_t>(rows);
    batch.segments.push_back(segment);
    const Status status = model_->Forward(batch, pages, logits);
    if (!status.ok()) {
      ids_.clear();  // what the pages hold is not known any more
      return status;
    }
    logits += wanted * vocab;
    done += rows;
  }
  return OkStatus();
}

}  // namespace kvshare::quality

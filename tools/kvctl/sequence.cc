#include "tools/kvctl/sequence.h"

#include <numeric>
#include <utility>

#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::kvctl {

Result<Sequence> Sequence::New(runtime::Model* model, std::int64_t max_tokens) {
  const auto pages = static_cast<std::size_t>((max_tokens + kernels::kPageTokens - 1) / kernels::kPageTokens);
  KVS_ASSIGN_OR_RETURN(auto buffer, model->backend().Allocate(pages * model->kv_layout().page_bytes()));
  std::vector<kernels::PageIndex> table(pages);
  std::iota(table.begin(), table.end(), kernels::PageIndex{0});
  return Sequence(model, std::move(buffer), std::move(table));
}

Status Sequence::Append(std::span<const TokenId> ids, std::span<const std::int64_t> logit_rows, float* logits) {
  const auto rows = static_cast<std::int64_t>(ids.size());
  const std::int64_t end = length_ + rows;
  KVS_CHECK(end <= static_cast<std::int64_t>(table_.size()) * kernels::kPageTokens);
  runtime::ForwardBatch batch;
  batch.ids.assign(ids.begin(), ids.end());
  for (std::int64_t p = length_; p < end; ++p) {
    batch.positions.push_back(p);
    batch.slots.push_back(
        {table_[static_cast<std::size_t>(p / kernels::kPageTokens)], static_cast<int>(p % kernels::kPageTokens)});
  }
  kernels::KvSegment segment;
  const auto pages = static_cast<std::size_t>((end + kernels::kPageTokens - 1) / kernels::kPageTokens);
  segment.pages = std::span(table_).first(pages);
  segment.length = end;
  segment.row_end = rows;
  batch.segments.push_back(segment);
  batch.logit_rows.assign(logit_rows.begin(), logit_rows.end());
  const kernels::KvPages all{.base = buffer_->data(),
                             .num_pages = static_cast<kernels::PageIndex>(table_.size()),
                             .layout = model_->kv_layout()};
  KVS_RETURN_IF_ERROR(model_->Forward(batch, all, logits));
  length_ = end;
  return OkStatus();
}

}  // namespace kvshare::kvctl

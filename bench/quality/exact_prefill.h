// Exact prefill: every token computed by the model itself, through pages of its own. It is what the judge measures
// against, and the policies `off` and `exact`.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "bench/quality/judge.h"

namespace kvshare::quality {

struct ExactOptions {
  bool share_prefix = true;       // keep what the last prompt has in common with this one: the same bits, less time
  std::int64_t piece_rows = 512;  // rows per forward step; capped by the model's batch
};

// `model` must outlive it. Every prompt's chunks are charged in full, shared prefix or not: the charge is that of a
// prompt that came alone.
class ExactPrefill final : public PrefillUnderTest {
 public:
  // ResourceExhausted when memory does not suffice.
  static Result<std::unique_ptr<ExactPrefill>> New(runtime::Model* model, const PrefillLimits& limits,
                                                   const ExactOptions& options);

  Result<PrefillOutcome> Prefill(const Case& c) override;
  Status Extend(std::span<const TokenId> ids, float* logits) override;
  void Rewind() override { ids_.resize(prompt_tokens_); }
  std::vector<ChunkCost> Costs() const override { return costs_; }

 private:
  ExactPrefill(runtime::Model* model, std::unique_ptr<kernels::Buffer> memory, std::vector<kernels::PageIndex> table,
               const ExactOptions& options);

  // Computes ids_[done..] in pieces; logits of the rows from `first_logit_row` on (an index into ids_).
  Status Compute(std::size_t done, std::size_t first_logit_row, float* logits);

  runtime::Model* model_;
  std::unique_ptr<kernels::Buffer> memory_;
  std::vector<kernels::PageIndex> table_;
  ExactOptions options_;
  std::vector<TokenId> ids_;  // whose KV the pages hold
  std::size_t prompt_tokens_ = 0;
  std::vector<ChunkCost> costs_;
};

}  // namespace kvshare::quality

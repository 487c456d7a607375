// The policies that reuse chunks at other places, judged through the very code that the daemon runs
// (agentd/repair/moved_prompt.h).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "agentd/repair/company.h"
#include "agentd/repair/moved_prompt.h"
#include "anchors/anchor_pool.h"
#include "anchors/confidence.h"
#include "bench/quality/judge.h"

namespace kvshare::quality {

// `model` must outlive it. A chunk is encoded once, on first sight and uncharged, as the daemon does when it is idle;
// its first and last two tokens are computed with the prompt, and chunks of fewer than 32 tokens are not
// stored. What is stored is forgotten when the session changes; anchors stay.
class MovedPrefill final : public PrefillUnderTest {
 public:
  static Result<std::unique_ptr<MovedPrefill>> New(runtime::Model* model, const PrefillLimits& limits,
                                                   const Policy& policy);

  Result<PrefillOutcome> Prefill(const Case& c) override;
  Status Extend(std::span<const TokenId> ids, float* logits) override;
  void Healed(std::span<const float> exact) override;
  void Rewind() override;
  std::vector<ChunkCost> Costs() const override;

 private:
  struct Stored {
    std::span<const TokenId> tokens;  // from position 0, in stored_
    std::vector<kernels::PageIndex> pages;
    std::int64_t offset = 0;  // of the chunk's first token in the run; its position there too
  };

  MovedPrefill(runtime::Model* model, std::unique_ptr<kernels::Buffer> memory, kernels::PageIndex num_pages,
               std::int64_t max_tokens, const Policy& policy);

  kernels::KvPages Pages() const;
  std::vector<kernels::PageIndex> Take(std::int64_t count);
  // KV of `ids` as a prompt of its own, from position 0.
  Result<std::vector<kernels::PageIndex>> Encode(std::span<const TokenId> ids);
  StoredIn Company() const;
  std::size_t FirstStored() const;  // the first chunk with stored KV
  // What stood before the chunks where another agent read them.
  std::vector<TokenId> BeginningFor(const Case& c) const;
  // Pages that a case takes at most: what is stored of it, and what computes it.
  std::int64_t PagesAtMost(const Case& c) const;
  // The run that holds case_.chunks[i], computed if it is not there yet, and where the prompt's token `begin` is in it.
  Result<Stored> Find(std::size_t i, std::int64_t begin);
  // Notes that so many tokens of case_.chunks[i] are computed.
  void AddStray(std::size_t i, std::int64_t tokens);
  void SetStraysAside();
  Result<std::vector<float>> Compute();
  Status SendBack(std::span<float> logits);
  anchors::Guard& GuardOf() { return prompt_->OneThread() ? thread_ : elsewhere_; }
  std::vector<ChunkCost> CostsOf(const agentd::RepairCounts& counts) const;

  runtime::Model* const model_;
  const agentd::RoleMarks role_marks_;
  const std::unique_ptr<kernels::Buffer> memory_;
  const Policy policy_;
  const std::int64_t max_tokens_;
  std::vector<kernels::PageIndex> free_;
  std::vector<kernels::PageIndex> used_;  // by the prompt
  std::string session_;
  std::vector<TokenId> other_message_;  // the beginning of another session's first chunk
  // What stands before the first chunk with stored KV of an agent's prompts, by agent; of the agents seen so far. With
  // kBehind that of its last one.
  std::map<std::string, std::vector<TokenId>> beginnings_;
  std::map<std::vector<TokenId>, std::vector<kernels::PageIndex>> stored_;  // by the tokens that were encoded
  anchors::AnchorPool anchors_;
  anchors::Guard thread_{agentd::kThreadPrior};
  anchors::Guard elsewhere_{agentd::kElsewherePrior};

  Case case_;
  std::vector<agentd::MovedChunk> moved_;  // of case_
  std::vector<std::size_t> chunk_of_;      // moved_[i] is case_.chunks[chunk_of_[i]]
  std::vector<bool> saw_other_;            // of moved_: ChunkCompany's
  std::vector<ChunkCost> strays_;          // by chunk of case_: what is computed although it was stored
  std::unique_ptr<agentd::MovedPrompt> prompt_;
  bool escalated_by_prefill_ = false;
  bool escalated_ = false;       // by any attempt
  std::vector<float> first_;     // logits of the last prompt token
  double least_margin_ = 0;      // seen by the attempts that Rewind undid
  std::vector<ChunkCost> peak_;  // the dearest of the attempts that Rewind undid
};

}  // namespace kvshare::quality

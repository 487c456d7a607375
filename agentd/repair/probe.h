// Probe: shows the passes that a policy looks at to the scores of the moved tokens, layer by layer.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "agentd/repair/moved_prompt.h"
#include "agentd/repair/token_scores.h"
#include "runtime/layer_hook.h"

namespace kvshare::agentd {

class MovedPrompt::Probe final : public runtime::LayerHook {
 public:
  // In layers [begin, end): adds up the attention that rows at positions >= `looking_from` pay to each moved token
  // (none, if no row is there), and, if `deviations`, measures at layer `begin` how far each computed row of a chunk is
  // from what is stored. Both must outlive it.
  Probe(const MovedPrompt* prompt, TokenScores* scores, std::int64_t looking_from, int begin, int end, bool deviations);

  std::optional<std::vector<std::int64_t>> OnLayer(int layer, const runtime::LayerRows& rows) override;

 private:
  void AddMass(int layer, const runtime::LayerRows& rows);
  void Measure(int layer, const runtime::LayerRows& rows);

  const MovedPrompt* const prompt_;
  TokenScores* const scores_;
  const std::int64_t looking_from_;
  const int begin_;
  const int end_;
  const bool deviations_;
  std::vector<std::int64_t> first_token_;  // of each chunk, among the moved ones
};

}  // namespace kvshare::agentd

// Probe: what a policy wants to know of a forward pass before it decides, gathered layer by layer.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "agentd/repair/moved_prompt.h"
#include "kernels/kv_rows.h"
#include "runtime/layer_hook.h"

namespace kvshare::agentd {

class MovedPrompt::Probe final : public runtime::LayerHook {
 public:
  // In layers [begin, end): sums the attention that rows at positions >= `looking_from` pay to each token of the moved
  // chunks (none, if no row is there), and, if `deviations`, measures at layer `begin` how far each computed row of a
  // chunk is from what is stored.
  Probe(const MovedPrompt* prompt, std::int64_t looking_from, int begin, int end, bool deviations);

  std::optional<std::vector<std::int64_t>> OnLayer(int layer, const runtime::LayerRows& rows) override;

  // Of a token of a chunk, by its position in the prompt.
  float mass(std::int64_t position) const { return mass_[static_cast<std::size_t>(position)]; }
  float deviation(std::int64_t position) const { return deviation_[static_cast<std::size_t>(position)]; }

 private:
  void AddMass(int layer, const runtime::LayerRows& rows);
  void Measure(int layer, const runtime::LayerRows& rows);

  const MovedPrompt* const prompt_;
  const std::int64_t looking_from_;
  const int begin_;
  const int end_;
  const bool deviations_;
  std::vector<float> mass_;       // [prompt]
  std::vector<float> deviation_;  // [prompt] sum of squares
};

}  // namespace kvshare::agentd

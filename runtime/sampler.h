// Sampling: the next token from a row of logits.
#pragma once

#include <cstdint>
#include <span>

#include "kvshare/status.h"
#include "kvshare/types.h"

namespace kvshare::runtime {

// The token chosen for the `step`-th generated token (0 first). A pure function of its arguments: the random number is
// derived from (seed, step), so a reply does not depend on what else the daemon was doing.
// Greedy (temperature 0) takes the largest logit, the lowest id among equals.
// Otherwise, as transformers does it: logits / temperature, then top-k, then top-p (the smallest set of most likely
// tokens whose probabilities reach top_p; at least one), then one draw in double precision.
// Of equals at the edge of top-k the lowest ids stay. NaN counts as impossible; infinite logits share all probability.
// Where no token is possible, which CheckLogits tells, the answer means nothing.
TokenId SampleToken(std::span<const float> logits, const SamplingParams& params, std::int64_t step);

// Internal where no token is possible: every logit is NaN or minus infinity.
Status CheckLogits(std::span<const float> logits);

}  // namespace kvshare::runtime

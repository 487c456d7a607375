// Choosing rows by score: which tokens of moved chunks are worth recomputing.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace kvshare::anchors {

// Indices of the `count` largest scores, ascending. Of equal scores the lower index goes first, so that a choice is the
// same on every machine that computes the same scores; NaN ranks below everything. All indices if count exceeds them.
std::vector<std::int64_t> LargestScores(std::span<const float> scores, std::int64_t count);

}  // namespace kvshare::anchors

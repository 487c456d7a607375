#include "anchors/selection.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace kvshare::anchors {

std::vector<std::int64_t> LargestScores(std::span<const float> scores, std::int64_t count) {
  std::vector<std::int64_t> order(scores.size());
  std::iota(order.begin(), order.end(), std::int64_t{0});
  const auto rank = [&scores](std::int64_t i) {
    const float score = scores[static_cast<std::size_t>(i)];
    return std::isnan(score) ? -std::numeric_limits<float>::infinity() : score;
  };
  const auto take = std::clamp<std::int64_t>(count, 0, static_cast<std::int64_t>(order.size()));
  std::partial_sort(order.begin(), order.begin() + take, order.end(),
                    [&rank](std::int64_t a, std::int64_t b) { return rank(a) != rank(b) ? rank(a) > rank(b) : a < b; });
  order.resize(static_cast<std::size_t>(take));
  std::sort(order.begin(), order.end());
  return order;
}

}  // namespace kvshare::anchors

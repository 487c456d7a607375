#include "tests/reference/anchors_reference.h"

#include <cmath>
#include <cstddef>

namespace kvshare::reference {

AnchoredResult Anchored(const Kv& x, const std::vector<KvAnchor>& anchors) {
  AnchoredResult result;
  result.corrected = x;
  result.corrected_magnitude = x;
  for (double& value : result.corrected_magnitude.values) value = std::abs(value);
  std::vector<double> squares(anchors.size(), 0.0);
  for (int part = 0; part < 2; ++part) {
    for (std::int64_t t = 0; t < x.tokens; ++t) {
      std::vector<double> weights;
      double sum = 0;
      for (std::size_t a = 0; a < anchors.size(); ++a) {
        double difference = 0, magnitude = 0;
        for (int layer = 0; layer < x.layers; ++layer) {
          for (std::int64_t c = 0; c < x.width; ++c) {
            const double ours = x.at(layer, part, t, c), theirs = anchors[a].base.at(layer, part, t, c);
            difference += std::abs(ours - theirs);
            magnitude += std::abs(ours) + std::abs(theirs);
            if (part == 1) squares[a] += (ours - theirs) * (ours - theirs);
          }
        }
        result.differences.push_back(difference);
        result.magnitudes.push_back(magnitude);
        const bool known = anchors[a].offset.layers > 0;
        // Means of differences are small numbers: no exponential of them is too small for a double.
        weights.push_back(known ? std::exp(-difference / static_cast<double>(x.layers * x.width)) : 0.0);
        sum += weights.back();
      }
      for (std::size_t a = 0; a < anchors.size(); ++a) {
        if (anchors[a].offset.layers == 0) continue;
        for (int layer = 1; layer < x.layers; ++layer) {
          for (std::int64_t c = 0; c < x.width; ++c) {
            const double move = weights[a] / sum * anchors[a].offset.at(layer, part, t, c);
            result.corrected.at(layer, part, t, c) += move;
            result.corrected_magnitude.at(layer, part, t, c) += std::abs(move);
          }
        }
      }
    }
  }
  for (const double square : squares) result.distances.push_back(std::sqrt(square));
  return result;
}

}  // namespace kvshare::reference

// The double-precision oracle of KVCOMM's interpolation (arXiv 2510.12872 §3, eq. 5 and the offset's), written from the
// equations alone: keys in the canonical frame, one weight for each token and each of K and V.
#pragma once

#include <cstdint>
#include <vector>

namespace kvshare::reference {

// [layers][K, V][tokens][width]
struct Kv {
  int layers = 0;
  std::int64_t tokens = 0;
  std::int64_t width = 0;
  std::vector<double> values;

  double at(int layer, int part, std::int64_t token, std::int64_t channel) const {
    return values[Index(layer, part, token, channel)];
  }
  double& at(int layer, int part, std::int64_t token, std::int64_t channel) {
    return values[Index(layer, part, token, channel)];
  }
  std::size_t Index(int layer, int part, std::int64_t token, std::int64_t channel) const {
    return static_cast<std::size_t>(((layer * 2 + part) * tokens + token) * width + channel);
  }
};

struct KvAnchor {
  Kv base;
  Kv offset;  // of no layers: not known
};

struct AnchoredResult {
  std::vector<double> differences;  // [K, V][tokens][anchors]: sum over layers and channels of |x - base|
  std::vector<double> magnitudes;   // the same of |x| + |base|: what a relative error of either amounts to
  std::vector<double> distances;    // [anchors]: Frobenius norm of V - base V over the tokens of x
  Kv corrected;                     // x + sum_a softmax_a(-mean difference) offset_a; layer 0 is x
  Kv corrected_magnitude;           // |x| + sum_a w_a |offset_a|
};

// Anchors may be of more tokens than `x`; those beyond are not looked at.
AnchoredResult Anchored(const Kv& x, const std::vector<KvAnchor>& anchors);

}  // namespace kvshare::reference

// Weights in fp32 to one of the 16-bit types.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "kernels/half.h"
#include "kvshare/status.h"

namespace kvshare::kernels {

// Each value of `from`, rounded to nearest even, to the same place of `to`. Returns the first finite one that becomes
// infinite, as all above 65504 do in float16; null: none does.
inline const float* RoundWeights(DType half, std::span<const float> from, std::uint16_t* to) {
  const float* beyond = nullptr;
  for (std::size_t i = 0; i < from.size(); ++i) {
    to[i] = static_cast<std::uint16_t>(HalfBits(half, from[i]));
    const bool finite = (to[i] & HalfExponent(half)) != HalfExponent(half);
    if (!finite && beyond == nullptr && std::isfinite(from[i])) beyond = &from[i];
  }
  return beyond;
}

inline Status BeyondRange(DType half, float weight) {
  return FailedPrecondition("a weight of " + std::to_string(weight) + " is beyond the range of " +
                            std::string(DTypeName(half)) + "; use another dtype");
}

}  // namespace kvshare::kernels

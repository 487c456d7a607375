// The cos and sin that a query is rotated with for a segment. A chunk that moved towards the front has rows whose angle
// (their position minus its shift) lies beyond the table: theirs is put together from two of its rows.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "libkvshare/core/check.h"

namespace kvshare::kernels {

class RopeAngle {
 public:
  explicit RopeAngle(const RopeTable& rope) : rope_(rope) {}

  // Requires 0 <= angle <= 2 (rope.positions - 1), unless the table is empty.
  void Set(std::int64_t angle) {
    if (rope_.half == 0) return;
    const std::int64_t last = rope_.positions - 1;
    KVS_CHECK(0 <= angle && angle <= 2 * last);
    if (angle <= last) {
      cos_ = rope_.cos.data() + angle * rope_.half;
      sin_ = rope_.sin.data() + angle * rope_.half;
      return;
    }
    const std::size_t half = static_cast<std::size_t>(rope_.half);
    storage_.resize(2 * half);
    const std::int64_t rest = angle - last;
    const float* c = rope_.cos.data() + last * rope_.half;
    const float* s = rope_.sin.data() + last * rope_.half;
    const float* d = rope_.cos.data() + rest * rope_.half;
    const float* t = rope_.sin.data() + rest * rope_.half;
    // cos(0) = 1 shows the factor (yarn's) that both rows hold and the answer must hold once.
    const float once = 1.0f / rope_.cos[0];
    for (std::size_t j = 0; j < half; ++j) {
      storage_[j] = (c[j] * d[j] - s[j] * t[j]) * once;
      storage_[half + j] = (s[j] * d[j] + c[j] * t[j]) * once;
    }
    cos_ = storage_.data();
    sin_ = storage_.data() + half;
  }

  const float* cos() const { return cos_; }
  const float* sin() const { return sin_; }

 private:
  const RopeTable& rope_;
  const float* cos_ = nullptr;
  const float* sin_ = nullptr;
  std::vector<float> storage_;
};

}  // namespace kvshare::kernels

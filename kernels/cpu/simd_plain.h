// One fp32 lane, for any processor; internal linkage, as in simd_avx512.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace kvshare::kernels {
namespace {

struct Simd {
  using F = float;
  static constexpr int kLanes = 1;

  static F Zero() { return 0.0f; }
  static F Set(float x) { return x; }
  static F Load(const float* p) { return *p; }
  static void Store(float* p, F x) { *p = x; }
  static F Add(F a, F b) { return a + b; }
  static F Sub(F a, F b) { return a - b; }
  static F Mul(F a, F b) { return a * b; }
  static F Div(F a, F b) { return a / b; }
  static F Fma(F a, F b, F c) { return a * b + c; }  // rounded twice: a fused one is a library call here
  static F Min(F a, F b) { return a < b ? a : b; }
  static F Max(F a, F b) { return a > b ? a : b; }
  static F Round(F x) { return std::nearbyint(x); }
  // 2^n for integral n in [-126, 128]; 2^128 is infinity.
  static F Pow2(F n) {
    const std::uint32_t bits = static_cast<std::uint32_t>(static_cast<int>(n) + 127) << 23;
    F result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
  }
  static F LoadBf16(const std::uint16_t* p) {
    const std::uint32_t bits = std::uint32_t{*p} << 16;
    F result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
  }
  // Rounds to nearest even; NaN stays NaN.
  static void StoreBf16(std::uint16_t* p, F x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    *p = x != x ? std::uint16_t{0x7fc0} : static_cast<std::uint16_t>((bits + ((bits >> 16) & 1) + 0x7fff) >> 16);
  }
};

}  // namespace
}  // namespace kvshare::kernels

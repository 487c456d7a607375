// The 16-bit floating-point types in which weights, activations and KV are kept: bfloat16 and IEEE binary16, to and
// from fp32. One definition for host code and CUDA kernels; of a kernel's conversions one instruction.
#pragma once

#include <cstdint>

#include "kernels/tensor.h"

#if defined(__CUDACC__)
#define KVS_HD __host__ __device__ __forceinline__  // what host and device both compute
#else
#define KVS_HD inline
#endif

namespace kvshare::kernels {

// Round to nearest even; NaN stays NaN. What cvt.rn.bf16.f32 does, but for a NaN's payload.
KVS_HD std::uint32_t Bf16Bits(float f) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &f, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40u;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

KVS_HD float FromBf16(std::uint32_t half) {
  const std::uint32_t bits = half << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}

// Round to nearest even; from 65520 on infinity; every NaN becomes 0x7fff, as of cvt.rn.f16.f32.
KVS_HD std::uint32_t F16Bits(float f) {
#if defined(__CUDA_ARCH__)
  unsigned short half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(f));
  return half;
#else
  std::uint32_t bits;
  __builtin_memcpy(&bits, &f, sizeof bits);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffu;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u) {  // below 2^-14: subnormal, units of 2^-24, which is what 0.5 is kept in
    float sum;
    __builtin_memcpy(&sum, &magnitude, sizeof sum);
    sum += 0.5f;
    __builtin_memcpy(&magnitude, &sum, sizeof sum);
    return sign | (magnitude - 0x3f000000u);
  }
  magnitude += 0xfffu + (magnitude >> 13 & 1u);
  return sign | ((magnitude >> 13) - (112u << 10));
#endif
}

// Exact.
KVS_HD float FromF16(std::uint32_t half) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(static_cast<unsigned short>(half)));
  return f;
#else
  const std::uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 0x1fu, mantissa = half & 0x3ffu;
  std::uint32_t bits = (exponent + 112u) << 23 | mantissa << 13;
  if (exponent == 31) bits = 0x7f800000u | mantissa << 13;
  if (exponent == 0) {  // the difference of two that fp32 holds exactly
    bits = 0x38800000u | mantissa << 13;
    float f;
    __builtin_memcpy(&f, &bits, sizeof f);
    f -= 0x1p-14f;
    __builtin_memcpy(&bits, &f, sizeof f);
  }
  bits |= sign;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
#endif
}

// `half`: kBf16 or kF16.
KVS_HD std::uint32_t HalfBits(DType half, float f) { return half == DType::kF16 ? F16Bits(f) : Bf16Bits(f); }
KVS_HD float FromHalf(DType half, std::uint32_t bits) { return half == DType::kF16 ? FromF16(bits) : FromBf16(bits); }
// The bits that are all ones in an infinity or a NaN, and in nothing else.
KVS_HD std::uint32_t HalfExponent(DType half) { return half == DType::kF16 ? 0x7c00u : 0x7f80u; }

}  // namespace kvshare::kernels

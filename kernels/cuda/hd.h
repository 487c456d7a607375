// Marks for code that both a CUDA kernel and a host compiler read. Such files include no header of the toolkit, so that
// kernels can be compiled and run without one (tests/kernels/cuda/emulator.h).
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define KVS_HD __host__ __device__ __forceinline__  // index arithmetic, used on both sides
#define KVS_DEV __device__ __forceinline__          // body of a kernel, over a Lane
#else
#define KVS_HD inline
#define KVS_DEV inline
#endif

namespace kvshare::kernels::cuda {

inline constexpr std::int64_t kPageRows = 64;     // kPageTokens of kernels/paged_kv.h; checked where both are seen
inline constexpr std::int64_t kSplitRows = 1024;  // kSplitTokens of kernels/backend.h

// The reference of a row that has seen no key.
KVS_HD float NoKeySeen() { return -__builtin_inff(); }

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

// Two bf16 of a register, the first in the low half, as mma wants them.
KVS_HD std::uint32_t PackBf16(float low, float high) { return Bf16Bits(low) | (Bf16Bits(high) << 16); }

}  // namespace kvshare::kernels::cuda

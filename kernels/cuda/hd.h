// Marks for code that both a CUDA kernel and a host compiler read. Such files include no header of the toolkit, so that
// kernels can be compiled and run without one (tests/kernels/cuda/emulator.h).
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define KVS_HD __host__ __device__ __forceinline__  // index arithmetic, used on both sides
#define KVS_DEV __device__ __forceinline__          // body of a kernel, over a Lane
#define KVS_UNROLL _Pragma("unroll")                // a loop over what shall stay in registers
#define KVS_NO_UNROLL _Pragma("unroll 1")           // one whose unrolling costs registers
#else
#define KVS_HD inline
#define KVS_DEV inline
#define KVS_UNROLL
#define KVS_NO_UNROLL
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

// Words and pairs in memory that also holds halves and floats; aligned to their own size.
typedef std::uint32_t AliasedWord __attribute__((__may_alias__));
KVS_HD void StoreWord(void* to, std::uint32_t x) { *static_cast<AliasedWord*>(to) = x; }
KVS_HD std::uint32_t LoadWord(const void* from) { return *static_cast<const AliasedWord*>(from); }

typedef std::uint64_t AliasedLong __attribute__((__may_alias__));
KVS_HD void StoreLong(void* to, std::uint64_t x) { *static_cast<AliasedLong*>(to) = x; }
KVS_HD std::uint64_t LoadLong(const void* from) { return *static_cast<const AliasedLong*>(from); }

// 16 bytes, both sides aligned to 16: one load and one store on the device.
struct alignas(16) Chunk16 {
  std::uint64_t words[2];
};
KVS_HD void CopyChunk(std::byte* to, const std::byte* from) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<Chunk16*>(to) = *reinterpret_cast<const Chunk16*>(from);
#else
  __builtin_memcpy(to, from, sizeof(Chunk16));
#endif
}

// Two bf16 of a register, the first in the low half, as mma wants them.
KVS_HD std::uint32_t PackBf16(float low, float high) { return Bf16Bits(low) | (Bf16Bits(high) << 16); }

}  // namespace kvshare::kernels::cuda

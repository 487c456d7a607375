// Marks for code that both a CUDA kernel and a host compiler read. Such files include no header of the toolkit, so that
// kernels can be compiled and run without one (tests/kernels/cuda/emulator.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/half.h"

#if defined(__CUDACC__)
#define KVS_DEV __device__ __forceinline__  // body of a kernel, over a Lane
#define KVS_UNROLL _Pragma("unroll")        // a loop over what shall stay in registers
#define KVS_NO_UNROLL _Pragma("unroll 1")   // one whose unrolling costs registers
#else
#define KVS_DEV inline
#define KVS_UNROLL
#define KVS_NO_UNROLL
#endif

namespace kvshare::kernels::cuda {

inline constexpr std::int64_t kPageRows = 64;     // kPageTokens of kernels/paged_kv.h; checked where both are seen
inline constexpr std::int64_t kSplitRows = 1024;  // kSplitTokens of kernels/backend.h

// The reference of a row that has seen no key.
KVS_HD float NoKeySeen() { return -__builtin_inff(); }

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

// Two halves of a register, the first in the low one, as mma wants them.
KVS_HD std::uint32_t PackHalves(DType half, float low, float high) {
  return HalfBits(half, low) | (HalfBits(half, high) << 16);
}

}  // namespace kvshare::kernels::cuda

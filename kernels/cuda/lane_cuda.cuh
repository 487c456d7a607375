// The machine's Lane: what a kernel body asks of one thread, as instructions of sm_80 and newer (PTX ISA 7.0).
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/hd.h"

namespace kvshare::kernels::cuda {

class CudaLane {
 public:
  __device__ __forceinline__ explicit CudaLane(std::byte* shared) : shared_(shared) {}

  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int block_x() const { return static_cast<int>(blockIdx.x); }
  __device__ __forceinline__ int block_y() const { return static_cast<int>(blockIdx.y); }
  __device__ __forceinline__ std::byte* shared() const { return shared_; }

  __device__ __forceinline__ void Sync() const { __syncthreads(); }
  __device__ __forceinline__ void SyncWarp() const { __syncwarp(); }
  __device__ __forceinline__ float ShuffleXor(float x, int mask) const { return __shfl_xor_sync(~0u, x, mask); }
  __device__ __forceinline__ std::uint64_t Broadcast(std::uint64_t x, int lane) const {
    return __shfl_sync(~0u, static_cast<unsigned long long>(x), lane);
  }
  __device__ __forceinline__ bool Any(bool x) const { return __any_sync(~0u, x) != 0; }

  __device__ __forceinline__ float Exp2(float x) const {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  __device__ __forceinline__ float Exp(float x) const { return expf(x); }
  __device__ __forceinline__ float Sqrt(float x) const { return __fsqrt_rn(x); }
  __device__ __forceinline__ float Fma(float a, float b, float c) const { return __fmaf_rn(a, b, c); }
  __device__ __forceinline__ float MaxOrNan(float a, float b) const {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
  }

  // PackHalves in one instruction; a NaN becomes the canonical one.
  template <DType kHalf>
  __device__ __forceinline__ std::uint32_t Pack(float low, float high) const {
    std::uint32_t pair;
    if constexpr (kHalf == DType::kF16) {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    } else {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    }
    return pair;
  }

  // 16 bytes from global to shared memory, or zeros. Both aligned to 16.
  __device__ __forceinline__ void CopyAsync16(std::byte* to, const std::byte* from, bool keep) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(Address(to)), "l"(from), "r"(keep ? 16 : 0)
                 : "memory");
  }
  __device__ __forceinline__ void CommitCopies() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // All groups of this thread's copies but the last kPending are there; for other threads' see Sync.
  template <int kPending>
  __device__ __forceinline__ void WaitForCopies() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }

  __device__ __forceinline__ void LoadMatrix4(std::uint32_t (&x)[4], const std::byte* row) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(Address(row))
                 : "memory");
  }
  __device__ __forceinline__ void LoadMatrix4Transposed(std::uint32_t (&x)[4], const std::byte* row) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(Address(row))
                 : "memory");
  }
  template <DType kHalf>
  __device__ __forceinline__ void Mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                      std::uint32_t b1) const {
    if constexpr (kHalf == DType::kF16) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
  }

 private:
  __device__ __forceinline__ static unsigned Address(const std::byte* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
  }
  std::byte* shared_;
};

}  // namespace kvshare::kernels::cuda

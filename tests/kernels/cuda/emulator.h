// A CUDA grid on the host, for kernels written over a Lane: the same source that nvcc compiles, without a GPU.
//
// Each thread of a block is a fiber; blocks run one after the other. What a warp does together (shuffles, ldmatrix,
// mma) waits for all 32 lanes and is refused if they do different things. Order is adversarial, from a seed: warps run
// in random turns between barriers, shared memory begins as NaN, and an asynchronous copy lands either at once or when
// it is waited for, so that a missing barrier or wait shows. Addresses of copies and of ldmatrix must be aligned and
// lie in the block's shared memory; bank conflicts of ldmatrix are counted.
//
// mma adds its 16 products to the sum one by one in fp32, ascending; the order within a real tensor core is not
// published. Exp2 is the C library's, rounded to fp32; the machine's is 2 ulp off.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "kernels/cuda/hd.h"

namespace kvshare::kernels::cuda {

class EmulatedBlock;

class EmulatedLane {
 public:
  EmulatedLane(EmulatedBlock& block, int thread) : block_(block), thread_(thread) {}

  int thread() const { return thread_; }
  int block_x() const;
  int block_y() const;
  std::byte* shared() const;

  void Sync();
  void SyncWarp() { Any(false); }
  float ShuffleXor(float x, int mask);
  std::uint64_t Broadcast(std::uint64_t x, int lane);
  bool Any(bool x);

  float Exp2(float x) const;
  float Exp(float x) const;
  float Sqrt(float x) const;
  float Fma(float a, float b, float c) const;
  float MaxOrNan(float a, float b) const { return a > b || a != a ? a : b; }
  template <DType kHalf>
  std::uint32_t Pack(float low, float high) const {
    return PackHalves(kHalf, low, high);
  }

  void CopyAsync16(std::byte* to, const std::byte* from, bool keep);
  void CommitCopies();
  template <int kPending>
  void WaitForCopies() {
    FinishCopies(kPending);
  }
  void LoadMatrix4(std::uint32_t (&x)[4], const std::byte* row) { LoadMatrices(x, row, false); }
  void LoadMatrix4Transposed(std::uint32_t (&x)[4], const std::byte* row) { LoadMatrices(x, row, true); }
  template <DType kHalf>
  void Mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    Multiply(kHalf, c, a, b0, b1);
  }

 private:
  void FinishCopies(int pending);
  void Multiply(DType half, float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);
  void LoadMatrices(std::uint32_t (&x)[4], const std::byte* row, bool transposed);

  EmulatedBlock& block_;
  const int thread_;
};

struct Grid {
  int x = 1;
  int y = 1;
  int threads = 128;  // a multiple of 32
  std::size_t shared_bytes = 0;
};

struct GridStats {
  std::int64_t bank_conflicts = 0;  // ldmatrix phases (8 rows of 16 bytes) that hit a bank twice
  std::int64_t mma = 0;             // by warp
};

// Runs `body` for every thread of every block. A broken rule of the machine ends the program, saying which.
GridStats Emulate(const Grid& grid, std::uint64_t seed, const std::function<void(EmulatedLane&)>& body);

}  // namespace kvshare::kernels::cuda

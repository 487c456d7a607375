// Device: the few things that the CUDA backend asks of a GPU, so that all else is ordinary C++. Two implementations:
// NewCudaDevice (device_cuda.cc, gemm_cublaslt.cc, launch.cu) and the tests' emulated one.
//
// All work goes to one stream, in the order of the calls; copies "aside" go to a second one. Every method may fail with
// the status that the driver's error maps to; a device that failed once may fail ever after. One thread at a time.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "kernels/cuda/anchor_args.h"
#include "kernels/cuda/attention_args.h"
#include "kernels/cuda/mass_args.h"
#include "kernels/cuda/mover_args.h"
#include "kernels/cuda/row_ops_args.h"
#include "kvshare/status.h"

namespace kvshare::kernels::cuda {

struct DeviceFacts {
  std::string name;    // "NVIDIA H200"
  std::string arch;    // "sm_90"
  std::string linear;  // library and version behind Gemm
  std::size_t memory_bytes = 0;
  int multiprocessors = 0;
};

// A linear layer of n outputs and k inputs, weights and inputs in `dtype` (bf16 or fp16).
struct GemmShape {
  std::int64_t n = 0;
  std::int64_t k = 0;
  DType dtype = DType::kBf16;
  auto operator<=>(const GemmShape&) const = default;
};

// out [rows, n] fp32 (+)= x [rows, k] times w [n, k], transposed. All row-major.
struct GemmArgs {
  const std::uint16_t* w = nullptr;
  const std::uint16_t* x = nullptr;
  std::int64_t x_stride = 0;
  float* out = nullptr;
  std::int64_t out_stride = 0;
  std::int64_t rows = 0;
  GemmShape shape;
  bool accumulate = false;
};

inline constexpr int kMarks = 4;
inline constexpr int kFastGemm = -1;

class Device {
 public:
  virtual ~Device() = default;
  virtual const DeviceFacts& facts() const = 0;

  // At least 256-byte aligned, contents undefined. ResourceExhausted when there is no more.
  virtual Result<std::byte*> Allocate(std::size_t bytes) = 0;
  virtual void Free(std::byte* data) = 0;
  virtual Result<std::byte*> AllocatePinned(std::size_t bytes) = 0;  // host memory that the device copies from directly
  virtual void FreePinned(std::byte* data) = 0;

  virtual Status Fill(std::byte* to, int value, std::size_t bytes) = 0;
  virtual Status CopyIn(std::byte* to, const void* from, std::size_t bytes) = 0;  // host to device
  virtual Status CopyOut(void* to, const std::byte* from, std::size_t bytes) = 0;
  // Remembers this point of the stream under one of kMarks numbers; Wait returns when the device has come to it.
  virtual Status Mark(int mark) = 0;
  virtual Status Wait(int mark) = 0;
  virtual Status Synchronize() = 0;  // all but what is aside

  // The second stream. `mark`: a small number from 0 on; who gives them out may use one anew while somebody follows it.
  virtual Status AsideFollows() = 0;  // what is enqueued aside next comes after all that the first stream has so far
  virtual Status CopyInAside(std::byte* to, const std::byte* pinned, std::size_t bytes) = 0;
  virtual Status CopyOutAside(std::byte* pinned, const std::byte* from, std::size_t bytes) = 0;
  virtual Status MarkAside(int mark) = 0;          // remembers this point
  virtual Status FollowAside(int mark) = 0;        // what the first stream is given next comes after it
  virtual Result<bool> PassedAside(int mark) = 0;  // whether the device has come to it
  virtual Status WaitAside(int mark) = 0;          // returns when it has

  virtual Status Attention(const AttentionArgs& args, int head_dim, int items, bool spread) = 0;
  virtual Status Merge(const AttentionArgs& args, int head_dim, std::int64_t packed_rows) = 0;
  virtual Status Embed(const EmbedArgs& args) = 0;
  virtual Status RmsNorm(const RmsNormArgs& args) = 0;
  virtual Status StoreKv(const StoreKvArgs& args) = 0;
  virtual Status SwiGlu(const SwiGluArgs& args) = 0;
  virtual Status AddBias(const AddBiasArgs& args) = 0;
  virtual Status CopyPageRows(const CopyPageRowsArgs& args) = 0;
  virtual Status CopyRows(const CopyRowsArgs& args) = 0;
  virtual Status CopyPages(const CopyPagesArgs& args) = 0;
  virtual Status CodePages(const CodePagesArgs& args) = 0;
  virtual Status Deviation(const DeviationArgs& args) = 0;
  virtual Status Score(const ScoreArgs& args) = 0;
  virtual Status Choose(const ChooseArgs& args) = 0;
  virtual Status Mass(const MassArgs& args, int head_dim) = 0;
  virtual Status AnchorDistances(const AnchorArgs& args) = 0;
  virtual Status ApplyAnchors(const AnchorArgs& args) = 0;

  // How many pinned algorithms there are for a shape: without split-K, at most kMaxGemmCandidates, best first.
  virtual Result<int> GemmCandidates(const GemmShape& shape) = 0;
  // A number that names what the candidate computes, in which order: the same wherever it is the same.
  virtual std::uint64_t GemmIdentity(const GemmShape& shape, int algorithm) = 0;
  // With candidate number `algorithm`, or kFastGemm: whatever is fastest for this number of rows.
  virtual Status Gemm(const GemmArgs& args, int algorithm) = 0;
};

inline constexpr int kMaxGemmCandidates = 8;

}  // namespace kvshare::kernels::cuda

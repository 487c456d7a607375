// Matrix products through cuBLASLt: the heuristic's choice for each size, or one of a few pinned algorithms.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/cuda/device.h"

namespace kvshare::kernels::cuda {

class Gemm {
 public:
  // Takes its workspace from the device at once; only algorithms of kFastGemm use it.
  static Result<std::unique_ptr<Gemm>> Create(cudaStream_t stream);
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  // As in Device.
  Result<int> Candidates(const GemmShape& shape);
  std::uint64_t Identity(const GemmShape& shape, int algorithm) const;
  Status Run(const GemmArgs& args, int algorithm);

  static std::string Version();  // "cublaslt-130100"

 private:
  explicit Gemm(cudaStream_t stream) : stream_(stream) {}
  const cublasLtMatmulAlgo_t& Pinned(const GemmShape& shape, int algorithm) const;
  Result<cublasLtMatmulAlgo_t> Fastest(const GemmArgs& args, const struct GemmLayouts& layouts);

  const cudaStream_t stream_;
  cublasLtHandle_t handle_ = nullptr;
  cublasLtMatmulDesc_t operation_ = nullptr;
  void* workspace_ = nullptr;
  std::map<GemmShape, std::vector<cublasLtMatmulAlgo_t>> pinned_;
  std::map<std::pair<GemmShape, std::int64_t>, cublasLtMatmulAlgo_t> fastest_;  // (shape, rows)
};

}  // namespace kvshare::kernels::cuda

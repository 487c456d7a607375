// The Backend over a Device: checks shapes, stages host tables, pins matrix algorithms, keeps the first error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "kernels/backend.h"
#include "kernels/cuda/device.h"

namespace kvshare::kernels::cuda {

struct BackendOptions {
  DType dtype = DType::kBf16;  // of weights, activations between operations, and KV; or kF16
  std::size_t memory_limit_bytes = std::size_t{1} << 40;
  bool deterministic = true;
  std::int64_t spread_bytes = 64 << 20;              // PlanLimits
  std::size_t staging_bytes = std::size_t{1} << 20;  // of each of kMarks chunks, more where one call brings more
};

Result<std::unique_ptr<Backend>> NewBackendOn(std::unique_ptr<Device> device, const BackendOptions& options);

}  // namespace kvshare::kernels::cuda

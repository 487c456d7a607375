#include "kernels/cuda/cuda_status.h"

namespace kvshare::kernels::cuda {

Status ToStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return OkStatus();
  std::string text = std::string(what) + ": " + cudaGetErrorName(error) + " (" + std::to_string(int{error}) +
                     "): " + cudaGetErrorString(error);
  switch (error) {
    case cudaErrorMemoryAllocation: return ResourceExhausted(std::move(text));
    case cudaErrorNoKernelImageForDevice: return FailedPrecondition(std::move(text));
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
    case cudaErrorSystemNotReady:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice: return Unavailable(std::move(text));
    default: return Internal(std::move(text));
  }
}

Status ToStatus(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return OkStatus();
  std::string text =
      std::string(what) + ": " + cublasLtGetStatusName(status) + " (" + std::to_string(int{status}) + ")";
  if (status == CUBLAS_STATUS_ALLOC_FAILED) return ResourceExhausted(std::move(text));
  // What an algorithm says to a size that it was not made for.
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE)
    return Unimplemented(std::move(text));
  return Internal(std::move(text));
}

}  // namespace kvshare::kernels::cuda

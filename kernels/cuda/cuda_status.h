// Errors of the CUDA runtime and of cuBLASLt as Status.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <string>

#include "kvshare/status.h"

namespace kvshare::kernels::cuda {

// "what: cudaErrorIllegalAddress (700): an illegal memory access was encountered". ResourceExhausted for lack of
// memory, FailedPrecondition for a device that this build has no code for, Unavailable for a driver that is missing or
// too old, Internal for all others, which leave the device unusable for this process.
Status ToStatus(cudaError_t error, const char* what);
Status ToStatus(cublasStatus_t status, const char* what);

}  // namespace kvshare::kernels::cuda

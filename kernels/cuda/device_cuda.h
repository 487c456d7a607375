// The machine's GPU as a Device.
#pragma once

#include <memory>

#include "kernels/cuda/device.h"
#include "kernels/cuda_plugin.h"

namespace kvshare::kernels::cuda {

// The cause in words, and what to do. Unavailable: no driver, none that is new enough, or no device; InvalidArgument:
// no device of that number; FailedPrecondition: older than sm_80.
Status ProbeDevice(int device, CudaDeviceInfo* info);

// `free_bytes`: of GPU memory, as the driver says it before we take any.
Result<std::unique_ptr<Device>> NewCudaDevice(int device, std::size_t* free_bytes);

}  // namespace kvshare::kernels::cuda

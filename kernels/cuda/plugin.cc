// The plug-in's one way in (kernels/cuda_plugin.h).
#include <new>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device_cuda.h"
#include "kernels/cuda_plugin.h"

namespace kvshare::kernels::cuda {
namespace {

Status Create(const CudaOptions& options, std::unique_ptr<Backend>* backend) {
  std::size_t free_bytes = 0;
  auto device = NewCudaDevice(options.device, &free_bytes);
  if (!device.ok()) return device.status();
  const std::size_t limit = options.memory_limit_bytes != 0 ? options.memory_limit_bytes : free_bytes / 10 * 9;
  auto made = NewBackendOn(std::move(*device), {.dtype = options.dtype,
                                                .memory_limit_bytes = limit,
                                                .deterministic = options.deterministic,
                                                .spread_bytes = options.spread_bytes});
  if (!made.ok()) return made.status();
  *backend = std::move(made).value();
  return OkStatus();
}

constexpr CudaPluginApi kApi = {kCudaPluginAbi, CudaPluginSizes(), KVS_CUDA_BUILD, &ProbeDevice, &Create};

}  // namespace
}  // namespace kvshare::kernels::cuda

extern "C" [[gnu::visibility("default")]] const kvshare::kernels::CudaPluginApi* KvshareCudaPlugin() {
  return &kvshare::kernels::cuda::kApi;
}

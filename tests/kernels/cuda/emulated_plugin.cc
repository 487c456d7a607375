// The emulated GPU as a plug-in, so that the programs themselves run on it where there is no GPU. While the file that
// KVSHARE_EMULATED_BREAK names exists, it is broken, and what broke stays so. Where KVSHARE_EMULATED_HOLD names a FIFO,
// one that broke waits, when it is given up, until somebody has opened that to write, and closed it. Launch number
// KVSHARE_EMULATED_FAIL_AT fails; KVSHARE_EMULATED_MEMORY is the memory in bytes.
#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <utility>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda_plugin.h"
#include "libkvshare/core/status_macros.h"
#include "tests/kernels/cuda/emulated_device.h"

namespace kvshare::kernels::cuda {
namespace {

bool Broken() {
  const char* file = std::getenv("KVSHARE_EMULATED_BREAK");
  return file != nullptr && access(file, F_OK) == 0;
}

// The device has it, and ends with it.
struct Hold {
  Hold() = default;
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;
  ~Hold() {
    const char* fifo = std::getenv("KVSHARE_EMULATED_HOLD");
    if (fifo == nullptr || !broke) return;
    const int fd = open(fifo, O_RDONLY | O_CLOEXEC);
    char byte = 0;
    while (read(fd, &byte, 1) > 0) {
    }
    close(fd);
  }
  bool broke = false;
};

Status Probe(int, CudaDeviceInfo* info) {
  if (Broken()) return Unavailable("the emulated GPU is broken");
  *info = {.name = "emulated", .arch = "emulated", .memory_bytes = EmulatedDeviceOptions().memory_bytes, .devices = 1};
  return OkStatus();
}

Status Create(const CudaOptions& asked, std::unique_ptr<Backend>* backend) {
  CudaDeviceInfo info;
  KVS_RETURN_IF_ERROR(Probe(0, &info));
  // Shared: std::function copies what it holds.
  const auto broken = [hold = std::make_shared<Hold>()] { return hold->broke = hold->broke || Broken(); };
  EmulatedDeviceOptions options{.broken = broken};
  if (const char* launch = std::getenv("KVSHARE_EMULATED_FAIL_AT")) options.fail_at_launch = std::atoi(launch);
  if (const char* bytes = std::getenv("KVSHARE_EMULATED_MEMORY")) options.memory_bytes = std::stoull(bytes);
  KVS_ASSIGN_OR_RETURN(
      *backend, NewBackendOn(NewEmulatedDevice(options), {.dtype = asked.dtype, .spread_bytes = asked.spread_bytes}));
  return OkStatus();
}

constexpr CudaPluginApi kApi = {kCudaPluginAbi, CudaPluginSizes(), "emulated", &Probe, &Create};

}  // namespace
}  // namespace kvshare::kernels::cuda

extern "C" [[gnu::visibility("default")]] const kvshare::kernels::CudaPluginApi* KvshareCudaPlugin() {
  return &kvshare::kernels::cuda::kApi;
}

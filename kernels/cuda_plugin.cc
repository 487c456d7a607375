#include "kernels/cuda_plugin.h"

#include <dlfcn.h>
#include <unistd.h>

#include <climits>
#include <cstdlib>
#include <vector>

#include "libkvshare/core/status_macros.h"

// Set by the build: whether it made the plug-in, why not, and where the install puts libraries, seen from the prefix.
#ifndef KVS_CUDA_BUILT
#define KVS_CUDA_BUILT 0
#endif
#ifndef KVS_CUDA_SKIPPED_BECAUSE
#define KVS_CUDA_SKIPPED_BECAUSE "it was not asked for"
#endif
#ifndef KVS_INSTALL_LIBDIR
#define KVS_INSTALL_LIBDIR "lib"
#endif

namespace kvshare::kernels {
namespace {

constexpr char kFileName[] = "libkvshare_cuda.so";
constexpr char kVariable[] = "KVSHARE_CUDA_PLUGIN";

// The folder that holds the running program's folder; empty when the system does not say.
std::string PrefixOfProgram() {
  char path[PATH_MAX];
  const ssize_t n = readlink("/proc/self/exe", path, sizeof path);
  if (n <= 0 || n >= static_cast<ssize_t>(sizeof path)) return "";
  std::string prefix(path, static_cast<std::size_t>(n));
  for (int up = 0; up < 2; ++up) prefix.resize(prefix.find_last_of('/') == std::string::npos ? 0 : prefix.rfind('/'));
  return prefix;
}

std::vector<std::string> Places() {
  std::vector<std::string> places;
  const std::string prefix = PrefixOfProgram();
  for (const char* libraries : {"lib", KVS_INSTALL_LIBDIR}) {
    const std::string place = prefix + "/" + libraries + "/kvshare/" + kFileName;
    if (places.empty() || places.back() != place) places.push_back(place);
  }
  return places;
}

Result<const CudaPluginApi*> Open() {
  if (const char* named = std::getenv(kVariable); named != nullptr && *named != '\0') return OpenCudaPluginAt(named);
  for (const std::string& place : Places()) {
    if (access(place.c_str(), F_OK) == 0) return OpenCudaPluginAt(place);
  }
  if (KVS_CUDA_BUILT == 0) {
    return Unimplemented("this build has no CUDA backend, because " KVS_CUDA_SKIPPED_BECAUSE
                         ": install the CUDA toolkit (nvcc, cuBLASLt) and build again with -DKVS_CUDA=ON");
  }
  return NotFound("the CUDA backend is not installed: " + Places().front() + " is not there; set " + kVariable +
                  " to where it is");
}

}  // namespace

Result<const CudaPluginApi*> OpenCudaPluginAt(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* error = dlerror();
    const std::string why = error != nullptr ? error : "unknown error";
    if (access(path.c_str(), F_OK) != 0) return NotFound("no CUDA backend at " + path);
    // The one library that it needs and a CUDA driver does not bring.
    const std::string advice = why.find("cublasLt") != std::string::npos
                                   ? "; install cuBLAS of the same CUDA release, or add its folder to LD_LIBRARY_PATH"
                                   : "";
    return FailedPrecondition("the CUDA backend cannot be loaded: " + why + advice);
  }
  const auto function = reinterpret_cast<CudaPluginFunction>(dlsym(library, kCudaPluginSymbol));
  const CudaPluginApi* api = function != nullptr ? function() : nullptr;
  if (api == nullptr || api->abi != kCudaPluginAbi || api->sizes != CudaPluginSizes()) {
    std::string what = "is no CUDA backend of kvshare";
    if (api != nullptr) {
      const auto version = [](std::uint32_t abi, std::uint32_t sizes) {
        return std::to_string(abi) + "." + std::to_string(sizes);
      };
      what = "is of another build (ABI " + version(api->abi, api->sizes) + ", not " +
             version(kCudaPluginAbi, CudaPluginSizes()) + ")";
    }
    dlclose(library);
    return FailedPrecondition(path + " " + what + "; install programs and backend from one build");
  }
  return api;
}

Result<const CudaPluginApi*> OpenCudaPlugin() {
  // Opened once and never closed: a driver that was initialised cannot be unloaded safely.
  static const Result<const CudaPluginApi*> opened = Open();
  return opened;
}

Result<CudaDeviceInfo> ProbeCuda(int device) {
  KVS_ASSIGN_OR_RETURN(const CudaPluginApi* api, OpenCudaPlugin());
  CudaDeviceInfo info;
  KVS_RETURN_IF_ERROR(api->probe(device, &info));
  return info;
}

Result<std::unique_ptr<Backend>> NewCudaBackend(const CudaOptions& options) {
  KVS_ASSIGN_OR_RETURN(const CudaPluginApi* api, OpenCudaPlugin());
  std::unique_ptr<Backend> backend;
  KVS_RETURN_IF_ERROR(api->create(options, &backend));
  return backend;
}

}  // namespace kvshare::kernels

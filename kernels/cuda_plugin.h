// The CUDA backend as a plug-in: found, opened and checked only when somebody asks, so that a process that computes on
// the CPU maps nothing of it. What can go wrong, and what to do about it, is in the Status.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "kernels/backend.h"

namespace kvshare::kernels {

struct CudaOptions {
  int device = 0;
  // Of GPU memory, for weights, activations, pages and scratch together; 0: nine tenths of what is free at the start.
  std::size_t memory_limit_bytes = 0;
  // Linear layers whose rows have the same bits in any batch, so that an exact hit equals recomputation bit for bit.
  // Without it, whatever algorithm is fastest for each number of rows.
  bool deterministic = true;
  DType dtype = DType::kBf16;  // of weights, activations between operations, and KV; or kF16
  // Of partial results of attention that may lie side by side; with more, a block walks all keys of its rows.
  std::int64_t spread_bytes = 64 << 20;
};

struct CudaDeviceInfo {
  std::string name;  // "NVIDIA H200"
  std::string arch;  // "sm_90"
  std::size_t memory_bytes = 0;
  int devices = 0;  // in this machine
};

// What the plug-in's one function returns. `abi` and `sizes` come first and stay first: they are read before anything
// else is believed.
struct CudaPluginApi {
  std::uint32_t abi = 0;    // kCudaPluginAbi
  std::uint32_t sizes = 0;  // CudaPluginSizes(): of the structs that cross, by the plug-in's compiler
  const char* build = "";   // "CUDA 13.0 for sm_80 sm_90a sm_100"
  // Unavailable (no driver, no device) or FailedPrecondition (device too old) when device `device` cannot be used.
  Status (*probe)(int device, CudaDeviceInfo* info) = nullptr;
  Status (*create)(const CudaOptions& options, std::unique_ptr<Backend>* backend) = nullptr;
};
inline constexpr char kCudaPluginSymbol[] = "KvshareCudaPlugin";
using CudaPluginFunction = const CudaPluginApi* (*)();

// Raised with every change of an interface that the plug-in and its caller share.
inline constexpr std::uint32_t kCudaPluginAbi = 4;

// A digest of the layouts that cross the boundary.
constexpr std::uint32_t CudaPluginSizes() {
  std::uint32_t digest = 2166136261u;  // FNV-1a
  for (const std::size_t size :
       {sizeof(Status), sizeof(Capabilities), sizeof(LinearSpec), sizeof(EmbedParams), sizeof(RmsNormParams),
        sizeof(LinearParams), sizeof(GatedLinearParams), sizeof(StoreKvParams), sizeof(AttentionParams),
        sizeof(KvSegment), sizeof(KvPages), sizeof(CudaOptions), sizeof(CudaDeviceInfo)}) {
    digest = (digest ^ static_cast<std::uint32_t>(size)) * 16777619u;
  }
  return digest;
}

// The plug-in, opened once a process. It is looked for at $KVSHARE_CUDA_PLUGIN if that is set, else in lib/kvshare
// beside the folder of the running program. Unimplemented: this build has none. NotFound: no such file.
// FailedPrecondition: it cannot be loaded, or belongs to another build.
Result<const CudaPluginApi*> OpenCudaPlugin();
// The same with the file named, opened anew each time; for tests.
Result<const CudaPluginApi*> OpenCudaPluginAt(const std::string& path);

// Whether the CUDA backend can be used here, and on what.
Result<CudaDeviceInfo> ProbeCuda(int device = 0);

// Errors: those of OpenCudaPlugin and of the plug-in's probe; ResourceExhausted.
Result<std::unique_ptr<Backend>> NewCudaBackend(const CudaOptions& options);

}  // namespace kvshare::kernels

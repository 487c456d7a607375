#include "bench/cuda/ceilings.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "libkvshare/core/status_macros.h"

namespace {

using kvshare::Internal;
using kvshare::OkStatus;
using kvshare::Status;

constexpr std::size_t kBytes = std::size_t{1} << 30;
constexpr int kRepeats = 20;

Status Ok(cudaError_t error, const char* what) {
  return error == cudaSuccess ? OkStatus() : Internal(std::string(what) + ": " + cudaGetErrorString(error));
}

// What is held while the copies run.
struct Memory {
  ~Memory() {
    cudaFree(a);
    cudaFree(b);
    cudaFreeHost(host);
    if (begin != nullptr) cudaEventDestroy(begin);
    if (end != nullptr) cudaEventDestroy(end);
  }
  void* a = nullptr;
  void* b = nullptr;
  void* host = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
};

}  // namespace

Status MeasureCeilings(const std::function<void(const char*, double, double)>& report) {
  Memory m;
  KVS_RETURN_IF_ERROR(Ok(cudaMalloc(&m.a, kBytes), "cudaMalloc"));
  KVS_RETURN_IF_ERROR(Ok(cudaMalloc(&m.b, kBytes), "cudaMalloc"));
  KVS_RETURN_IF_ERROR(Ok(cudaMallocHost(&m.host, kBytes), "cudaMallocHost"));
  KVS_RETURN_IF_ERROR(Ok(cudaEventCreate(&m.begin), "cudaEventCreate"));
  KVS_RETURN_IF_ERROR(Ok(cudaEventCreate(&m.end), "cudaEventCreate"));
  std::mt19937_64 random(5);  // not zeros: those are copied faster
  auto* words = static_cast<std::uint64_t*>(m.host);
  std::generate(words, words + kBytes / 8, std::ref(random));
  KVS_RETURN_IF_ERROR(Ok(cudaMemcpy(m.a, m.host, kBytes, cudaMemcpyHostToDevice), "cudaMemcpy"));
  const struct {
    const char* name;
    void* to;
    const void* from;
    double moved;
  } copies[] = {{"copy on the device, read + write", m.b, m.a, 2.0 * kBytes},
                {"pinned memory to the device", m.b, m.host, 1.0 * kBytes},
                {"device to pinned memory", m.host, m.a, 1.0 * kBytes}};
  for (const auto& copy : copies) {
    double least = 1e9;
    for (int i = 0; i < kRepeats; ++i) {
      float ms = 0;
      KVS_RETURN_IF_ERROR(Ok(cudaEventRecord(m.begin), "cudaEventRecord"));
      KVS_RETURN_IF_ERROR(Ok(cudaMemcpyAsync(copy.to, copy.from, kBytes, cudaMemcpyDefault), "cudaMemcpyAsync"));
      KVS_RETURN_IF_ERROR(Ok(cudaEventRecord(m.end), "cudaEventRecord"));
      KVS_RETURN_IF_ERROR(Ok(cudaEventSynchronize(m.end), "cudaEventSynchronize"));
      KVS_RETURN_IF_ERROR(Ok(cudaEventElapsedTime(&ms, m.begin, m.end), "cudaEventElapsedTime"));
      least = std::min(least, static_cast<double>(ms) / 1e3);
    }
    report(copy.name, least, copy.moved / least / 1e9);
  }
  return OkStatus();
}

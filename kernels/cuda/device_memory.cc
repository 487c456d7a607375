#include "kernels/cuda/device_memory.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::kernels::cuda {

DeviceMemory::~DeviceMemory() {
  ReleaseKept();
  for (const auto& [data, bytes] : in_use_) device_.Free(data);
}

// Steps of an eighth of the power of two below: a kept block fits requests that differ a little, at 12 % at most.
std::size_t DeviceMemory::BlockBytes(std::size_t bytes) {
  std::size_t step = 256;
  while (step * 16 <= bytes) step *= 2;
  return std::max<std::size_t>((bytes + step - 1) / step * step, 256);
}

Result<std::byte*> DeviceMemory::Take(std::size_t bytes) {
  if (bytes > limit_) {
    return ResourceExhausted("one block of " + std::to_string(bytes >> 20) + " MiB is beyond the limit of " +
                             std::to_string(limit_ >> 20) + " MiB of GPU memory");
  }
  const std::size_t block = BlockBytes(bytes);
  // A kept block twice as large would waste more than asking costs.
  auto it = kept_.lower_bound(block);
  std::byte* data = nullptr;
  std::size_t size = block;
  if (it != kept_.end() && it->first < 2 * block) {
    data = it->second;
    size = it->first;
    kept_.erase(it);
  } else {
    if (taken_ + block > limit_) ReleaseKept();
    if (taken_ + block > limit_) {
      return ResourceExhausted("no " + std::to_string(bytes >> 20) +
                               " MiB of GPU memory: " + std::to_string(used_ >> 20) + " MiB of the limit of " +
                               std::to_string(limit_ >> 20) + " MiB are in use");
    }
    auto fresh = device_.Allocate(block);
    if (!fresh.ok() && !kept_.empty()) {
      ReleaseKept();
      fresh = device_.Allocate(block);
    }
    if (!fresh.ok()) return fresh.status();
    data = *fresh;
    taken_ += block;
  }
  in_use_[data] = size;
  used_ += size;
  return data;
}

void DeviceMemory::Give(std::byte* data) {
  const auto it = in_use_.find(data);
  KVS_CHECK(it != in_use_.end());
  kept_.emplace(it->second, data);
  used_ -= it->second;
  in_use_.erase(it);
}

void DeviceMemory::ReleaseKept() {
  for (const auto& [bytes, data] : kept_) {
    device_.Free(data);  // waits for the work that uses it
    taken_ -= bytes;
  }
  kept_.clear();
}

Staging::~Staging() {
  for (Chunk& chunk : chunks_) {
    if (chunk.host != nullptr) device_.FreePinned(chunk.host);
    if (chunk.device != nullptr) memory_.Give(chunk.device);
  }
}

Status Staging::Resize(Chunk& chunk, std::size_t bytes) {
  if (chunk.host != nullptr) device_.FreePinned(chunk.host);
  if (chunk.device != nullptr) memory_.Give(chunk.device);
  chunk = {};
  KVS_ASSIGN_OR_RETURN(chunk.host, device_.AllocatePinned(bytes));
  KVS_ASSIGN_OR_RETURN(chunk.device, memory_.Take(bytes));
  chunk.bytes = bytes;
  return OkStatus();
}

Status Staging::Begin(std::size_t bytes) {
  promised_ = bytes;
  if (used_ + bytes <= chunks_[current_].bytes) return OkStatus();
  if (used_ > 0) {
    KVS_RETURN_IF_ERROR(device_.Mark(current_));
    chunks_[current_].marked = true;
    current_ = (current_ + 1) % kMarks;
  }
  Chunk& chunk = chunks_[current_];
  used_ = 0;
  if (chunk.marked) {
    KVS_RETURN_IF_ERROR(device_.Wait(current_));
    chunk.marked = false;
  }
  if (chunk.bytes < bytes) return Resize(chunk, std::max(bytes, chunk_bytes_));
  return OkStatus();
}

Result<const std::byte*> Staging::PutBytes(const void* data, std::size_t bytes) {
  if (bytes == 0) return static_cast<const std::byte*>(nullptr);
  const std::size_t rounded = (bytes + kAlign - 1) / kAlign * kAlign;
  KVS_CHECK(rounded <= promised_);
  promised_ -= rounded;
  Chunk& chunk = chunks_[current_];
  std::byte* host = chunk.host + used_;
  std::byte* device = chunk.device + used_;
  std::memcpy(host, data, bytes);
  KVS_RETURN_IF_ERROR(device_.CopyIn(device, host, bytes));
  used_ += rounded;
  return static_cast<const std::byte*>(device);
}

}  // namespace kvshare::kernels::cuda

// Device memory in blocks that are kept for the next who asks, within a limit; and the ring of pinned chunks through
// which small host tables cross. Freed blocks may still be in use by work that was enqueued before: all work is in one
// stream, so whoever gets the block next comes after it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "kernels/cuda/device.h"

namespace kvshare::kernels::cuda {

class DeviceMemory {
 public:
  // limit_bytes counts what is taken from the device, in use or kept.
  DeviceMemory(Device& device, std::size_t limit_bytes) : device_(device), limit_(limit_bytes) {}
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  // ResourceExhausted, naming the limit, when neither a kept block nor the device has as much.
  Result<std::byte*> Take(std::size_t bytes);
  void Give(std::byte* data);

  std::size_t taken_bytes() const { return taken_; }  // from the device
  std::size_t used_bytes() const { return used_; }

 private:
  static std::size_t BlockBytes(std::size_t bytes);
  void ReleaseKept();

  Device& device_;
  const std::size_t limit_;
  std::size_t taken_ = 0, used_ = 0;
  std::multimap<std::size_t, std::byte*> kept_;
  std::map<std::byte*, std::size_t> in_use_;
};

// Copies of host tables on the device, each valid for the work enqueued until kMarks chunks later.
class Staging {
 public:
  Staging(Device& device, DeviceMemory& memory, std::size_t chunk_bytes)
      : device_(device), memory_(memory), chunk_bytes_(chunk_bytes) {}
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  // What one operation brings lies in one chunk, because a chunk is written anew once its mark has passed: `bytes` is
  // at least the sum of what Put is given until the next Begin, each rounded up to kAlign.
  Status Begin(std::size_t bytes);
  template <typename T>
  Result<const T*> Put(std::span<const T> values) {
    auto at = PutBytes(values.data(), values.size_bytes());
    if (!at.ok()) return at.status();
    return reinterpret_cast<const T*>(*at);
  }

  static constexpr std::size_t kAlign = 64;

 private:
  struct Chunk {
    std::byte* host = nullptr;
    std::byte* device = nullptr;
    std::size_t bytes = 0;
    bool marked = false;
  };
  Result<const std::byte*> PutBytes(const void* data, std::size_t bytes);
  Status Resize(Chunk& chunk, std::size_t bytes);

  Device& device_;
  DeviceMemory& memory_;
  const std::size_t chunk_bytes_;
  Chunk chunks_[kMarks];
  int current_ = 0;
  std::size_t used_ = 0, promised_ = 0;
};

// What a table adds to Begin's sum.
template <typename T>
std::size_t StagedBytes(std::span<const T> values) {
  return (values.size_bytes() + Staging::kAlign - 1) / Staging::kAlign * Staging::kAlign;
}

}  // namespace kvshare::kernels::cuda

// What is enqueued on a Device, and the first thing that failed. Logged before it is made, so that whatever the driver
// says later, the launch is named; after a failure nothing more is launched.
#pragma once

#include <string>
#include <utility>

#include "kernels/cuda/device.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/launch_log.h"

namespace kvshare::kernels::cuda {

class LaunchQueue {
 public:
  LaunchQueue(Device& device, std::size_t memory_limit_bytes, std::size_t staging_bytes)
      : device_(device), memory_(device, memory_limit_bytes), staging_(device, memory_, staging_bytes) {}

  Device& device() { return device_; }
  DeviceMemory& memory() { return memory_; }
  const DeviceMemory& memory() const { return memory_; }
  Staging& staging() { return staging_; }

  // `launch` returns a Status. The two sizes tell one launch from another, rows first.
  template <typename Launch>
  void Do(const char* name, std::int64_t rows, std::int64_t size, Launch&& launch) {
    if (!failed_.ok()) return;
    log_.Note(name, rows, size);
    Keep(launch());
  }
  void Keep(const Status& status) {
    if (!status.ok()) Fail(status);
  }
  void Fail(const Status& status) {
    if (!failed_.ok()) return;
    failed_ = Status(status.code(), status.message() + "; last on the GPU: " + log_.Text());
  }
  // Waits for all of it; the first failure.
  Status Sync() {
    if (failed_.ok()) Keep(device_.Synchronize());
    return failed_;
  }
  const Status& failed() const { return failed_; }

 private:
  Device& device_;
  DeviceMemory memory_;
  Staging staging_;
  LaunchLog log_;
  Status failed_;
};

// A block of DeviceMemory, given back with the handle.
class DeviceBlock {
 public:
  static Result<DeviceBlock> Take(DeviceMemory& memory, std::size_t bytes) {
    auto data = memory.Take(bytes);
    if (!data.ok()) return data.status();
    return DeviceBlock(memory, *data);
  }
  DeviceBlock() = default;
  DeviceBlock(DeviceBlock&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)), data_(std::exchange(other.data_, nullptr)) {}
  DeviceBlock& operator=(DeviceBlock&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~DeviceBlock() {
    if (memory_ != nullptr) memory_->Give(data_);
  }
  std::byte* data() const { return data_; }

 private:
  DeviceBlock(DeviceMemory& memory, std::byte* data) : memory_(&memory), data_(data) {}
  DeviceMemory* memory_ = nullptr;
  std::byte* data_ = nullptr;
};

}  // namespace kvshare::kernels::cuda

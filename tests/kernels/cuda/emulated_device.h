// A Device on the host: kernels run in the emulator, memory is the host's. The stream is a queue that runs as late as
// it may, so that host tables which were overwritten too early, or results read too soon, show. What is aside runs at
// once or as late, by turns. Fresh memory is NaN.
#pragma once

#include <functional>
#include <memory>

#include "kernels/cuda/device.h"
#include "tests/kernels/cuda/emulator.h"

namespace kvshare::kernels::cuda {

struct EmulatedDeviceOptions {
  std::uint64_t seed = 1;
  std::size_t memory_bytes = std::size_t{1} << 30;
  int gemm_candidates = 2;
  std::uint64_t gemm_family = 0;           // part of every candidate's identity
  int invariant_from = 0;                  // candidates below this sum in an order that depends on the number of rows
  int few_rows_from = 0;                   // candidates below this refuse fewer than 8 rows
  int fail_at_launch = -1;                 // that launch, counted from 0, fails when it runs
  std::function<bool()> broken = nullptr;  // asked before each launch runs: true, and it fails; null: never
};

// Of all emulated devices of this process, since the last call.
GridStats TakeGridStats();

std::unique_ptr<Device> NewEmulatedDevice(const EmulatedDeviceOptions& options);

}  // namespace kvshare::kernels::cuda

// The CUDA backends that a conformance test runs on: the emulated one with either schedule of attention, and the
// machine's own where there is one.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <utility>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda_plugin.h"
#include "tests/kernels/cuda/emulated_device.h"

namespace kvshare::kernels::cuda {

enum class Where { kEmulatedWalk, kEmulatedSpread, kDevice };

inline std::string WhereName(const ::testing::TestParamInfo<Where>& info) {
  switch (info.param) {
    case Where::kEmulatedWalk: return "EmulatedWalk";
    case Where::kEmulatedSpread: return "EmulatedSpread";
    case Where::kDevice: break;
  }
  return "Device";
}

class CudaTest : public ::testing::TestWithParam<Where> {
 protected:
  void SetUp() override {
    if (GetParam() == Where::kDevice) {
      auto backend = NewCudaBackend({});
      if (!backend.ok()) GTEST_SKIP() << "no GPU to test on: " << backend.status().message();
      backend_ = std::move(backend).value();
      return;
    }
    const bool spread = GetParam() == Where::kEmulatedSpread;
    auto backend = NewBackendOn(NewEmulatedDevice({}), {.spread_bytes = spread ? std::int64_t{1} << 40 : 0});
    ASSERT_TRUE(backend.ok()) << backend.status().message();
    backend_ = std::move(backend).value();
  }

  // On a GPU there is more to see and time to see it.
  static int Repeats(int emulated) { return GetParam() == Where::kDevice ? 20 * emulated : emulated; }

  std::unique_ptr<Backend> backend_;
};

}  // namespace kvshare::kernels::cuda

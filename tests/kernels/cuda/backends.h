// The CUDA backends that a conformance test runs on: the emulated one with either schedule of attention, and the
// machine's own where there is one.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda_plugin.h"
#include "tests/kernels/cuda/emulated_device.h"

namespace kvshare::kernels::cuda {

// kDevice: as agentd uses it, which walks only where a prompt is long. kDeviceWalk: always.
// In bfloat16, but for those that say F16.
enum class Where { kEmulatedWalk, kEmulatedSpread, kEmulatedF16, kDevice, kDeviceWalk, kDeviceF16 };

inline std::string WhereName(const ::testing::TestParamInfo<Where>& info) {
  switch (info.param) {
    case Where::kEmulatedWalk: return "EmulatedWalk";
    case Where::kEmulatedSpread: return "EmulatedSpread";
    case Where::kEmulatedF16: return "EmulatedF16";
    case Where::kDevice: return "Device";
    case Where::kDeviceWalk: return "DeviceWalk";
    case Where::kDeviceF16: break;
  }
  return "DeviceF16";
}

// For what does not depend on how attention's work is cut.
inline const auto kEachHalf =
    ::testing::Values(Where::kEmulatedWalk, Where::kEmulatedF16, Where::kDevice, Where::kDeviceF16);

class CudaTest : public ::testing::TestWithParam<Where> {
 protected:
  void SetUp() override {
    if (OnDevice()) {
      CudaOptions options{.dtype = half()};
      if (GetParam() == Where::kDeviceWalk) options.spread_bytes = 0;
      auto backend = NewCudaBackend(options);
      if (!backend.ok()) GTEST_SKIP() << "no GPU to test on: " << backend.status().message();
      backend_ = std::move(backend).value();
      return;
    }
    const bool walk = GetParam() == Where::kEmulatedWalk;
    auto backend =
        NewBackendOn(NewEmulatedDevice({}), {.dtype = half(), .spread_bytes = walk ? 0 : std::int64_t{1} << 40});
    ASSERT_TRUE(backend.ok()) << backend.status().message();
    backend_ = std::move(backend).value();
  }

  // On a GPU there is more to see and time to see it.
  static int Repeats(int emulated) { return OnDevice() ? 20 * emulated : emulated; }
  static bool OnDevice() { return GetParam() >= Where::kDevice; }
  // What the backend keeps KV and activations in.
  static DType half() {
    return GetParam() == Where::kEmulatedF16 || GetParam() == Where::kDeviceF16 ? DType::kF16 : DType::kBf16;
  }

  std::vector<std::byte> Download(const std::byte* from, std::size_t bytes) {
    std::vector<std::byte> to(bytes);
    const Status status = backend_->Download(to.data(), from, bytes);
    EXPECT_TRUE(status.ok()) << status.message();
    return to;
  }
  // Memory of the backend that holds `values`.
  template <typename T>
  std::unique_ptr<Buffer> Uploaded(std::span<const T> values) {
    auto buffer = backend_->Allocate(values.size_bytes());
    EXPECT_TRUE(buffer.ok()) << buffer.status().message();
    const Status status = backend_->Upload((*buffer)->data(), values.data(), values.size_bytes());
    EXPECT_TRUE(status.ok()) << status.message();
    return std::move(buffer).value();
  }
  // The same, poisoned: not a number, whether it is read as a half or as fp32.
  std::unique_ptr<Buffer> Block(std::size_t bytes) {
    const std::vector<std::byte> poison(bytes, std::byte{0xff});
    return Uploaded(std::span<const std::byte>(poison));
  }

  std::unique_ptr<Backend> backend_;
};

}  // namespace kvshare::kernels::cuda

// The loader of the CUDA plug-in: every way in which it does not work says what is wrong and what to do.
#include "kernels/cuda_plugin.h"

#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

namespace kvshare::kernels {
namespace {

using ::testing::HasSubstr;

TEST(CudaPluginTest, AFileThatIsNotThereIsNamed) {
  const auto opened = OpenCudaPluginAt("/nowhere/libkvshare_cuda.so");
  ASSERT_FALSE(opened.ok());
  EXPECT_EQ(opened.status().code(), StatusCode::kNotFound);
  EXPECT_THAT(opened.status().message(), HasSubstr("/nowhere/libkvshare_cuda.so"));
}

TEST(CudaPluginTest, ALibraryThatIsNoPluginIsRefused) {
  Dl_info info{};
  ASSERT_NE(dladdr(reinterpret_cast<void*>(&std::getenv), &info), 0);  // the C library's own file
  const auto opened = OpenCudaPluginAt(info.dli_fname);
  ASSERT_FALSE(opened.ok());
  EXPECT_EQ(opened.status().code(), StatusCode::kFailedPrecondition);
  EXPECT_THAT(opened.status().message(), HasSubstr("is no CUDA backend of kvshare"));
}

TEST(CudaPluginTest, AFileThatIsNoLibraryIsRefused) {
  const auto opened = OpenCudaPluginAt("/proc/self/status");
  ASSERT_FALSE(opened.ok());
  EXPECT_EQ(opened.status().code(), StatusCode::kFailedPrecondition);
}

TEST(CudaPluginTest, APluginOfAnotherBuildIsRefused) {
  const auto opened = OpenCudaPluginAt(KVS_FOREIGN_PLUGIN);
  ASSERT_FALSE(opened.ok());
  EXPECT_EQ(opened.status().code(), StatusCode::kFailedPrecondition);
  EXPECT_THAT(opened.status().message(), HasSubstr("is of another build (ABI 999.0, not "));
  EXPECT_THAT(opened.status().message(), HasSubstr("install programs and backend from one build"));
}

// On a machine without GPU: why not. On one with: what it is.
TEST(CudaPluginTest, ProbingSaysWhatThereIsOrWhyNot) {
  const auto device = ProbeCuda();
  if (device.ok()) {
    EXPECT_FALSE(device->name.empty());
    EXPECT_THAT(device->arch, HasSubstr("sm_"));
    EXPECT_GT(device->memory_bytes, 0u);
    EXPECT_EQ(ProbeCuda(device->devices).status().code(), StatusCode::kInvalidArgument);
    return;
  }
  SCOPED_TRACE(device.status().message());
#if KVS_CUDA_BUILT
  EXPECT_THAT(device.status().code(), testing::AnyOf(StatusCode::kUnavailable, StatusCode::kFailedPrecondition));
  EXPECT_THAT(device.status().message(),
              testing::AnyOf(HasSubstr("no NVIDIA driver on this machine"), HasSubstr("install a newer driver"),
                             HasSubstr("no NVIDIA GPU in this machine"), HasSubstr("older than sm_80"),
                             HasSubstr("no GPU can be used")));
#else
  EXPECT_EQ(device.status().code(), StatusCode::kUnimplemented);
  EXPECT_THAT(device.status().message(), HasSubstr("build again with -DKVS_CUDA=ON"));
#endif
  // Asking for a backend fails the same way, with nothing half made.
  const auto backend = NewCudaBackend({});
  ASSERT_FALSE(backend.ok());
  EXPECT_EQ(backend.status().message(), device.status().message());
}

}  // namespace
}  // namespace kvshare::kernels

// What the CUDA backend does around its kernels, on a device that fails, fills up and runs late on purpose.
#include "kernels/cuda/cuda_backend.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/launch_log.h"
#include "kernels/device_kv.h"
#include "tests/kernels/cuda/emulated_device.h"

namespace kvshare::kernels::cuda {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

std::unique_ptr<Backend> Make(const EmulatedDeviceOptions& device, const BackendOptions& options = {}) {
  auto backend = NewBackendOn(NewEmulatedDevice(device), options);
  EXPECT_TRUE(backend.ok());
  return std::move(backend).value();
}

Result<std::unique_ptr<LinearWeights>> MakeLayer(Backend& backend) {
  std::vector<float> values(64 * 32);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = std::sin(static_cast<float>(i));
  const HostMatrix part{values.data(), 32, 64};
  return backend.MakeLinear({.parts = {&part, 1}, .bias = {}, .gated = false});
}

TEST(CudaBackendTest, AnAlgorithmWhoseRowsDependOnEachOtherIsPassedOver) {
  const auto backend = Make({.gemm_candidates = 3, .invariant_from = 2});
  EXPECT_THAT(backend->capabilities().numerics_id, Not(HasSubstr("#")));
  const auto layer = MakeLayer(*backend);
  ASSERT_TRUE(layer.ok()) << layer.status().message();
  // Another algorithm is another arithmetic: its KV must not be taken for the first one's.
  EXPECT_THAT(backend->capabilities().numerics_id, HasSubstr("/det/32x64#0000000000000002"));
}

// Machines whose libraries offer other algorithms first: the same number, another arithmetic.
TEST(CudaBackendTest, TheNumericsIdNamesTheAlgorithmAndNotItsPlace) {
  const auto id = [](std::uint64_t family) {
    const auto backend = Make({.gemm_family = family});
    EXPECT_TRUE(MakeLayer(*backend).ok());
    return backend->capabilities().numerics_id;
  };
  EXPECT_EQ(id(1), id(1));
  EXPECT_NE(id(1), id(2));
}

TEST(CudaBackendTest, AnAlgorithmThatRefusesFewRowsIsPassedOver) {
  const auto backend = Make({.gemm_candidates = 2, .few_rows_from = 1});
  ASSERT_TRUE(MakeLayer(*backend).ok());
  EXPECT_THAT(backend->capabilities().numerics_id, HasSubstr("/det/32x64#0000000000000001"));
  EXPECT_TRUE(backend->Sync().ok());
}

TEST(CudaBackendTest, ALayerWithoutAnInvariantAlgorithmIsRefused) {
  const auto backend = Make({.gemm_candidates = 2, .invariant_from = 9});
  const auto layer = MakeLayer(*backend);
  ASSERT_FALSE(layer.ok());
  EXPECT_EQ(layer.status().code(), StatusCode::kInternal);
  EXPECT_THAT(layer.status().message(), HasSubstr("none of 2 matrix algorithms for 32 x 64"));
  EXPECT_FALSE(backend->SelfTest().ok());
}

TEST(CudaBackendTest, FastModePinsNothing) {
  const auto backend = Make({.gemm_candidates = 0}, {.deterministic = false});
  EXPECT_TRUE(MakeLayer(*backend).ok());
  EXPECT_TRUE(backend->SelfTest().ok());
  EXPECT_THAT(backend->capabilities().numerics_id, HasSubstr("/fast/"));
}

TEST(CudaBackendTest, AWeightBeyondFloat16IsRefusedThereAlone) {
  std::vector<float> values(8 * 8);
  values[13] = 70000.0f;
  const HostMatrix part{values.data(), 8, 8};
  const LinearSpec spec{.parts = {&part, 1}, .bias = {}, .gated = false};
  EXPECT_TRUE(Make({})->MakeLinear(spec).ok());
  const auto layer = Make({}, {.dtype = DType::kF16})->MakeLinear(spec);
  EXPECT_EQ(layer.status().code(), StatusCode::kFailedPrecondition);
  EXPECT_THAT(layer.status().message(), HasSubstr("a weight of 70000.000000 is beyond the range of float16"));
}

TEST(CudaBackendTest, SizesThatTheGpuCannotMultiplyAreRefused) {
  const auto backend = Make({});
  const std::vector<float> values(5 * 8);
  const HostMatrix part{values.data(), 5, 8};
  const auto layer = backend->MakeLinear({.parts = {&part, 1}, .bias = {}, .gated = false});
  ASSERT_FALSE(layer.ok());
  EXPECT_EQ(layer.status().code(), StatusCode::kFailedPrecondition);
}

TEST(CudaBackendTest, AFailureShowsInSyncWithTheLastLaunches) {
  const auto backend = Make({.fail_at_launch = 1});
  auto table = backend->Allocate(64 * 4), out = backend->Allocate(64 * 4);
  ASSERT_TRUE(table.ok() && out.ok());
  const std::vector<std::int32_t> ids = {0};
  const MatrixView from{(*table)->data(), DType::kF32, 1, 64, 64}, to{(*out)->data(), DType::kF32, 1, 64, 64};
  const auto weight = std::span(reinterpret_cast<const float*>((*table)->data()), 64);
  backend->Embed({.ids = ids, .table = from, .out = to});
  EXPECT_TRUE(backend->Sync().ok());
  backend->RmsNorm({.x = to, .weight = weight, .eps = 1e-5f, .out = from});  // enqueued; nobody knows yet
  backend->Embed({.ids = ids, .table = from, .out = to});
  const Status status = backend->Sync();
  EXPECT_EQ(status.code(), StatusCode::kInternal);
  EXPECT_THAT(status.message(),
              HasSubstr("an illegal address; last on the GPU: embed 1x64, rms_norm 1x64, embed 1x64"));
  // It stays so, and what follows is not launched.
  backend->Embed({.ids = ids, .table = from, .out = to});
  EXPECT_EQ(backend->Sync().message(), status.message());
  EXPECT_FALSE(backend->Upload((*table)->data(), ids.data(), 4).ok());
}

TEST(CudaBackendTest, MemoryBeyondTheLimitIsRefusedAndFreedMemoryIsTakenAgain) {
  const auto backend = Make({}, {.memory_limit_bytes = 1 << 20});
  EXPECT_EQ(backend->Allocate(2 << 20).status().code(), StatusCode::kResourceExhausted);
  for (int i = 0; i < 10; ++i) {
    auto first = backend->Allocate(600 << 10);
    ASSERT_TRUE(first.ok()) << first.status().message();
    const auto second = backend->Allocate(600 << 10);
    ASSERT_FALSE(second.ok());
    EXPECT_THAT(second.status().message(), HasSubstr("of the limit of 1 MiB are in use"));
  }
  // A kept block of another size makes room.
  EXPECT_TRUE(backend->Allocate(900 << 10).ok());
}

TEST(CudaBackendTest, RepairWithoutMemoryOrOnAFailedDeviceSaysSo) {
  constexpr KvLayout kLayout{2, 1, 64, DType::kBf16};
  for (const bool full : {true, false}) {
    const auto backend = Make({.fail_at_launch = full ? -1 : 0}, {.memory_limit_bytes = 4 << 20});
    auto memory = backend->Allocate(2 * kLayout.page_bytes());
    ASSERT_TRUE(memory.ok());
    const KvPages pages{(*memory)->data(), 1, kLayout};
    auto* const floats = reinterpret_cast<float*>((*memory)->data() + kLayout.page_bytes());
    // Nothing is left, not even a kept block.
    std::vector<std::unique_ptr<Buffer>> all;
    for (std::size_t bytes = 1 << 20; full && bytes >= 64;) {
      auto block = backend->Allocate(bytes);
      if (block.ok()) {
        all.push_back(std::move(block).value());
      } else {
        bytes /= 2;
      }
    }
    const StatusCode want = full ? StatusCode::kResourceExhausted : StatusCode::kInternal;
    const std::vector<KvSlot> slots = {{0, 3}};
    const std::vector<std::int64_t> positions = {5}, rows = {0};
    const AnchorKv anchor{
        {reinterpret_cast<const std::int8_t*>(floats), reinterpret_cast<const std::uint16_t*>(floats)}, {}, 1};
    const AnchoredTokens tokens{pages, {}, slots, positions, {&anchor, 1}};
    float distance = 0;
    EXPECT_EQ(backend->device_kv()->AnchorDistances(tokens, floats, {&distance, 1}).code(), want);
    std::int32_t chosen = 0;
    EXPECT_EQ(backend->device_kv()->ChooseRowsByMass(floats, nullptr, 1, {&chosen, 1}).code(), want);
    const PageIndex page = 0;
    const KvSegment segment{.pages = {&page, 1}, .length = 6, .row_end = 1};
    AttentionParams p;
    p.q = {floats, DType::kF32, 1, 64, 64};
    p.num_heads = 1;
    p.positions = positions;
    p.segments = {&segment, 1};
    p.pages = pages;
    float* const mass = floats + 64;
    backend->device_kv()->AttentionMass(p, rows, {&mass, 1});
    EXPECT_EQ(backend->Sync().code(), want);
  }
}

TEST(DeviceMemoryTest, CountsWhatIsTakenAndUsed) {
  const auto device = NewEmulatedDevice({});
  DeviceMemory memory(*device, 1 << 20);
  const auto a = memory.Take(1000), b = memory.Take(5000);
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_GE(memory.used_bytes(), 6000u);
  EXPECT_EQ(memory.used_bytes(), memory.taken_bytes());
  memory.Give(*a);
  EXPECT_LT(memory.used_bytes(), memory.taken_bytes());
  const auto again = memory.Take(900);
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(*again, *a);
  EXPECT_EQ(memory.used_bytes(), memory.taken_bytes());
}

// Tables go through few small chunks, and the device reads them as late as it may.
TEST(StagingTest, ATableIsNotOverwrittenBeforeTheDeviceHasReadIt) {
  const auto device = NewEmulatedDevice({});
  DeviceMemory memory(*device, 64 << 20);
  Staging staging(*device, memory, 256);
  const auto sums = memory.Take(1000 * 64);
  ASSERT_TRUE(sums.ok());
  for (int i = 0; i < 1000; ++i) {
    const std::vector<int> table(16, i), more(static_cast<std::size_t>(i % 200), i);
    ASSERT_TRUE(staging.Begin(64 + (more.size() * 4 + 63) / 64 * 64).ok());
    const auto at = staging.Put(std::span<const int>(table));
    ASSERT_TRUE(at.ok() && staging.Put(std::span<const int>(more)).ok());
    // As a kernel would read it, in stream order.
    ASSERT_TRUE(device->CopyIn(*sums + 64 * i, *at, 64).ok());
  }
  ASSERT_TRUE(device->Synchronize().ok());
  for (int i = 0; i < 1000; ++i) ASSERT_EQ(reinterpret_cast<const int*>(*sums + 64 * i)[15], i);
}

TEST(LaunchLogTest, NamesTheLastOnesOldestFirst) {
  LaunchLog log;
  EXPECT_EQ(log.Text(), " (0 of 0 launches)");
  for (int i = 0; i < 20; ++i) log.Note("op", i, 1);
  EXPECT_EQ(log.Text(), "op 12x1, op 13x1, op 14x1, op 15x1, op 16x1, op 17x1, op 18x1, op 19x1 (8 of 20 launches)");
}

}  // namespace
}  // namespace kvshare::kernels::cuda

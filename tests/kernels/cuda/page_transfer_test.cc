// Pages to pinned memory and back beside the backend's work: the bytes, and that nothing comes before what it follows.
// The emulated device runs its second stream at once or as late as it may, by its seed.
#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels/device_kv.h"
#include "kernels/kv_rows.h"
#include "tests/kernels/cuda/backends.h"

namespace kvshare::kernels::cuda {
namespace {

constexpr KvLayout kLayout{3, 2, 64, DType::kBf16};
constexpr PageIndex kPages = 6;
constexpr std::size_t kPageBytes = kLayout.page_bytes();

class CudaTransferTest : public CudaTest {
 protected:
  // Runs `test` on fresh pages: once on a GPU, in several orders in the emulator.
  template <typename Test>
  void InEveryOrder(Test test) {
    const bool emulated = GetParam() != Where::kDevice;
    for (std::uint64_t seed = 1; seed <= (emulated ? 20 : 1); ++seed) {
      SCOPED_TRACE("seed " + std::to_string(seed));
      memory_.reset();
      if (emulated) backend_ = std::move(NewBackendOn(NewEmulatedDevice({.seed = seed}), {})).value();
      bytes_.resize(kPageBytes * kPages);
      for (std::byte& b : bytes_) b = static_cast<std::byte>(random_());
      memory_ = Uploaded(std::span<const std::byte>(bytes_));
      test();
    }
  }
  KvPages OnHost() { return {bytes_.data(), kPages, kLayout}; }
  KvPages OnDevice() { return {memory_->data(), kPages, kLayout}; }
  DeviceKv& kv() { return *backend_->device_kv(); }
  std::unique_ptr<Buffer> Pinned(std::size_t pages) {
    auto buffer = kv().AllocatePinned(pages * kPageBytes);
    EXPECT_TRUE(buffer.ok()) << buffer.status().message();
    for (std::size_t i = 0; i < pages * kPageBytes; ++i) (*buffer)->data()[i] = static_cast<std::byte>(random_());
    return std::move(buffer).value();
  }
  std::byte* Page(PageIndex page) { return bytes_.data() + page * kPageBytes; }

  std::mt19937_64 random_{7};
  std::vector<std::byte> bytes_;
  std::unique_ptr<Buffer> memory_;
};

TEST_P(CudaTransferTest, PagesGoToPinnedMemoryAndBack) {
  InEveryOrder([&] {
    const std::vector<PageIndex> from = {3, 0}, to = {1, 4};
    const auto pinned = Pinned(2);
    auto down = kv().DemotePages(OnDevice(), from, pinned->data());
    ASSERT_TRUE(down.ok()) << down.status().message();
    ASSERT_TRUE((*down)->Wait().ok());
    EXPECT_EQ(std::memcmp(pinned->data(), Page(3), kPageBytes), 0);
    EXPECT_EQ(std::memcmp(pinned->data() + kPageBytes, Page(0), kPageBytes), 0);
    auto up = kv().PromotePages(OnDevice(), pinned->data(), to);
    ASSERT_TRUE(up.ok()) << up.status().message();
    for (bool done = false; !done;) {
      const auto asked = (*up)->Done();
      ASSERT_TRUE(asked.ok()) << asked.status().message();
      done = *asked;
    }
    std::copy_n(Page(3), kPageBytes, Page(1));
    std::copy_n(Page(0), kPageBytes, Page(4));
    EXPECT_EQ(Download(memory_->data(), bytes_.size()), bytes_);
  });
}

// A layer's row is copied on by work that is enqueued behind the layer, while the next layers may be on their way.
TEST_P(CudaTransferTest, WorkThatAwaitsALayerFindsIt) {
  InEveryOrder([&] {
    const std::vector<PageIndex> to = {5, 2};
    const std::vector<KvSlot> rows = {{2, 63}, {5, 7}}, there = {{0, 0}, {1, 1}};
    const auto pinned = Pinned(2);
    auto up = kv().PromotePages(OnDevice(), pinned->data(), to);
    ASSERT_TRUE(up.ok()) << up.status().message();
    for (int layer = 0; layer < kLayout.num_layers; ++layer) {
      (*up)->AwaitLayer(layer);
      kv().CopyRows(OnDevice(), rows, there, layer, layer + 1);
    }
    std::copy_n(pinned->data(), kPageBytes, Page(5));
    std::copy_n(pinned->data() + kPageBytes, kPageBytes, Page(2));
    CopyRows(OnHost(), rows, there, 0, kLayout.num_layers);
    EXPECT_EQ(Download(memory_->data(), bytes_.size()), bytes_);
  });
}

TEST_P(CudaTransferTest, CopiesComeAfterWhatWasEnqueuedBefore) {
  InEveryOrder([&] {
    const std::vector<PageIndex> page = {2};
    const std::vector<KvSlot> rows = {{0, 9}}, there = {{2, 40}};
    const auto pinned = Pinned(2), block = Block(kPageBytes);
    const std::vector<std::byte> before(Page(2), Page(2) + kPageBytes);
    kv().GatherPages(OnDevice(), page, block->data());  // as it was before anything came up
    auto up = kv().PromotePages(OnDevice(), pinned->data(), page);
    ASSERT_TRUE(up.ok()) << up.status().message();
    (*up)->AwaitLayer(kLayout.num_layers - 1);
    kv().CopyRows(OnDevice(), rows, there, 0, kLayout.num_layers);
    auto down = kv().DemotePages(OnDevice(), page, pinned->data() + kPageBytes);  // as it is then
    ASSERT_TRUE(down.ok()) << down.status().message();
    ASSERT_TRUE((*down)->Wait().ok());
    EXPECT_EQ(Download(block->data(), kPageBytes), before);
    std::copy_n(pinned->data(), kPageBytes, Page(2));
    CopyRows(OnHost(), rows, there, 0, kLayout.num_layers);
    EXPECT_EQ(std::memcmp(pinned->data() + kPageBytes, Page(2), kPageBytes), 0);
  });
}

TEST_P(CudaTransferTest, ManyTransfersOneBehindTheOther) {
  InEveryOrder([&] {
    const auto pinned = Pinned(1);
    for (PageIndex page = 0; page + 1 < kPages; ++page) {
      const std::vector<PageIndex> from = {page}, to = {page + 1};
      ASSERT_TRUE(kv().DemotePages(OnDevice(), from, pinned->data()).ok());
      auto up = kv().PromotePages(OnDevice(), pinned->data(), to);
      ASSERT_TRUE(up.ok()) << up.status().message();
      (*up)->AwaitLayer(kLayout.num_layers - 1);
    }
    for (PageIndex page = 1; page < kPages; ++page) std::copy_n(Page(0), kPageBytes, Page(page));
    EXPECT_EQ(Download(memory_->data(), bytes_.size()), bytes_);
  });
}

TEST_P(CudaTransferTest, NoPagesAreDoneAtOnce) {
  InEveryOrder([&] {
    auto none = kv().PromotePages(OnDevice(), nullptr, {});
    ASSERT_TRUE(none.ok()) << none.status().message();
    (*none)->AwaitLayer(0);
    EXPECT_TRUE((*none)->Wait().ok());
    EXPECT_EQ(Download(memory_->data(), bytes_.size()), bytes_);
  });
}

TEST(CudaTransferEmulatedTest, AFailureShows) {
  auto backend = std::move(NewBackendOn(NewEmulatedDevice({.fail_at_launch = 0}), {})).value();
  DeviceKv& kv = *backend->device_kv();
  auto memory = backend->Allocate(kPageBytes * kPages);
  auto pinned = kv.AllocatePinned(kPageBytes);
  ASSERT_TRUE(memory.ok() && pinned.ok());
  const KvPages pages{(*memory)->data(), kPages, kLayout};
  const std::vector<PageIndex> page = {1};
  auto down = kv.DemotePages(pages, page, (*pinned)->data());
  ASSERT_TRUE(down.ok());
  kv.GatherPages(pages, page, (*memory)->data());
  EXPECT_EQ(backend->Sync().code(), StatusCode::kInternal);
  EXPECT_EQ((*down)->Wait().code(), StatusCode::kInternal);
  EXPECT_EQ((*down)->Done().status().code(), StatusCode::kInternal);
  EXPECT_EQ(kv.PromotePages(pages, (*pinned)->data(), page).status().code(), StatusCode::kInternal);
}

INSTANTIATE_TEST_SUITE_P(Cuda, CudaTransferTest, ::testing::Values(Where::kEmulatedWalk, Where::kDevice), WhereName);

}  // namespace
}  // namespace kvshare::kernels::cuda

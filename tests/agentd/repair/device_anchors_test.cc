// DeviceAnchors on the emulated GPU: the same numbers as in host memory, kept within bounds and no longer than the
// anchors.
#include "agentd/repair/device_anchors.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/cuda_backend.h"
#include "tests/kernels/cuda/emulated_device.h"
#include "tests/testing/status_matchers.h"

namespace kvshare::agentd {
namespace {

using anchors::Anchor;

constexpr int kLayers = 2;
constexpr std::int64_t kTokens = 100, kWidth = 72;  // a row's last block is not full
constexpr std::size_t kRows = 2 * kLayers * kTokens;
constexpr std::size_t kCopyBytes = kRows * (kWidth + 3 * sizeof(std::uint16_t));

class DeviceAnchorsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    for (int i = 0; i < 4; ++i) Add(i);
    anchors_ = pool_.Snapshot();
  }
  std::unique_ptr<kernels::Backend> Open(std::size_t memory) {
    auto backend = kernels::cuda::NewBackendOn(kernels::cuda::NewEmulatedDevice({}), {.memory_limit_bytes = memory});
    EXPECT_TRUE(backend.ok()) << backend.status().message();
    return std::move(backend).value();
  }
  void Add(int content) {
    anchors::KvBlock base(kLayers, kTokens, kWidth), real = base;
    for (std::size_t i = 0; i < base.values.size(); ++i) {
      base.values[i] = static_cast<float>((i * 37 + static_cast<std::size_t>(content) * 11) % 101) - 50.0f;
      real.values[i] = base.values[i] + static_cast<float>(i % 7);
    }
    pool_.Register("p", "reader", std::to_string(content), anchors::RowsOf(base), anchors::RowsOf(real));
  }
  // Downloads what is at `kv` and compares.
  static void ExpectSame(kernels::Backend& backend, const kernels::CodedKv& kv, const Anchor::Values& values) {
    constexpr std::size_t kBlocks = 3;
    std::vector<std::int8_t> codes(kRows * kWidth);
    std::vector<std::uint16_t> scales(kRows * kBlocks);
    KVS_EXPECT_OK(backend.Download(codes.data(), reinterpret_cast<const std::byte*>(kv.codes), codes.size()));
    KVS_EXPECT_OK(backend.Download(scales.data(), reinterpret_cast<const std::byte*>(kv.scales), 2 * scales.size()));
    for (std::size_t row = 0; row < kRows; ++row) {
      for (std::size_t c = 0; c < kWidth; ++c) {
        const anchors::Q8Block& block = (*values)[row * kBlocks + c / 32];
        ASSERT_EQ(codes[row * kWidth + c], block.codes[c % 32]) << "row " << row << ", value " << c;
        ASSERT_EQ(scales[row * kBlocks + c / 32], block.scale) << "row " << row << ", value " << c;
      }
    }
  }

  anchors::AnchorPool pool_;
  std::vector<Anchor> anchors_;
};

TEST_F(DeviceAnchorsTest, HasTheNumbersAndKeepsThem) {
  const auto backend = Open(std::size_t{1} << 24);
  DeviceAnchors there(backend.get(), std::size_t{1} << 20);
  const auto base = there.Get(anchors_[0], anchors_[0].base);
  const auto offset = there.Get(anchors_[0], anchors_[0].offsets.at("reader"));
  KVS_ASSERT_OK(base);
  KVS_ASSERT_OK(offset);
  ExpectSame(*backend, (*base)->kv, anchors_[0].base);
  ExpectSame(*backend, (*offset)->kv, anchors_[0].offsets.at("reader"));
  EXPECT_EQ(*there.Get(anchors_[0], anchors_[0].base), *base);
  EXPECT_GE(there.bytes(), 2 * kCopyBytes);
  there.Clear();
  EXPECT_EQ(there.bytes(), 0u);
  ExpectSame(*backend, (*base)->kv, anchors_[0].base);  // who holds it still has it
}

TEST_F(DeviceAnchorsTest, WhatWasUsedLongestAgoGivesWay) {
  const auto backend = Open(std::size_t{1} << 24);
  DeviceAnchors there(backend.get(), 3 * kCopyBytes + 1000);
  const auto get = [&](std::size_t i) {
    const auto copy = there.Get(anchors_[i], anchors_[i].base);
    KVS_EXPECT_OK(copy);
    return *copy;
  };
  const auto a = get(0), b = get(1), c = get(2);
  EXPECT_EQ(get(0), a);
  get(3);
  EXPECT_LE(there.bytes(), 3 * kCopyBytes + 1000);
  EXPECT_EQ(get(0), a);
  EXPECT_EQ(get(2), c);
  EXPECT_NE(get(1), b);
}

TEST_F(DeviceAnchorsTest, AnchorsThatAreGoneAreNotKept) {
  const auto backend = Open(std::size_t{1} << 24);
  DeviceAnchors there(backend.get(), std::size_t{1} << 20);
  for (const Anchor& anchor : anchors_) KVS_EXPECT_OK(there.Get(anchor, anchor.base));
  const std::size_t all = there.bytes();
  pool_ = anchors::AnchorPool();
  anchors_.clear();
  Add(9);
  const std::vector<Anchor> others = pool_.Snapshot();
  const auto copy = there.Get(others[0], others[0].base);  // perhaps where one of the old ones lay
  KVS_ASSERT_OK(copy);
  ExpectSame(*backend, (*copy)->kv, others[0].base);
  EXPECT_EQ(there.bytes(), all / 4);
}

TEST_F(DeviceAnchorsTest, StepsFindRoom) {
  // Of what is free a quarter at most is kept, whatever is allowed: two copies fit.
  const auto backend = Open(11 * kCopyBytes);
  DeviceAnchors there(backend.get(), std::size_t{1} << 20);
  for (const Anchor& anchor : anchors_) {
    const auto copy = there.Get(anchor, anchor.base);
    KVS_ASSERT_OK(copy);
    ExpectSame(*backend, (*copy)->kv, anchor.base);
  }
  EXPECT_GT(there.bytes(), kCopyBytes);
  EXPECT_LT(there.bytes(), 3 * kCopyBytes);
  // Others take what is left: then what is kept gives way.
  std::vector<std::unique_ptr<kernels::Buffer>> others;
  const auto fill = [&] {
    while (backend->free_bytes() > kCopyBytes / 2) {
      auto buffer = backend->Allocate(4096);
      KVS_ASSERT_OK(buffer);
      others.push_back(std::move(*buffer));
    }
  };
  fill();
  const auto last = there.Get(anchors_[0], anchors_[0].base);
  KVS_ASSERT_OK(last);
  ExpectSame(*backend, (*last)->kv, anchors_[0].base);
  // And when there is nothing left to give way, somebody has to do without.
  fill();
  EXPECT_EQ(there.Get(anchors_[1], anchors_[1].base).status().code(), StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace kvshare::agentd

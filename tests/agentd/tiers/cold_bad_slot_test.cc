// A disk that cannot write one place: the tier goes on with the others.
#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <thread>

#include "agentd/tiers/cold_tier.h"
#include "tests/agentd/tiers/tier_harness.h"
#include "tests/testing/temp_dir.h"

namespace {

constexpr std::size_t kPageBytes = 4096;
constexpr off_t kBadSlot = 5;
std::atomic<std::size_t> g_slot_bytes = 0;
std::atomic<int> g_failures = 0;

}  // namespace

// In place of the C library's.
extern "C" ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) {
  if (g_slot_bytes != 0 && size == g_slot_bytes && offset == kBadSlot * static_cast<off_t>(g_slot_bytes)) {
    ++g_failures;
    errno = EIO;
    return -1;
  }
  return syscall(SYS_pwrite64, fd, data, size, offset);
}

namespace kvshare::agentd {
namespace {

TEST(ColdBadSlotTest, OnePlaceThatCannotBeWrittenIsPassedOver) {
  const testing::TempDir directory;
  auto tier = ColdTier::Open({.directory = directory.path().string(),
                              .max_bytes = 64 << 20,
                              .space = TestSpace(),
                              .page_bytes = kPageBytes,
                              .scrub_bytes_per_second = 0});
  ASSERT_TRUE(tier.ok()) << tier.status().message();
  g_slot_bytes = SlotBytes(kPageBytes);
  std::uint64_t id = 0;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while ((*tier)->stats().stores < 500 && std::chrono::steady_clock::now() < deadline) {
    const ColdPage page = TestPage(id++ * kPagesPerRun);
    static_cast<void>((*tier)->Store(page, TestKv(page.context, kPageBytes)));
  }
  g_slot_bytes = 0;
  EXPECT_GE((*tier)->stats().stores, 500);
  EXPECT_GE(g_failures, 1);
  EXPECT_LE(g_failures, 3);
  const Status sound = (*tier)->CheckIntegrity();
  EXPECT_TRUE(sound.ok()) << sound.message();
}

}  // namespace
}  // namespace kvshare::agentd

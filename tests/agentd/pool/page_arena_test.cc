// The arena touches memory ahead of its use and leaves what is written there alone.
#include "agentd/pool/page_arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <thread>

#include "gtest/gtest.h"

namespace kvshare::agentd {
namespace {

TEST(PageArenaTest, TouchesAheadOfUseAndChangesNothing) {
  const auto backend = kernels::NewCpuBackend({.compute = kernels::DType::kF32, .threads = 1});
  ASSERT_TRUE(backend.ok()) << backend.status().message();
  const kernels::KvLayout layout = {.num_layers = 4, .num_kv_heads = 2, .head_dim = 64, .dtype = kernels::DType::kF32};
  const auto num_pages = static_cast<kernels::PageIndex>((std::size_t{320} << 20) / layout.page_bytes());
  const auto arena = PageArena::Create(**backend, layout, num_pages);
  ASSERT_TRUE(arena.ok()) << arena.status().message();
  const kernels::KvPages& pages = (*arena)->pages();
  EXPECT_EQ(pages.num_pages, num_pages);
  const auto page = [&](kernels::PageIndex p) { return pages.slab(p, 0, 0, 0); };
  // Written while the arena may be touching the same memory.
  for (kernels::PageIndex p = 0; p < num_pages / 4; ++p)
    std::memset(page(p), 1 + static_cast<int>(p % 100), layout.page_bytes());

  // Where the kernel cannot populate, nothing is ever touched ahead; the wait ends by the clock and only bytes are
  // checked.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  const auto wait_for = [&](std::size_t bytes) {
    while ((*arena)->prefaulted_bytes() < bytes && std::chrono::steady_clock::now() < deadline)
      std::this_thread::yield();
    return (*arena)->prefaulted_bytes();
  };
  const std::size_t at_start = wait_for(kPrefaultAhead);
  EXPECT_LE(at_start, kPrefaultAhead) << "more than the lead was touched";
  (*arena)->ExpectUse(num_pages / 2);
  if (at_start == kPrefaultAhead) {
    EXPECT_GT(wait_for(kPrefaultAhead + 1), kPrefaultAhead);
  }
  for (kernels::PageIndex p = 0; p < num_pages / 4; ++p) {
    ASSERT_EQ(static_cast<int>(page(p)[layout.page_bytes() - 1]), 1 + static_cast<int>(p % 100)) << "page " << p;
  }
  EXPECT_EQ(static_cast<int>(page(num_pages - 1)[0]), 0);
}

class SharedArenaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto backend = kernels::NewCpuBackend({.compute = kernels::DType::kF32, .threads = 1});
    ASSERT_TRUE(backend.ok()) << backend.status().message();
    backend_ = *std::move(backend);
    auto arena = PageArena::Create(*backend_, layout_, kPages);
    ASSERT_TRUE(arena.ok()) << arena.status().message();
    arena_ = *std::move(arena);
    if (arena_->memory_fd() < 0) GTEST_SKIP() << "this kernel has no sealed memfds";
  }

  static constexpr kernels::PageIndex kPages = 16;
  const kernels::KvLayout layout_ = {.num_layers = 2, .num_kv_heads = 1, .head_dim = 32, .dtype = kernels::DType::kF32};
  std::unique_ptr<kernels::Backend> backend_;
  std::unique_ptr<PageArena> arena_;
};

TEST_F(SharedArenaTest, AReaderSeesWhatIsWrittenLater) {
  const std::size_t bytes = kPages * layout_.page_bytes();
  const int fd = ::dup(arena_->memory_fd());
  void* view = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  ASSERT_NE(view, MAP_FAILED);
  std::memset(arena_->pages().slab(3, 0, 0, 0), 0x5A, layout_.page_bytes());
  EXPECT_EQ(std::memcmp(view, arena_->pages().base, bytes), 0);
  EXPECT_EQ(static_cast<const unsigned char*>(view)[3 * layout_.page_bytes()], 0x5A);
  ::munmap(view, bytes);
  ::close(fd);
}

// Threats of a client that has the descriptor: docs/design/handover.md.
TEST_F(SharedArenaTest, NobodyElseCanWriteOrResize) {
  for (const int shared : {arena_->memory_fd(), arena_->generations_fd()}) {
    // As the receiver has it, and opened anew for writing as a process of the same user can.
    const int again = ::open(("/proc/self/fd/" + std::to_string(shared)).c_str(), O_RDWR | O_CLOEXEC);
    for (const int fd : {shared, again}) {
      if (fd < 0) continue;
      EXPECT_EQ(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
      EXPECT_LT(::pwrite(fd, "x", 1, 0), 0);
      EXPECT_NE(::ftruncate(fd, 0), 0);
      EXPECT_NE(::ftruncate(fd, 1 << 30), 0);
      EXPECT_NE(::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), 0);
      EXPECT_NE(::fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), 0) << "the daemon itself could no longer write";
      void* view = ::mmap(nullptr, 4096, PROT_READ, MAP_SHARED, fd, 0);
      ASSERT_NE(view, MAP_FAILED);
      EXPECT_NE(::mprotect(view, 4096, PROT_READ | PROT_WRITE), 0);
      ::munmap(view, 4096);
    }
    if (again >= 0) ::close(again);
  }
}

}  // namespace
}  // namespace kvshare::agentd

// The arena touches memory ahead of its use and leaves what is written there alone.
#include "agentd/pool/page_arena.h"

#include <chrono>
#include <cstring>
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

}  // namespace
}  // namespace kvshare::agentd

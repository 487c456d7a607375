// Many threads on one small tier that evicts all the time. Of most use in sanitized builds.
#include <atomic>
#include <thread>

#include "agentd/tiers/cold_tier.h"
#include "gtest/gtest.h"
#include "tests/agentd/tiers/tier_harness.h"
#include "tests/testing/temp_dir.h"

namespace kvshare::agentd {
namespace {

constexpr std::size_t kPageBytes = 12000;
constexpr std::uint64_t kIds = 600;

void Work(ColdTier& tier, std::uint64_t seed, int steps, std::atomic<int>& wrong, std::atomic<int>& right) {
  std::mt19937_64 rng(seed);
  for (int step = 0; step < steps; ++step) {
    const std::uint64_t id = rng() % kIds;
    const ColdPage page = rng() % 5 == 0 ? TestPartialPage(id, 1 + rng() % 63) : TestPage(id);
    const std::uint64_t kind = rng() % 100;
    if (kind < 50) {
      tier.Store(page, TestKv(page.context, kPageBytes));
    } else if (kind < 85) {
      std::vector<Digest> contexts;
      for (std::uint64_t i = 0; i < 1 + rng() % 4; ++i) contexts.push_back(TestPage((id + i) % kIds).context);
      const auto all = LoadAll(tier, contexts, kPageBytes, rng() % 2 == 0);
      for (std::size_t i = 0; i < all.size(); ++i) {
        if (all[i].status.code() == StatusCode::kNotFound) continue;
        const bool good =
            all[i].status.ok() && all[i].page.context == contexts[i] && all[i].kv == TestKv(contexts[i], kPageBytes);
        ++(good ? right : wrong);
      }
    } else if (kind < 90) {
      const ColdTail tail = tier.FindTail(page.parent, page.tokens);
      if (tail.tokens > 0 && !tier.Find(tail.context).ok()) tier.Touch(tail.context);  // gone meanwhile
    } else if (kind < 94) {
      tier.Remove(page.context);
    } else if (kind < 97) {
      tier.ForEach(20, [&](const ColdEntry& entry) { tier.Touch(entry.page.context); });
      static_cast<void>(tier.stats());
    } else if (kind < 99) {
      static_cast<void>(tier.Flush());
    } else {
      if (tier.Scrub().damaged > 0) ++wrong;
    }
  }
}

TEST(ColdStressTest, ManyThreadsOnASmallTier) {
  const testing::TempDir directory;
  std::atomic<int> wrong{0}, right{0};
  for (std::uint64_t round = 0; round < 2; ++round) {
    auto tier = ColdTier::Open({.directory = directory.path().string(),
                                .max_bytes = 12 << 20,
                                .space = TestSpace(),
                                .page_bytes = kPageBytes,
                                .read_threads = 3,
                                .write_threads = 3,
                                .scrub_bytes_per_second = 1 << 30});
    ASSERT_TRUE(tier.ok()) << tier.status().message();
    std::vector<std::thread> threads;
    for (std::uint64_t t = 0; t < 6; ++t) {
      threads.emplace_back([&, t] { Work(**tier, round * 100 + t, 250, wrong, right); });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_TRUE((*tier)->Flush().ok() || (*tier)->stats().dropped > 0);
    const Status sound = (*tier)->CheckIntegrity();
    EXPECT_TRUE(sound.ok()) << sound.message();
    EXPECT_EQ((*tier)->stats().integrity_errors, 0);
    EXPECT_GT((*tier)->stats().evictions, 0);
    if (round == 1) {
      (*tier)->Clear();
      EXPECT_TRUE((*tier)->CheckIntegrity().ok());
    }
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(right, 100);
}

// Loads that are under way when the tier goes are finished, and so are stores.
TEST(ColdStressTest, TheEndWaitsForWhatWasAccepted) {
  const testing::TempDir directory;
  const ColdTierOptions options = {
      .directory = directory.path().string(), .max_bytes = 64 << 20, .space = TestSpace(), .page_bytes = kPageBytes};
  std::atomic<int> answered{0};
  std::vector<std::byte> memory(20 * kPageBytes);
  {
    auto tier = ColdTier::Open(options);
    ASSERT_TRUE(tier.ok());
    for (std::uint64_t id = 0; id < 100; ++id) {
      ASSERT_TRUE((*tier)->Store(TestPage(id), TestKv(TestPage(id).context, kPageBytes)));
    }
    for (std::uint64_t id = 0; id < 20; ++id) {
      (*tier)->Load({{TestPage(0).context, std::span(memory).subspan(id * kPageBytes, kPageBytes)}},
                    [&](std::vector<ColdLoaded> loaded) { answered += static_cast<int>(loaded.size()); });
    }
  }
  EXPECT_EQ(answered, 20);
  auto tier = ColdTier::Open(options);
  ASSERT_TRUE(tier.ok());
  EXPECT_EQ((*tier)->stats().entries, 100);
}

// What leaves the directory while the index learns what was used must not come back with that.
TEST(ColdStressTest, WhatIsRemovedWhileItsUseIsWrittenDownStaysRemoved) {
  constexpr std::uint64_t kPages = 1500;
  const testing::TempDir directory;
  auto tier = ColdTier::Open({.directory = directory.path().string(),
                              .max_bytes = 64 << 20,
                              .space = TestSpace(),
                              .page_bytes = 4096,
                              .scrub_bytes_per_second = 0,
                              .recency_period = std::chrono::milliseconds(1)});
  ASSERT_TRUE(tier.ok()) << tier.status().message();
  std::vector<ColdPage> pages;
  for (std::uint64_t i = 0; i < kPages; ++i) pages.push_back(TestPage(i * kPagesPerRun));
  std::atomic<bool> stop{false};
  std::thread toucher([&] {
    while (!stop) {
      for (const ColdPage& page : pages) (*tier)->Touch(page.context);
    }
  });
  for (int round = 0; round < 6; ++round) {
    for (const ColdPage& page : pages) {
      while (!(*tier)->Store(page, TestKv(page.context, 4096))) std::this_thread::yield();
    }
    EXPECT_TRUE((*tier)->Flush().ok());
    for (const ColdPage& page : pages) (*tier)->Remove(page.context);
    EXPECT_TRUE((*tier)->Flush().ok());
    const Status sound = (*tier)->CheckIntegrity();
    EXPECT_TRUE(sound.ok()) << sound.message();
  }
  stop = true;
  toucher.join();
}

}  // namespace
}  // namespace kvshare::agentd

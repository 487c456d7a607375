// The tier as the engine sees it: what is stored is found, now and after a restart; quotas hold; spaces stay apart.
#include "agentd/tiers/cold_tier.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <set>

#include "agentd/tiers/record.h"
#include "agentd/tiers/space_directory.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/agentd/tiers/tier_harness.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"

namespace kvshare::agentd {
namespace {

constexpr std::int64_t kMiB = 1 << 20;

class ColdTierTest : public ::testing::Test {
 protected:
  std::unique_ptr<ColdTier> Open(std::int64_t max_bytes = 64 * kMiB, std::size_t page_bytes = 4096,
                                 const Digest& space = TestSpace()) {
    page_bytes_ = page_bytes;
    auto tier = ColdTier::Open({.directory = directory_.path().string(),
                                .max_bytes = max_bytes,
                                .space = space,
                                .page_bytes = page_bytes,
                                .scrub_bytes_per_second = 0});
    EXPECT_TRUE(tier.ok()) << tier.status().message();
    return tier.ok() ? std::move(*tier) : nullptr;
  }
  void StoreIds(ColdTier& tier, std::uint64_t begin, std::uint64_t end) {
    for (std::uint64_t id = begin; id < end; ++id) ASSERT_TRUE(StorePage(tier, TestPage(id), page_bytes_)) << id;
    ASSERT_TRUE(tier.Flush().ok());
  }

  testing::TempDir directory_;
  std::size_t page_bytes_ = 0;
};

TEST_F(ColdTierTest, RoundTripAndRestartForEverySizeAndAlignment) {
  for (const std::size_t page_bytes : {1, 100, 4095, 4096, 4097, 70000}) {
    {
      const auto tier = Open(64 * kMiB, page_bytes);
      StoreIds(*tier, 0, 20);
      for (std::uint64_t id = 0; id < 20; ++id) EXPECT_EQ(Judge(*tier, TestPage(id), page_bytes), "") << id;
      EXPECT_TRUE(tier->CheckIntegrity().ok()) << tier->CheckIntegrity().message();
    }
    const auto tier = Open(64 * kMiB, page_bytes);
    EXPECT_EQ(tier->stats().entries, 20);
    for (std::uint64_t id = 0; id < 20; ++id) {
      const ColdPage page = TestPage(id);
      EXPECT_TRUE(tier->Contains(page.context));
      for (const bool aligned : {true, false}) {
        const Loaded loaded = LoadOne(*tier, page.context, page_bytes, aligned);
        ASSERT_TRUE(loaded.status.ok()) << loaded.status.message();
        EXPECT_TRUE(SamePage(loaded.page, page));
        EXPECT_EQ(loaded.kv, TestKv(page.context, page_bytes));
      }
    }
    const ColdTierStats stats = tier->stats();
    EXPECT_EQ(stats.hits, 40);
    EXPECT_EQ(stats.read_bytes, static_cast<std::int64_t>(40 * page_bytes));
    EXPECT_GT(stats.read_bytes_per_second, 0);
    EXPECT_EQ(stats.integrity_errors, 0);
    EXPECT_EQ(stats.index_rebuilds, 0);
  }
}

TEST_F(ColdTierTest, ManyPagesInOneLoadSomeOfThemNotStored) {
  const auto tier = Open();
  StoreIds(*tier, 0, 16);
  std::vector<Digest> contexts;
  for (std::uint64_t id = 0; id < 24; ++id) contexts.push_back(TestPage(id).context);
  const auto all = LoadAll(*tier, contexts, page_bytes_);
  for (std::uint64_t id = 0; id < 24; ++id) {
    EXPECT_EQ(all[id].status.code(), id < 16 ? StatusCode::kOk : StatusCode::kNotFound);
    if (id < 16) {
      EXPECT_EQ(all[id].kv, TestKv(contexts[id], page_bytes_));
    }
  }
  EXPECT_EQ(tier->stats().hits, 16);
  EXPECT_EQ(tier->stats().misses, 8);
  EXPECT_EQ(LoadAll(*tier, {}, page_bytes_).size(), 0u);
  EXPECT_EQ(LoadOne(*tier, TestPage(20).context, page_bytes_).status.code(), StatusCode::kNotFound);
}

// Whoever is told of a part finds it whole, in every page, whatever happens behind it.
TEST_F(ColdTierTest, PartsComeInOrderAndVerified) {
  for (const std::size_t page_bytes : {std::size_t{1} << 20, (std::size_t{1} << 20) + 100, std::size_t{5000}}) {
    SCOPED_TRACE(page_bytes);
    const testing::TempDir directory;
    const auto open = [&] {
      auto tier = ColdTier::Open({.directory = directory.path().string(),
                                  .max_bytes = 128 << 20,
                                  .space = TestSpace(),
                                  .page_bytes = page_bytes});
      EXPECT_TRUE(tier.ok()) << tier.status().message();
      return std::move(*tier);
    };
    {
      const auto tier = open();
      for (std::uint64_t id = 0; id < 6; ++id) ASSERT_TRUE(StorePage(*tier, TestPage(id), page_bytes));
      ASSERT_TRUE(tier->Flush().ok());
    }
    const PayloadParts parts = PartsOf(page_bytes);
    EXPECT_EQ(parts.count, page_bytes > 5000 ? 4u : 1u);
    // Round `spoiled`: a byte of that part of page 3 is flipped first; in the last round none.
    for (std::size_t spoiled = 0; spoiled <= parts.count; ++spoiled) {
      SCOPED_TRACE(spoiled);
      const std::string slab = FilesEndingIn(directory.path(), ".slab").at(0);
      const std::string bytes = ReadFile(slab);
      const std::size_t slot = SlotOf(TestPage(3).context, bytes, page_bytes);
      const std::size_t place = slot + kRecordHeaderBytes + spoiled * parts.bytes + 7;
      if (spoiled < parts.count) {
        const char flipped = static_cast<char>(bytes[place] ^ 1);
        Overwrite(slab, place, {&flipped, 1});
      }
      const auto tier = open();
      EXPECT_EQ(tier->PartsFor(page_bytes), static_cast<int>(parts.count));
      std::vector<std::unique_ptr<AlignedBuffer>> memory;
      std::vector<ColdLoad> loads;
      std::vector<std::vector<std::byte>> wanted;
      for (std::uint64_t id = 0; id < 6; ++id) {
        memory.push_back(std::make_unique<AlignedBuffer>(PayloadBytes(page_bytes)));
        loads.push_back({TestPage(id).context, memory.back()->bytes().first(page_bytes)});
        wanted.push_back(TestKv(TestPage(id).context, page_bytes));
      }
      std::atomic<int> most = 0, wrong = 0;
      std::promise<std::vector<ColdLoaded>> promise;
      tier->Load(
          loads, [&](std::vector<ColdLoaded> loaded) { promise.set_value(std::move(loaded)); },
          [&](int ready) {
            for (int seen = most; seen < ready && !most.compare_exchange_weak(seen, ready);) {
            }
            const std::size_t end = std::min(page_bytes, static_cast<std::size_t>(ready) * parts.bytes);
            for (std::size_t i = 0; i < loads.size(); ++i) {
              wrong += std::memcmp(loads[i].destination.data(), wanted[i].data(), end) != 0;
            }
          });
      const std::vector<ColdLoaded> loaded = promise.get_future().get();
      EXPECT_EQ(wrong, 0);
      EXPECT_LE(most, static_cast<int>(spoiled));  // in the last round, all
      if (spoiled == parts.count) {
        EXPECT_EQ(most, static_cast<int>(parts.count));
      }
      for (std::size_t i = 0; i < loaded.size(); ++i) {
        const bool lost = i == 3 && spoiled < parts.count;
        EXPECT_EQ(loaded[i].status.code(), lost ? StatusCode::kDataLoss : StatusCode::kOk);
      }
      if (spoiled < parts.count) {
        ASSERT_TRUE(StorePage(*tier, TestPage(3), page_bytes));
      }
      ASSERT_TRUE(tier->Flush().ok());
      EXPECT_TRUE(tier->CheckIntegrity().ok()) << tier->CheckIntegrity().message();
    }
  }
}

TEST_F(ColdTierTest, TailsAndTheLongerPageThatServesBoth) {
  const auto tier = Open();
  ASSERT_TRUE(StorePage(*tier, TestPartialPage(0, 10), page_bytes_));
  ASSERT_TRUE(tier->Flush().ok());
  const ColdPage full = TestPage(0);
  EXPECT_EQ(tier->FindTail(full.parent, full.tokens).tokens, 10);
  EXPECT_EQ(tier->FindTail(full.parent, std::span(full.tokens).first(4)).tokens, 4);
  EXPECT_EQ(tier->FindTail(full.context, full.tokens).tokens, 0);
  ASSERT_TRUE(StorePage(*tier, TestPartialPage(0, 40), page_bytes_));
  ASSERT_TRUE(tier->Flush().ok());
  EXPECT_EQ(tier->stats().entries, 1);
  EXPECT_FALSE(tier->Contains(TestPartialPage(0, 10).context));
  const std::int64_t stores = tier->stats().stores;
  ASSERT_TRUE(StorePage(*tier, TestPartialPage(0, 20), page_bytes_));
  ASSERT_TRUE(tier->Flush().ok());
  EXPECT_EQ(tier->stats().stores, stores) << "a page that another begins with was stored again";
  std::vector<TokenId> other = full.tokens;
  other[25] ^= 1;
  const ColdTail tail = tier->FindTail(full.parent, other);
  EXPECT_EQ(tail.tokens, 25);
  EXPECT_EQ(tail.context, TestPartialPage(0, 40).context);
  EXPECT_TRUE(tier->CheckIntegrity().ok()) << tier->CheckIntegrity().message();
}

TEST_F(ColdTierTest, DuplicatesCostNothing) {
  const auto tier = Open();
  StoreIds(*tier, 0, 8);
  StoreIds(*tier, 0, 8);
  EXPECT_EQ(tier->stats().stores, 8);
  EXPECT_EQ(tier->stats().entries, 8);
}

TEST_F(ColdTierTest, TheQuotaHoldsAndLeavesGoBeforeTheirParents) {
  constexpr std::int64_t kQuota = 8 * kMiB;
  const auto tier = Open(kQuota, 4096);
  std::uint64_t id = 0;
  for (int round = 0; round < 20; ++round) {
    StoreIds(*tier, id, id + 80);
    id += 80;
    ASSERT_TRUE(tier->CheckIntegrity().ok()) << tier->CheckIntegrity().message();
    ASSERT_LE(DirectoryBytes(directory_.path().string()), kQuota);
    ASSERT_LE(tier->stats().disk_bytes, kQuota);
  }
  const ColdTierStats stats = tier->stats();
  EXPECT_GT(stats.evictions, 1000);
  EXPECT_GT(stats.entries, 150);
  EXPECT_EQ(stats.stores, 1600);
  for (std::uint64_t page = 0; page < id; ++page) {
    if (tier->Contains(TestPage(page).context)) {
      EXPECT_EQ(Judge(*tier, TestPage(page), page_bytes_), "");
      if (page % kPagesPerRun > 0) {
        EXPECT_TRUE(tier->Contains(TestPage(page - 1).context)) << page;
      }
    }
  }
}

TEST_F(ColdTierTest, WhatIsUsedSurvivesAFloodThatNobodyUses) {
  const auto tier = Open(8 * kMiB, 4096);
  StoreIds(*tier, 0, 40);
  for (std::uint64_t id = 0; id < 40; ++id) tier->Touch(TestPage(id).context);
  StoreIds(*tier, 1000, 2000);
  for (std::uint64_t id = 0; id < 40; ++id) EXPECT_EQ(Judge(*tier, TestPage(id), page_bytes_), "") << id;
}

TEST_F(ColdTierTest, RecencySurvivesARestart) {
  {
    const auto tier = Open();
    StoreIds(*tier, 0, 40);
    for (std::uint64_t id = 0; id < 8; ++id) tier->Touch(TestPage(id).context);
  }
  const auto tier = Open();
  std::set<Digest> recent;
  tier->ForEach(8, [&](const ColdEntry& entry) { recent.insert(entry.page.context); });
  for (std::uint64_t id = 0; id < 8; ++id) EXPECT_EQ(recent.count(TestPage(id).context), 1u) << id;
}

// Also of what was stored last and never used, after much use of what was there before.
TEST_F(ColdTierTest, TheOrderIsTheSameAfterARestart) {
  const auto order = [](const ColdTier& tier) {
    std::vector<Digest> contexts;
    tier.ForEach(100, [&](const ColdEntry& entry) { contexts.push_back(entry.page.context); });
    return contexts;
  };
  std::vector<Digest> before;
  {
    const auto tier = Open();
    StoreIds(*tier, 0, 4);
    for (int i = 0; i < 10; ++i) {
      for (std::uint64_t id = 0; id < 4; ++id) tier->Touch(TestPage(id).context);
    }
    StoreIds(*tier, 8, 12);
    before = order(*tier);
  }
  EXPECT_EQ(before.front(), TestPage(11).context);
  EXPECT_EQ(order(*Open()), before);
}

TEST_F(ColdTierTest, ASmallerQuotaAfterARestart) {
  {
    const auto tier = Open(32 * kMiB);
    StoreIds(*tier, 0, 2000);
    EXPECT_EQ(tier->stats().entries, 2000);
  }
  const auto tier = Open(8 * kMiB);
  EXPECT_LE(DirectoryBytes(directory_.path().string()), 8 * kMiB);
  EXPECT_GT(tier->stats().entries, 100);
  EXPECT_GT(tier->stats().evictions, 1000);
  EXPECT_EQ(tier->stats().integrity_errors, 0);
  EXPECT_TRUE(tier->CheckIntegrity().ok()) << tier->CheckIntegrity().message();
  tier->ForEach(10000, [&](const ColdEntry& entry) {
    const Loaded loaded = LoadOne(*tier, entry.page.context, page_bytes_);
    EXPECT_TRUE(loaded.status.ok());
    EXPECT_EQ(loaded.kv, TestKv(entry.page.context, page_bytes_));
  });
}

TEST_F(ColdTierTest, RemoveAndClear) {
  {
    const auto tier = Open();
    StoreIds(*tier, 0, 16);
    tier->Remove(TestPage(7).context);
    tier->Remove(TestPage(7).context);
    EXPECT_FALSE(tier->Contains(TestPage(7).context));
    EXPECT_EQ(Judge(*tier, TestPage(7), page_bytes_), "missing");
    EXPECT_TRUE(tier->CheckIntegrity().ok()) << tier->CheckIntegrity().message();
    StoreIds(*tier, 7, 8);
    EXPECT_EQ(Judge(*tier, TestPage(7), page_bytes_), "");
    tier->Remove(TestPage(9).context);
  }
  {
    const auto tier = Open();
    EXPECT_EQ(tier->stats().entries, 15);
    tier->Clear();
    EXPECT_EQ(tier->stats().entries, 0);
    EXPECT_EQ(FilesEndingIn(directory_.path(), ".slab").size(), 0u);
    EXPECT_TRUE(tier->CheckIntegrity().ok()) << tier->CheckIntegrity().message();
    StoreIds(*tier, 3, 5);
    EXPECT_EQ(Judge(*tier, TestPage(4), page_bytes_), "");
  }
  EXPECT_EQ(Open()->stats().entries, 2);
}

// A removed page does not come back when the index is lost and made anew from the slabs.
TEST_F(ColdTierTest, RemovedMeansRemoved) {
  {
    const auto tier = Open();
    StoreIds(*tier, 0, 16);
    tier->Remove(TestPage(15).context);
  }
  for (const std::string& file : FilesEndingIn(directory_.path(), "CURRENT")) std::filesystem::remove(file);
  const auto tier = Open();
  EXPECT_EQ(tier->stats().index_rebuilds, 1);
  EXPECT_EQ(tier->stats().entries, 15);
  EXPECT_FALSE(tier->Contains(TestPage(15).context));
}

TEST_F(ColdTierTest, EntriesTellWhatTheyAre) {
  const auto tier = Open();
  StoreIds(*tier, 0, 4);
  EXPECT_EQ(Judge(*tier, TestPage(2), page_bytes_), "");
  const auto entry = tier->Find(TestPage(2).context);
  ASSERT_TRUE(entry.ok());
  EXPECT_TRUE(SamePage(entry->page, TestPage(2)));
  EXPECT_EQ(entry->hits, 1);
  EXPECT_EQ(entry->bytes, 8192);
  EXPECT_EQ(tier->Find(TestPage(30).context).status().code(), StatusCode::kNotFound);
  int seen = 0;
  tier->ForEach(3, [&](const ColdEntry& item) {
    if (seen++ == 0) {
      EXPECT_EQ(item.page.context, TestPage(2).context);
    }
  });
  EXPECT_EQ(seen, 3);
}

TEST_F(ColdTierTest, ASecondOpenerIsRefusedByNameAndTheFirstGoesOn) {
  const auto tier = Open();
  const auto second = ColdTier::Open(
      {.directory = directory_.path().string(), .max_bytes = 64 * kMiB, .space = TestSpace(), .page_bytes = 4096});
  EXPECT_EQ(second.status().code(), StatusCode::kFailedPrecondition);
  EXPECT_THAT(second.status().message(), ::testing::HasSubstr(directory_.path().string()));
  StoreIds(*tier, 0, 4);
  EXPECT_EQ(Judge(*tier, TestPage(3), page_bytes_), "");
}

TEST_F(ColdTierTest, BadOptions) {
  const auto code = [&](ColdTierOptions options) { return ColdTier::Open(options).status().code(); };
  const std::string directory = directory_.path().string();
  EXPECT_EQ(code({.directory = directory, .max_bytes = 64 * kMiB}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.directory = directory, .max_bytes = kMiB, .page_bytes = 4096}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.directory = directory, .max_bytes = -1, .page_bytes = 4096}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.directory = directory_.File("LOCK") + "/x", .max_bytes = 64 * kMiB, .page_bytes = 4096}),
            StatusCode::kOk);
  Overwrite((std::ofstream(directory_.File("file")), directory_.File("file")), 0, "x");
  EXPECT_EQ(code({.directory = directory_.File("file"), .max_bytes = 64 * kMiB, .page_bytes = 4096}),
            StatusCode::kInvalidArgument);
}

TEST_F(ColdTierTest, OtherSpacesAreApartExplainedAndFirstToGo) {
  const Digest other = TestSpace("another model");
  {
    const auto tier = Open(16 * kMiB);
    StoreIds(*tier, 0, 200);
  }
  const auto find_elsewhere = [](const ColdTier& tier, std::uint64_t id) {
    // Read in the background: asked until it is known, or a minute has passed.
    const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(1);
    while (std::chrono::steady_clock::now() < end) {
      if (tier.StoredUnderAnotherSpace(TestPage(id).content_chain)) return true;
    }
    return false;
  };
  {
    const auto tier = Open(16 * kMiB, 4096, other);
    EXPECT_EQ(tier->stats().entries, 0);
    EXPECT_FALSE(tier->Contains(TestPage(3).context));
    EXPECT_TRUE(find_elsewhere(*tier, 3));
    EXPECT_FALSE(tier->StoredUnderAnotherSpace(TestPage(3000).content_chain));
    ASSERT_TRUE(StorePage(*tier, TestPage(5, other), page_bytes_));
    ASSERT_TRUE(tier->Flush().ok());
    EXPECT_GT(tier->stats().disk_bytes, 200 * 8192);
  }
  {
    const auto tier = Open(16 * kMiB);
    EXPECT_EQ(tier->stats().entries, 200) << "the first space is still there";
    EXPECT_TRUE(find_elsewhere(*tier, 5));
  }
  const auto tier = Open(16 * kMiB, 4096, other);
  for (std::uint64_t id = 100; id < 1300; ++id) ASSERT_TRUE(StorePage(*tier, TestPage(id, other), page_bytes_));
  ASSERT_TRUE(tier->Flush().ok());
  EXPECT_LE(DirectoryBytes(directory_.path().string()), 16 * kMiB);
  EXPECT_FALSE(std::filesystem::exists(directory_.path() / SpaceDirectoryName(TestSpace(), 4096)));
  EXPECT_FALSE(tier->StoredUnderAnotherSpace(TestPage(3).content_chain));
  EXPECT_TRUE(tier->CheckIntegrity().ok()) << tier->CheckIntegrity().message();
}

TEST_F(ColdTierTest, TheSpaceUsedLeastRecentlyGoesFirst) {
  std::vector<std::string> paths;
  for (const char* name : {"first", "second", "third"}) {
    const auto tier = Open(16 * kMiB, 4096, TestSpace(name));
    StoreIds(*tier, 0, 8);
    paths.push_back((directory_.path() / SpaceDirectoryName(TestSpace(name), 4096)).string());
  }
  const timespec hour_ago[2] = {{.tv_sec = 1, .tv_nsec = 0}, {.tv_sec = 1, .tv_nsec = 0}};
  ASSERT_EQ(utimensat(AT_FDCWD, (paths[1] + "/USED").c_str(), hour_ago, 0), 0);
  std::filesystem::create_directory(directory_.path() / "space-of-somebody-else");
  ForeignSpaces foreign(directory_.path().string(), SpaceDirectoryName(TestSpace("third"), 4096));
  foreign.WaitUntilRead();
  EXPECT_TRUE(foreign.DeleteOldest());
  EXPECT_FALSE(std::filesystem::exists(paths[1]));
  EXPECT_TRUE(std::filesystem::exists(paths[0]));
  EXPECT_TRUE(foreign.DeleteOldest());
  EXPECT_FALSE(foreign.DeleteOldest());
  EXPECT_EQ(foreign.bytes(), 0);
  EXPECT_TRUE(std::filesystem::exists(paths[2]));
  EXPECT_TRUE(std::filesystem::exists(directory_.path() / "space-of-somebody-else"));
}

TEST_F(ColdTierTest, TheEstimateFollowsWhatLoadsTook) {
  const auto tier = Open(64 * kMiB, 1 << 20);
  EXPECT_GT(tier->EstimateLoadSeconds(4), 0);
  StoreIds(*tier, 0, 8);
  for (std::uint64_t id = 0; id < 8; ++id) EXPECT_EQ(Judge(*tier, TestPage(id), page_bytes_), "");
  const double rate = tier->stats().read_bytes_per_second;
  ASSERT_GT(rate, 0);
  EXPECT_NEAR(tier->EstimateLoadSeconds(4), 4 * (kMiB + 4096) / rate, 1e-6);
}

}  // namespace
}  // namespace kvshare::agentd

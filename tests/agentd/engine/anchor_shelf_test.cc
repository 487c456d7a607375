// Sessions' anchors in memory and on disk: bounded, each session's own, never lost to room or to a load on its way.
#include "agentd/engine/anchor_shelf.h"

#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "gtest/gtest.h"
#include "tests/anchors/anchor_samples.h"
#include "tests/testing/temp_dir.h"

namespace kvshare::agentd {
namespace {

using anchors::Describe;
using anchors::TeachSamples;

class AnchorShelfTest : public ::testing::Test {
 protected:
  std::unique_ptr<AnchorShelf> Open() {
    const anchors::AnchorOwner owner = anchors::SampleOwner();
    auto store = std::make_unique<AnchorStore>(AnchorStoreOptions{.directory = dir_.File("anchors"),
                                                                  .max_bytes = 8 << 20,
                                                                  .space = owner.space,
                                                                  .layers = owner.layers,
                                                                  .width = owner.width});
    return std::make_unique<AnchorShelf>(std::move(store), 8 << 20, 512 << 20, [this](std::function<void()> task) {
      const std::lock_guard lock(mutex_);
      posted_.push_back(std::move(task));
    });
  }
  // What the engine's thread would do once the store has nothing left to do.
  void Settle(AnchorShelf& shelf) {
    shelf.Flush();
    std::vector<std::function<void()>> tasks;
    {
      const std::lock_guard lock(mutex_);
      tasks.swap(posted_);
    }
    for (const auto& task : tasks) task();
    shelf.Flush();
  }

  const testing::TempDir dir_;
  std::mutex mutex_;
  std::vector<std::function<void()>> posted_;
};

TEST_F(AnchorShelfTest, ASessionFindsItsPoolAgain) {
  std::vector<std::string> taught;
  {
    const auto shelf = Open();
    const auto pool = shelf->Of("s");
    Settle(*shelf);
    TeachSamples(pool.get(), 0, 7);
    shelf->Taught("s");
    EXPECT_EQ(shelf->Of("s"), pool);
    EXPECT_EQ(shelf->stats().bytes, static_cast<std::int64_t>(pool->bytes()));
    shelf->Flush();
    pool->Shareable("slot0/planner", anchors::SampleBlock(0, 6));  // used once more, by nobody who teaches
    taught = Describe(pool->Snapshot());
    shelf->Save();
    shelf->Flush();
  }
  const auto shelf = Open();
  const auto pool = shelf->Of("s");
  const auto stranger = shelf->Of("t");
  Settle(*shelf);
  EXPECT_EQ(Describe(pool->Snapshot()), taught);
  EXPECT_EQ(stranger->anchors(), 0u);
  EXPECT_EQ(shelf->stats().loaded, static_cast<std::int64_t>(taught.size()));
}

TEST_F(AnchorShelfTest, WhatIsTaughtDuringALoadJoinsWhatIsLoaded) {
  {
    const auto shelf = Open();
    TeachSamples(shelf->Of("s").get(), 0, 5);
    Settle(*shelf);
  }
  std::size_t all = 0;
  {
    const auto shelf = Open();
    const auto pool = shelf->Of("s");
    const anchors::KvBlock base = anchors::SampleBlock(1, 6), real = anchors::SampleBlock(2, 6);
    pool->Register("slot0/planner", "critic", "new", anchors::RowsOf(base), anchors::RowsOf(real));
    shelf->Taught("s");  // not saved yet: it would replace what is being read
    Settle(*shelf);
    all = pool->anchors();
    EXPECT_GT(all, 1u);
  }
  const auto shelf = Open();
  const auto pool = shelf->Of("s");
  Settle(*shelf);
  ASSERT_EQ(pool->anchors(), all);
  EXPECT_EQ(pool->Snapshot().back().content, "new");
}

TEST_F(AnchorShelfTest, PoolsThatWereDroppedForRoomComeBack) {
  const auto shelf = Open();
  const auto first = shelf->Of("s0");
  Settle(*shelf);
  TeachSamples(first.get(), 0, 5);
  shelf->Taught("s0");
  shelf->Flush();
  first->Shareable("slot0/planner", anchors::SampleBlock(0, 6));  // used since it was saved
  for (std::size_t i = 1; i < AnchorShelf::kMaxSessions + 3; ++i) {
    TeachSamples(shelf->Of("s" + std::to_string(i)).get(), 4, 5);
    Settle(*shelf);
    shelf->Taught("s" + std::to_string(i));
  }
  const auto one = static_cast<std::int64_t>(shelf->Of("s9")->bytes());
  EXPECT_EQ(shelf->stats().bytes, static_cast<std::int64_t>(AnchorShelf::kMaxSessions) * one);
  const auto again = shelf->Of("s0");
  EXPECT_NE(again, first);
  Settle(*shelf);
  EXPECT_EQ(Describe(again->Snapshot()), Describe(first->Snapshot()));
}

TEST_F(AnchorShelfTest, ForgettingIsForGoodAndClearingIsNot) {
  const auto shelf = Open();
  TeachSamples(shelf->Of("s").get(), 0, 4);
  Settle(*shelf);
  shelf->Clear();
  EXPECT_EQ(shelf->stats().bytes, 0);
  const auto back = shelf->Of("s");
  Settle(*shelf);
  EXPECT_GT(back->anchors(), 0u);
  // A load that is on its way brings nothing back either.
  shelf->Clear();
  const auto gone = shelf->Of("s");
  shelf->Clear();
  shelf->ForgetSaved();
  const auto fresh = shelf->Of("s");
  Settle(*shelf);
  EXPECT_EQ(gone->anchors() + fresh->anchors(), 0u);
  EXPECT_EQ(shelf->stats().disk_bytes, 0);
}

TEST_F(AnchorShelfTest, WithoutADiskItIsAShelfAllTheSame) {
  AnchorShelf shelf(nullptr, 0, 512 << 20, nullptr);
  TeachSamples(shelf.Of("s").get(), 0, 4);
  shelf.Taught("s");
  shelf.Save();
  shelf.Flush();
  EXPECT_GT(shelf.Of("s")->anchors(), 0u);
  EXPECT_EQ(shelf.Of("t")->anchors(), 0u);
  shelf.ForgetSaved();
  shelf.Clear();
  EXPECT_EQ(shelf.Of("s")->anchors(), 0u);
}

TEST_F(AnchorShelfTest, TakesAsMuchMemoryAsItIsGiven) {
  AnchorShelf all(nullptr, 0, 512 << 20, nullptr);
  TeachSamples(all.Of("s").get(), 0, 6);
  all.Taught("s");
  const std::int64_t wanted = all.stats().bytes;
  AnchorShelf half(nullptr, 0, wanted / 2, nullptr);
  for (const std::string session : {"s", "t"}) {
    const auto pool = half.Of(session);
    TeachSamples(pool.get(), 0, 6);
    half.Taught(session);
    EXPECT_GT(pool->anchors(), 0u);
    EXPECT_LE(half.stats().bytes, wanted / 2);
  }
}

}  // namespace
}  // namespace kvshare::agentd

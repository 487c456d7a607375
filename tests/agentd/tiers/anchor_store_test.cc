// Anchors on disk: found after a restart by their own session alone, whatever happened to the files meanwhile.
#include "agentd/tiers/anchor_store.h"

#include <sys/wait.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <memory>
#include <numeric>

#include "agentd/tiers/space_directory.h"
#include "gtest/gtest.h"
#include "tests/anchors/anchor_samples.h"
#include "tests/testing/temp_dir.h"

namespace kvshare::agentd {
namespace {

namespace fs = std::filesystem;
using anchors::Anchor;
using anchors::AnchorFault;
using anchors::AnchorPool;
using anchors::Describe;
using anchors::TeachSamples;

std::vector<Anchor> SamplePool(int steps, std::int64_t tokens = 6) {
  AnchorPool pool;
  TeachSamples(&pool, 0, steps, tokens);
  return pool.Snapshot();
}

std::int64_t Missed(const AnchorStoreStats& stats) {
  return std::accumulate(stats.misses.begin(), stats.misses.end(), std::int64_t{0});
}

class AnchorStoreTest : public ::testing::Test {
 protected:
  std::unique_ptr<AnchorStore> Open(const std::string& space = "space", std::int64_t max_bytes = 8 << 20) {
    const anchors::AnchorOwner owner = anchors::SampleOwner("", space);
    return std::make_unique<AnchorStore>(AnchorStoreOptions{.directory = dir_.File("anchors"),
                                                            .max_bytes = max_bytes,
                                                            .space = owner.space,
                                                            .layers = owner.layers,
                                                            .width = owner.width});
  }
  static std::vector<Anchor> Load(AnchorStore& store, const std::string& session) {
    std::promise<std::vector<Anchor>> loaded;
    store.Load(session, [&loaded](std::vector<Anchor> pool) { loaded.set_value(std::move(pool)); });
    return loaded.get_future().get();
  }
  // Everything there is, the list last.
  std::vector<fs::path> Files() const {
    std::vector<fs::path> files;
    fs::path list;
    for (const auto& entry : fs::recursive_directory_iterator(dir_.path())) {
      if (!entry.is_regular_file()) continue;
      if (entry.path().filename() == "LIST") list = entry.path();
      if (entry.path().filename() != "LIST") files.push_back(entry.path());
    }
    if (!list.empty()) files.push_back(list);
    return files;
  }
  static std::string Read(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  static void Write(const fs::path& path, const std::string& bytes) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
  }

  const testing::TempDir dir_;
};

TEST_F(AnchorStoreTest, ARestartFindsWhatTheSessionSaved) {
  const std::vector<Anchor> pool = SamplePool(9);
  {
    const auto store = Open();
    EXPECT_TRUE(Load(*store, "s").empty());
    store->Save("s", pool);
    store->Flush();
    EXPECT_EQ(store->stats().saved, static_cast<std::int64_t>(pool.size()));
    EXPECT_EQ(Describe(Load(*store, "s")), Describe(pool));
  }
  const auto store = Open();
  EXPECT_EQ(Describe(Load(*store, "s")), Describe(pool));
  for (const std::string stranger : {"t", "", "S", "s "}) EXPECT_TRUE(Load(*store, stranger).empty()) << stranger;
  EXPECT_EQ(Missed(store->stats()), 0) << "nothing was there to be refused";
  EXPECT_EQ(store->stats().loaded, static_cast<std::int64_t>(pool.size()));
}

TEST_F(AnchorStoreTest, OnlyWhatChangedIsWritten) {
  const auto store = Open();
  AnchorPool pool;
  TeachSamples(&pool, 0, 8);
  store->Save("s", pool.Snapshot());
  store->Flush();
  const std::int64_t before = store->stats().saved;
  TeachSamples(&pool, 8, 9);  // one more reading: of one anchor
  store->Save("s", pool.Snapshot());
  store->Flush();
  EXPECT_EQ(store->stats().saved, before + 1);
  EXPECT_EQ(Describe(Load(*store, "s")), Describe(pool.Snapshot()));
  EXPECT_EQ(Files().size(), pool.anchors() + 1) << "what nothing names is gone";
  pool.Shareable("slot0/planner", anchors::SampleBlock(0, 6));  // used, and nothing learnt
  store->Save("s", pool.Snapshot());
  store->Flush();
  EXPECT_EQ(store->stats().saved, before + 1);
  EXPECT_EQ(Describe(Load(*store, "s")), Describe(pool.Snapshot()));
}

TEST_F(AnchorStoreTest, OtherWeightsFindNothingAndTheReasonIsCounted) {
  Open()->Save("s", SamplePool(4));
  const auto other = Open("other weights");
  EXPECT_TRUE(Load(*other, "s").empty());
  EXPECT_EQ(other->stats().misses[static_cast<std::size_t>(AnchorFault::kOtherSpace)], 1);
  // Side by side, and each its own.
  other->Save("s", SamplePool(2));
  other->Flush();
  EXPECT_EQ(Describe(Load(*Open(), "s")), Describe(SamplePool(4)));
  EXPECT_EQ(Describe(Load(*other, "s")), Describe(SamplePool(2)));
}

// Files that were copied to where another session or model would look.
TEST_F(AnchorStoreTest, FilesInTheWrongPlaceAreRefused) {
  Open()->Save("s", SamplePool(4));
  const fs::path from = Files().back().parent_path();
  const fs::path scope = from.parent_path().parent_path() / anchors::ScopeOf("t").Hex();
  fs::create_directories(scope);
  fs::copy(from, scope / from.filename());
  const std::string space = anchors::SampleOwner("", "other weights").space.Hex().substr(0, 32);
  fs::copy(from, from.parent_path() / space);
  const auto store = Open();
  EXPECT_TRUE(Load(*store, "t").empty());
  EXPECT_EQ(store->stats().misses[static_cast<std::size_t>(AnchorFault::kOtherScope)], 1);
  const auto other = Open("other weights");
  EXPECT_TRUE(Load(*other, "s").empty());
  EXPECT_EQ(other->stats().misses[static_cast<std::size_t>(AnchorFault::kOtherSpace)], 1);
}

TEST_F(AnchorStoreTest, EveryFlippedByteCostsItsRecordAndNoMore) {
  const std::vector<Anchor> pool = SamplePool(3);
  Open()->Save("s", pool);
  const auto store = Open();
  for (const fs::path& file : Files()) {
    const std::string good = Read(file);
    const bool is_list = file.filename() == "LIST";
    for (std::size_t i = 0; i < good.size(); ++i) {
      std::string bad = good;
      bad[i] = static_cast<char>(bad[i] ^ 0x10);
      Write(file, bad);
      const std::int64_t before = Missed(store->stats());
      const std::vector<Anchor> found = Load(*store, "s");
      ASSERT_EQ(found.size(), is_list ? 0 : pool.size() - 1) << file << " byte " << i;
      ASSERT_EQ(Missed(store->stats()), before + 1);
    }
    Write(file, good);
  }
  EXPECT_EQ(Describe(Load(*store, "s")), Describe(pool));
}

TEST_F(AnchorStoreTest, TornMissingAndForeignFilesAreMisses) {
  const std::vector<Anchor> pool = SamplePool(4);
  Open()->Save("s", pool);
  for (const fs::path& file : Files()) {
    const std::string good = Read(file);
    for (const std::string& bad :
         {std::string(), good.substr(0, good.size() / 2), good + good, std::string(100, 'x')}) {
      Write(file, bad);
      const auto store = Open();
      EXPECT_LT(Load(*store, "s").size(), pool.size());
      EXPECT_EQ(store->stats().misses[static_cast<std::size_t>(AnchorFault::kDamaged)], 1);
    }
    fs::remove(file);
    const auto store = Open();
    EXPECT_LT(Load(*store, "s").size(), pool.size());
    fs::create_directory(file);
    EXPECT_LT(Load(*store, "s").size(), pool.size());
    fs::remove(file);
    fs::create_symlink("/dev/zero", file);
    EXPECT_LT(Load(*store, "s").size(), pool.size());
    EXPECT_GT(Missed(store->stats()), 0);
    fs::remove(file);
    Write(file, good);
  }
  // Another record under the list: right in itself, and not the one that is meant.
  const anchors::AnchorOwner owner = anchors::SampleOwner("s");
  Anchor swapped = pool.front();
  swapped.base = pool.back().base;
  const std::vector<std::byte> record = EncodeAnchor(swapped, owner);
  char name[32];
  std::snprintf(name, sizeof name, "%016llx.anchor", static_cast<unsigned long long>(swapped.version));
  Write(Files().back().parent_path() / name, std::string(reinterpret_cast<const char*>(record.data()), record.size()));
  EXPECT_EQ(Load(*Open(), "s").size(), pool.size() - 1);
}

// After damage the session learns again, and what it saves then is all there is.
TEST_F(AnchorStoreTest, ADamagedSessionIsSavedAnew) {
  Open()->Save("s", SamplePool(6));
  Write(Files().front(), "garbage");
  Write(Files().back().parent_path() / "left over.new", "from a crash");
  {
    const auto store = Open();
    AnchorPool pool;
    pool.Restore(Load(*store, "s"));
    TeachSamples(&pool, 6, 9);
    store->Save("s", pool.Snapshot());
    store->Flush();
    EXPECT_EQ(Describe(Load(*Open(), "s")), Describe(pool.Snapshot()));
    EXPECT_EQ(Files().size(), pool.anchors() + 1);
  }
}

TEST_F(AnchorStoreTest, TheQuotaHolds) {
  constexpr std::int64_t kQuota = 160 << 10;
  const auto on_disk = [this] { return DirectoryBytes(dir_.File("anchors")); };
  {
    const auto store = Open("space", kQuota);
    AnchorPool pool;
    for (int step = 0; step < 40; ++step) {
      TeachSamples(&pool, step, step + 1, 40);
      store->Save("s" + std::to_string(step % 5), pool.Snapshot());
      store->Flush();
      ASSERT_LE(on_disk(), kQuota) << step;
      ASSERT_LE(store->stats().bytes, kQuota);
      ASSERT_GE(store->stats().bytes, on_disk());
    }
    EXPECT_GT(store->stats().dropped, 0);
    // The newest of it is there, and it is right.
    const std::vector<std::string> all = Describe(pool.Snapshot());
    const std::vector<std::string> kept = Describe(Load(*store, "s4"));
    ASSERT_GT(kept.size(), 1u);
    ASSERT_LT(kept.size(), all.size());
    EXPECT_TRUE(std::equal(kept.rbegin(), kept.rend(), all.rbegin()));
  }
  // Another model's anchors count, and go first when they are oldest.
  const auto other = Open("other weights", kQuota);
  other->Save("t", SamplePool(30, 40));
  other->Flush();
  EXPECT_LE(on_disk(), kQuota);
  EXPECT_FALSE(Load(*other, "t").empty());
  // A quota that holds nothing is no reason to fail.
  const auto none = Open("space", 1000);
  none->Save("u", SamplePool(3));
  none->Flush();
  EXPECT_TRUE(Load(*none, "u").empty());
}

TEST_F(AnchorStoreTest, ClearLeavesNothing) {
  Open("other weights")->Save("s", SamplePool(3));
  const auto store = Open();
  store->Save("s", SamplePool(3));
  store->Save("t", SamplePool(3));
  store->Clear();
  store->Flush();
  EXPECT_TRUE(Files().empty());
  EXPECT_EQ(store->stats().bytes, 0);
  EXPECT_TRUE(Load(*store, "s").empty());
  store->Save("s", SamplePool(2));
  store->Flush();
  EXPECT_EQ(Describe(Load(*store, "s")), Describe(SamplePool(2)));
}

TEST_F(AnchorStoreTest, ADirectoryThatCannotBeWrittenCostsOnlyTheAnchors) {
  Write(dir_.File("anchors"), "a file is in the way");
  const auto store = Open();
  store->Save("s", SamplePool(4));
  store->Flush();
  EXPECT_TRUE(Load(*store, "s").empty());
  EXPECT_EQ(store->stats().saved, 0);
  EXPECT_GT(store->stats().dropped, 0);
}

// kill -9 at every step of saving: what is found is one snapshot, whole, and none older than what was acknowledged.
TEST_F(AnchorStoreTest, AKilledSaveLeavesTheSnapshotBeforeOrAfter) {
  int killed = 0;
  const std::pair<std::string, int> points[] = {
      {"anchors.before_rename", 20}, {"anchors.after_record", 10}, {"anchors.after_list", 10}};
  for (const auto& [point, passes] : points) {
    for (int pass = 1; pass <= passes + 1; ++pass) {  // the last is not reached
      const std::string directory = dir_.File(point + std::to_string(pass));
      const std::string command =
          "KVSHARE_FAULT=" + point + ":" + std::to_string(pass) + " exec " + KVS_ANCHOR_CRASH_WORKER + " " + directory;
      FILE* const worker = popen(command.c_str(), "r");
      ASSERT_NE(worker, nullptr);
      int acknowledged = 0;
      for (int step = 0; fscanf(worker, "%d", &step) == 1;) acknowledged = step;
      const int status = pclose(worker);
      const anchors::AnchorOwner owner = anchors::SampleOwner();
      AnchorStore store({.directory = directory,
                         .max_bytes = 8 << 20,
                         .space = owner.space,
                         .layers = owner.layers,
                         .width = owner.width});
      const std::vector<std::string> found = Describe(Load(store, "s"));
      const bool ended = WIFEXITED(status) && WEXITSTATUS(status) == 0;
      killed += !ended;
      EXPECT_EQ(Missed(store.stats()), 0);
      const auto before = acknowledged == 0 ? std::vector<std::string>() : Describe(SamplePool(acknowledged));
      if (found != before) {
        EXPECT_FALSE(ended);
        EXPECT_EQ(found, Describe(SamplePool(acknowledged + 1))) << point << ":" << pass;
      }
    }
  }
  EXPECT_EQ(killed, 40);
}

}  // namespace
}  // namespace kvshare::agentd

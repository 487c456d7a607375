// Whatever happens to the stored bytes: detected, counted, dropped; never served, never a crash, never a refusal to
// start.
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <set>

#include "agentd/tiers/cold_tier.h"
#include "agentd/tiers/record.h"
#include "agentd/tiers/slab_store.h"
#include "gtest/gtest.h"
#include "tests/agentd/tiers/tier_harness.h"
#include "tests/testing/temp_dir.h"

namespace kvshare::agentd {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kPageBytes = 500;  // a slot is 4096 of header and 4096 of payload with its padding
constexpr std::size_t kSlotBytes = 8192;

class ColdDamageTest : public ::testing::Test {
 protected:
  std::unique_ptr<ColdTier> Open() {
    auto tier = ColdTier::Open({.directory = directory_.path().string(),
                                .max_bytes = 128 << 20,
                                .space = TestSpace(),
                                .page_bytes = kPageBytes,
                                .scrub_bytes_per_second = 0});
    EXPECT_TRUE(tier.ok()) << tier.status().message();
    return tier.ok() ? std::move(*tier) : nullptr;
  }
  void StoreIds(std::uint64_t begin, std::uint64_t end) {
    const auto tier = Open();
    for (std::uint64_t id = begin; id < end; ++id) ASSERT_TRUE(StorePage(*tier, TestPage(id), kPageBytes));
    ASSERT_TRUE(tier->Flush().ok());
  }
  std::string Slab() { return FilesEndingIn(directory_.path(), ".slab").at(0); }
  // How many of the first `count` pages come back right. A wrong one fails the test.
  std::uint64_t CountRight(ColdTier& tier, std::uint64_t count) {
    std::uint64_t right = 0;
    for (std::uint64_t id = 0; id < count; ++id) {
      const std::string verdict = Judge(tier, TestPage(id), kPageBytes);
      EXPECT_TRUE(verdict.empty() || verdict == "missing") << verdict;
      if (verdict.empty()) ++right;
    }
    EXPECT_TRUE(tier.CheckIntegrity().ok()) << tier.CheckIntegrity().message();
    return right;
  }
  // Where in the slab page `id` lies.
  std::size_t OffsetOf(std::uint64_t id) { return SlotOf(TestPage(id).context, ReadFile(Slab()), kPageBytes); }

  testing::TempDir directory_;
};

// As many records as a record has bytes, each with another one flipped.
TEST_F(ColdDamageTest, EveryByteOfARecordFlipped) {
  StoreIds(0, kSlotBytes);
  const std::string slab = Slab();
  const std::string bytes = ReadFile(slab);
  std::map<Digest, std::size_t> offsets;
  for (std::size_t offset = 0; offset + kSlotBytes <= bytes.size(); offset += kSlotBytes) {
    Digest context;
    std::memcpy(context.bytes.data(), bytes.data() + offset + 64, sizeof context);
    offsets[context] = offset;
  }
  const auto tier = Open();
  std::vector<Digest> contexts;
  for (std::size_t at = 0; at < kSlotBytes; ++at) {
    contexts.push_back(TestPage(at).context);
    ASSERT_EQ(offsets.count(contexts.back()), 1u);
    const std::size_t place = offsets[contexts.back()] + at;
    const char flipped = static_cast<char>(bytes[place] ^ (1 << at % 8));
    Overwrite(slab, place, {&flipped, 1});
  }
  const auto all = LoadAll(*tier, contexts, kPageBytes);
  for (std::size_t at = 0; at < kSlotBytes; ++at) {
    ASSERT_EQ(all[at].status.code(), StatusCode::kDataLoss) << "byte " << at;
    ASSERT_FALSE(tier->Contains(contexts[at]));
  }
  EXPECT_EQ(tier->stats().integrity_errors, static_cast<std::int64_t>(kSlotBytes));
  EXPECT_EQ(tier->stats().entries, 0);
  // Computed again and stored again, all is well.
  for (std::uint64_t id = 0; id < 100; ++id) ASSERT_TRUE(StorePage(*tier, TestPage(id), kPageBytes));
  ASSERT_TRUE(tier->Flush().ok());
  EXPECT_EQ(CountRight(*tier, 100), 100u);
}

TEST_F(ColdDamageTest, SwappedSlots) {
  StoreIds(0, 8);
  const std::string slab = Slab();
  const std::string bytes = ReadFile(slab);
  const std::size_t a = OffsetOf(2), b = OffsetOf(5);
  Overwrite(slab, a, bytes.substr(b, kSlotBytes));
  Overwrite(slab, b, bytes.substr(a, kSlotBytes));
  const auto tier = Open();
  EXPECT_EQ(CountRight(*tier, 8), 6u);
  EXPECT_EQ(tier->stats().integrity_errors, 2);
}

TEST_F(ColdDamageTest, SwappedPayloads) {
  StoreIds(0, 8);
  const std::string slab = Slab();
  const std::string bytes = ReadFile(slab);
  const std::size_t a = OffsetOf(2) + 4096, b = OffsetOf(5) + 4096;
  Overwrite(slab, a, bytes.substr(b, 4096));
  Overwrite(slab, b, bytes.substr(a, 4096));
  const auto tier = Open();
  EXPECT_EQ(CountRight(*tier, 8), 6u);
  EXPECT_EQ(tier->stats().integrity_errors, 2);
}

TEST_F(ColdDamageTest, AnOldSlabUnderANewIndex) {
  StoreIds(0, 8);
  const std::string old = ReadFile(Slab());
  {
    const auto tier = Open();
    for (std::uint64_t id = 0; id < 8; ++id) tier->Remove(TestPage(id).context);
    ASSERT_TRUE(tier->Flush().ok());
  }
  StoreIds(4, 16);  // into the slots that became free
  Overwrite(Slab(), 0, old);
  const auto tier = Open();
  CountRight(*tier, 16);
  EXPECT_GT(tier->stats().integrity_errors, 0);
}

TEST_F(ColdDamageTest, AnOldIndexOverNewSlabs) {
  StoreIds(0, 8);
  const fs::path index = fs::path(Slab()).parent_path() / "index";
  fs::copy(index, directory_.path() / "old", fs::copy_options::recursive);
  {
    const auto tier = Open();
    for (std::uint64_t id = 0; id < 4; ++id) tier->Remove(TestPage(id).context);
    ASSERT_TRUE(tier->Flush().ok());
  }
  StoreIds(8, 16);
  fs::remove_all(index);
  fs::rename(directory_.path() / "old", index);
  const auto tier = Open();
  EXPECT_EQ(CountRight(*tier, 8), 4u);
  EXPECT_EQ(tier->stats().integrity_errors, 4);
}

TEST_F(ColdDamageTest, ABrokenIndexIsMadeAnewFromTheSlabs) {
  StoreIds(0, 40);
  const auto zero = [](const std::string& file) {
    Overwrite(file, 0, std::string(std::min<std::size_t>(64, fs::file_size(file)), '\0'));
  };
  const auto manifests = [&] {
    std::vector<std::string> files;
    for (const auto& item : fs::recursive_directory_iterator(directory_.path())) {
      if (item.path().filename().string().rfind("MANIFEST", 0) == 0) files.push_back(item.path().string());
    }
    return files;
  };
  int breaks = 0;
  const auto check = [&](const char* what, const std::vector<std::string>& files, auto damage) {
    // The last damaged index was kept aside; it is not what is broken now.
    for (const std::string& file : files) {
      if (file.find("index.damaged") == std::string::npos) {
        damage(file);
        ++breaks;
      }
    }
    const auto tier = Open();
    EXPECT_EQ(tier->stats().index_rebuilds, 1) << what;
    EXPECT_EQ(CountRight(*tier, 40), 40u) << what;
    EXPECT_EQ(FilesEndingIn(directory_.path(), "index.damaged/CURRENT").size() <= 1, true);
  };
  check("MANIFEST zeroed", manifests(), zero);
  check("CURRENT zeroed", FilesEndingIn(directory_.path(), "CURRENT"), zero);
  check("CURRENT missing", FilesEndingIn(directory_.path(), "CURRENT"), [](const auto& file) { fs::remove(file); });
  check("MANIFEST missing", manifests(), [](const auto& file) { fs::remove(file); });
  Open();  // once more, so that what was in the log is in a table
  check("table zeroed", FilesEndingIn(directory_.path(), ".sst"), zero);
  Open();
  check("table missing", FilesEndingIn(directory_.path(), ".sst"), [](const auto& file) { fs::remove(file); });
  Open();
  check("table cut", FilesEndingIn(directory_.path(), ".sst"),
        [](const auto& file) { fs::resize_file(file, fs::file_size(file) / 2); });
  check("index missing", {(fs::path(Slab()).parent_path() / "index").string()},
        [](const auto& file) { fs::remove_all(file); });
  EXPECT_GE(breaks, 8);
}

// One flipped bit anywhere in the index: never wrong, never a crash; and what is lost is at most what that bit held.
TEST_F(ColdDamageTest, FlippedBitsInEveryFileOfTheIndex) {
  StoreIds(0, 24);
  const fs::path space = fs::path(Slab()).parent_path();
  fs::copy(space, directory_.path() / "good", fs::copy_options::recursive);
  std::mt19937_64 rng(5);
  int files = 0;
  for (int round = 0; round < 20; ++round) {
    fs::remove_all(space);
    fs::copy(directory_.path() / "good", space, fs::copy_options::recursive);
    for (const auto& item : fs::directory_iterator(space / "index")) {
      const std::string file = item.path().string();
      const std::size_t size = fs::file_size(file);
      if (size == 0) continue;
      const std::size_t at = rng() % size;
      const char flipped = static_cast<char>(ReadFile(file)[at] ^ (1 << rng() % 8));
      Overwrite(file, at, {&flipped, 1});
      ++files;
    }
    const auto tier = Open();
    ASSERT_NE(tier, nullptr);
    EXPECT_EQ(CountRight(*tier, 24), 24u);
  }
  EXPECT_GT(files, 40);
}

TEST_F(ColdDamageTest, SlabsThatAreShortMissingOrGarbage) {
  StoreIds(0, 16);
  fs::resize_file(Slab(), 3 * kSlotBytes + 100);
  {
    const auto tier = Open();
    EXPECT_EQ(CountRight(*tier, 16), 3u);
    EXPECT_EQ(tier->stats().integrity_errors, 13);
  }
  StoreIds(0, 16);
  fs::remove(Slab());
  {
    const auto tier = Open();
    EXPECT_EQ(CountRight(*tier, 16), 0u);
  }
  StoreIds(0, 16);
  std::mt19937_64 rng(6);
  std::string garbage(16 * kSlotBytes, '\0');
  for (char& c : garbage) c = static_cast<char>(rng());
  Overwrite(Slab(), 0, garbage);
  const auto tier = Open();
  EXPECT_EQ(CountRight(*tier, 16), 0u);
  EXPECT_GE(tier->stats().integrity_errors, 16);
}

// Slabs of which the quota has no use are not made whole for the sake of one that is left over.
TEST_F(ColdDamageTest, ASlabFarBeyondTheQuota) {
  StoreIds(0, 16);
  const std::string space = fs::path(Slab()).parent_path().string();
  fs::rename(Slab(), space + "/slab-000040.slab");
  const auto slabs = SlabStore::Open(space, SlotBytes(kPageBytes), 1000);
  ASSERT_TRUE(slabs.ok()) << slabs.status().message();
  EXPECT_LT((*slabs)->slots() * SlotBytes(kPageBytes), std::uint64_t{2} << 30);
  const auto tier = Open();
  ASSERT_NE(tier, nullptr);
  EXPECT_LE(tier->stats().disk_bytes, 128 << 20);
  EXPECT_FALSE(fs::exists(space + "/slab-000040.slab"));
  EXPECT_EQ(CountRight(*tier, 16), 0u);
  ASSERT_TRUE(StorePage(*tier, TestPage(0), kPageBytes));
  ASSERT_TRUE(tier->Flush().ok());
  EXPECT_EQ(CountRight(*tier, 16), 1u);
}

// A process without descriptors cannot open an index, which is sound all the same.
TEST_F(ColdDamageTest, AnIndexThatCannotBeOpenedNowIsNotMadeAnew) {
  StoreIds(0, 16);
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  const int next = dup(0);  // the lowest that is free
  close(next);
  int refused = 0;
  for (int spare = 2; spare < 12; ++spare) {
    const rlimit few = {static_cast<rlim_t>(next + spare), before.rlim_max};
    ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &few), 0);
    const auto tier = ColdTier::Open({.directory = directory_.path().string(),
                                      .max_bytes = 128 << 20,
                                      .space = TestSpace(),
                                      .page_bytes = kPageBytes});
    ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
    if (tier.ok()) continue;
    EXPECT_EQ(tier.status().code(), StatusCode::kUnavailable) << tier.status().message();
    EXPECT_EQ(tier.status().message().find("index.new"), std::string::npos) << tier.status().message();
    ++refused;
  }
  EXPECT_GT(refused, 2);
  const auto tier = Open();
  EXPECT_EQ(tier->stats().index_rebuilds, 0);
  EXPECT_EQ(CountRight(*tier, 16), 16u);
}

TEST_F(ColdDamageTest, ScrubFindsWhatNobodyReads) {
  StoreIds(0, 16);
  const std::string byte = "x";
  const std::size_t at = OffsetOf(9) + 4096 + 77;
  const auto tier = Open();
  EXPECT_EQ(tier->Scrub().damaged, 0);
  Overwrite(Slab(), at, byte);
  const ScrubReport report = tier->Scrub();
  EXPECT_EQ(report.checked, 16);
  EXPECT_EQ(report.damaged, 1);
  EXPECT_EQ(tier->stats().integrity_errors, 1);
  EXPECT_EQ(CountRight(*tier, 16), 15u);
}

}  // namespace
}  // namespace kvshare::agentd

// A disk that fills up under the tier: it goes on serving, evicts where it can, says what is wrong, and recovers.
#include <sched.h>
#include <sys/mount.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>

#include "agentd/tiers/cold_index.h"
#include "agentd/tiers/cold_tier.h"
#include "gtest/gtest.h"
#include "tests/agentd/tiers/tier_harness.h"
#include "tests/testing/temp_dir.h"

namespace kvshare::agentd {
namespace {

constexpr std::size_t kPageBytes = 64000;
constexpr std::size_t kDiskBytes = std::size_t{48} << 20;

// Takes all of the disk's free space but `leave` bytes, until destroyed.
class Ballast {
 public:
  Ballast(const std::filesystem::path& directory, std::size_t leave) : path_(directory / "ballast") {
    struct statvfs info {};
    KVS_CHECK(statvfs(directory.c_str(), &info) == 0);
    const std::size_t free = info.f_bavail * info.f_frsize;
    std::ofstream file(path_, std::ios::binary);
    const std::string block(4096, 'b');
    for (std::size_t written = 0; written + leave + block.size() <= free; written += block.size()) file << block;
    file.flush();
  }
  ~Ballast() { std::filesystem::remove(path_); }

 private:
  const std::filesystem::path path_;
};

#define EXPECT_OR_SAY(condition) \
  if (!(condition)) return "line " + std::to_string(__LINE__) + ": " #condition

// In a process of its own, with a filesystem of its own. "" when all is well.
std::string FillTheDisk(const std::filesystem::path& disk) {
  const std::string directory = (disk / "cold").string();
  auto opened =
      ColdTier::Open({.directory = directory, .max_bytes = 512 << 20, .space = TestSpace(), .page_bytes = kPageBytes});
  EXPECT_OR_SAY(opened.ok());
  ColdTier& tier = **opened;

  // The quota is far beyond the disk: the tier stops growing by itself and evicts.
  // Long enough for the index's log to be written over several times: it must not live off what is left to others.
  constexpr std::uint64_t kStores = 9000;
  for (std::uint64_t id = 0; id < kStores; ++id) EXPECT_OR_SAY(StorePage(tier, TestPage(id), kPageBytes));
  EXPECT_OR_SAY(tier.Flush().ok());
  const ColdTierStats stats = tier.stats();
  EXPECT_OR_SAY(stats.stores == kStores);
  EXPECT_OR_SAY(stats.evictions > 300);
  EXPECT_OR_SAY(stats.entries > 100);
  EXPECT_OR_SAY(stats.degraded.empty());
  struct statvfs info {};
  EXPECT_OR_SAY(statvfs(disk.c_str(), &info) == 0);
  EXPECT_OR_SAY(info.f_bavail >= info.f_blocks / 20);  // what is left to others
  EXPECT_OR_SAY(Judge(tier, TestPage(kStores - 1), kPageBytes).empty());

  bool refused = false;
  {
    // Somebody else takes the rest: the index cannot be written any more.
    const Ballast ballast(disk, 0);
    std::uint64_t id = 50000;
    const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(2);
    while (!refused && std::chrono::steady_clock::now() < end) {
      const ColdPage page = TestPage(id++);
      tier.Store(page, TestKv(page.context, kPageBytes));
      refused = !tier.Flush().ok() && !tier.stats().degraded.empty();
    }
    EXPECT_OR_SAY(refused);
    EXPECT_OR_SAY(tier.stats().dropped > 0);
    // What is stored is served all the same.
    EXPECT_OR_SAY(Judge(tier, TestPage(kStores - 1), kPageBytes).empty());
    int served = 0;
    tier.ForEach(10, [&](const ColdEntry& entry) {
      served += LoadOne(tier, entry.page.context, kPageBytes).kv == TestKv(entry.page.context, kPageBytes) ? 1 : 0;
    });
    EXPECT_OR_SAY(served == 10);
  }
  // Space appears, and the tier finds out.
  const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(2);
  std::uint64_t id = 90000;
  bool stored = false;
  while (!stored && std::chrono::steady_clock::now() < end) {
    const ColdPage page = TestPage(id++);
    stored = tier.Store(page, TestKv(page.context, kPageBytes)) && tier.Flush().ok();
  }
  EXPECT_OR_SAY(stored);
  EXPECT_OR_SAY(tier.stats().degraded.empty());
  EXPECT_OR_SAY(Judge(tier, TestPage(id - 1), kPageBytes).empty());
  const Status sound = tier.CheckIntegrity();
  if (!sound.ok()) return sound.message();
  EXPECT_OR_SAY(tier.stats().integrity_errors == 0);
  opened->reset();

  auto again =
      ColdTier::Open({.directory = directory, .max_bytes = 512 << 20, .space = TestSpace(), .page_bytes = kPageBytes});
  EXPECT_OR_SAY(again.ok());
  EXPECT_OR_SAY(Judge(**again, TestPage(id - 1), kPageBytes).empty());
  EXPECT_OR_SAY((*again)->stats().integrity_errors == 0);
  EXPECT_OR_SAY((*again)->CheckIntegrity().ok());
  return "";
}

// What is forgotten on a full disk stays forgotten, and a tier that is cleared there goes on.
std::string ForgetOnAFullDisk(const std::filesystem::path& disk) {
  const ColdTierOptions options = {
      .directory = (disk / "cold").string(), .max_bytes = 512 << 20, .space = TestSpace(), .page_bytes = kPageBytes};
  auto tier = ColdTier::Open(options);
  EXPECT_OR_SAY(tier.ok());
  for (std::uint64_t id = 0; id < 200; ++id) EXPECT_OR_SAY(StorePage(**tier, TestPage(id), kPageBytes));
  EXPECT_OR_SAY((*tier)->Flush().ok());
  {
    const Ballast ballast(disk, 0);
    (*tier)->Remove(TestPage(7).context);
    EXPECT_OR_SAY(!(*tier)->Flush().ok());
    tier->reset();
  }
  tier = ColdTier::Open(options);
  EXPECT_OR_SAY(tier.ok());
  EXPECT_OR_SAY(!LoadOne(**tier, TestPage(7).context, kPageBytes).status.ok());
  EXPECT_OR_SAY(Judge(**tier, TestPage(6), kPageBytes).empty());
  {
    const Ballast ballast(disk, 0);
    (*tier)->Clear();
    static_cast<void>((*tier)->Flush());
    EXPECT_OR_SAY((*tier)->stats().entries == 0);
  }
  // Room for all, were it not that the tier tries once a second.
  const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  bool stored = false;
  while (!stored && std::chrono::steady_clock::now() < end) {
    stored = StorePage(**tier, TestPage(300), kPageBytes) && (*tier)->Flush().ok();
  }
  EXPECT_OR_SAY(stored);
  const Status sound = (*tier)->CheckIntegrity();
  if (!sound.ok()) return sound.message();
  tier->reset();
  tier = ColdTier::Open(options);
  EXPECT_OR_SAY(tier.ok());
  EXPECT_OR_SAY((*tier)->stats().entries == 1);
  EXPECT_OR_SAY((*tier)->stats().integrity_errors == 0);
  return "";
}

// Too full to open even the index, which is not damaged by that.
std::string OpenOnAFullDisk(const std::filesystem::path& disk) {
  const ColdTierOptions options = {
      .directory = (disk / "cold").string(), .max_bytes = 512 << 20, .space = TestSpace(), .page_bytes = kPageBytes};
  auto tier = ColdTier::Open(options);
  EXPECT_OR_SAY(tier.ok());
  EXPECT_OR_SAY(StorePage(**tier, TestPage(0), kPageBytes) && (*tier)->Flush().ok());
  tier->reset();
  {
    const Ballast ballast(disk, 0);
    tier = ColdTier::Open(options);
    EXPECT_OR_SAY(tier.status().code() == StatusCode::kUnavailable);
    EXPECT_OR_SAY(tier.status().message().find("index.new") == std::string::npos);
  }
  tier = ColdTier::Open(options);
  EXPECT_OR_SAY(tier.ok());
  EXPECT_OR_SAY((*tier)->stats().index_rebuilds == 0);
  EXPECT_OR_SAY(Judge(**tier, TestPage(0), kPageBytes).empty());
  return "";
}

// The index itself on a full disk, where the tier would not go: it refuses, reads on, and recovers.
std::string FillTheIndex(const std::filesystem::path& disk) {
  auto index = ColdIndex::Open((disk / "index").string(), /*create=*/true);
  EXPECT_OR_SAY(index.ok());
  const IndexBatch first = {.deletes = {}, .puts = {{TestPage(0).context, "first"}}};
  EXPECT_OR_SAY((*index)->Apply(first).ok());
  {
    const Ballast ballast(disk, 0);
    Status status;
    for (std::uint64_t id = 1; id < 20000 && status.ok(); ++id) {
      status = (*index)->Apply({.deletes = {}, .puts = {{TestPage(id).context, std::string(4000, 'x')}}});
    }
    EXPECT_OR_SAY(status.code() == StatusCode::kResourceExhausted);
    EXPECT_OR_SAY(!(*index)->Apply({.deletes = {TestPage(0).context}, .puts = {}}).ok());
    bool found = false;
    EXPECT_OR_SAY((*index)->ForEach([&](std::string_view, std::string_view value) { found |= value == "first"; }).ok());
    EXPECT_OR_SAY(found);
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  bool recovered = false;
  while (!recovered && std::chrono::steady_clock::now() < end) {
    (*index)->Resume();
    recovered = (*index)->Apply({.deletes = {TestPage(0).context}, .puts = {}}).ok();
  }
  EXPECT_OR_SAY(recovered);
  return "";
}

// Whether the mount is what was asked for: some sandboxes accept the size and ignore it.
bool IsSmall(const std::filesystem::path& disk) {
  struct statvfs info {};
  return statvfs(disk.c_str(), &info) == 0 && info.f_blocks * info.f_frsize == kDiskBytes &&
         info.f_bavail * info.f_frsize > kDiskBytes - (1 << 20);
}

// Runs `work` on a small disk in a process of its own, and returns what it says; "skip" where that is not possible.
std::string OnASmallDisk(std::string (*work)(const std::filesystem::path&)) {
  const testing::TempDir disk;
  int ends[2];
  KVS_CHECK(pipe(ends) == 0);
  const pid_t child = fork();
  KVS_CHECK(child >= 0);
  if (child == 0) {
    std::string verdict = "skip";
    // A mount that only this process sees, and that goes with it.
    if (unshare(CLONE_NEWNS) == 0 && mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
        mount("tmpfs", disk.path().c_str(), "tmpfs", 0, "size=48m") == 0 && IsSmall(disk.path())) {
      verdict = work(disk.path());
    }
    const bool told = write(ends[1], verdict.data(), verdict.size()) >= 0;
    _exit(told ? 0 : 1);
  }
  close(ends[1]);
  std::string verdict;
  char buffer[4096];
  for (ssize_t n = 0; (n = read(ends[0], buffer, sizeof buffer)) > 0;) {
    verdict.append(buffer, static_cast<std::size_t>(n));
  }
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? verdict : "died of signal " + std::to_string(WTERMSIG(status));
}

constexpr char kSkip[] =
    "needs a small filesystem: the right to mount a tmpfs of 48 MiB (run as root), and a kernel that keeps to it";

TEST(ColdDiskFullTest, TheTierServesEvictsAndRecovers) {
  const std::string verdict = OnASmallDisk(FillTheDisk);
  if (verdict == "skip") GTEST_SKIP() << kSkip;
  EXPECT_EQ(verdict, "");
}

TEST(ColdDiskFullTest, WhatIsForgottenStaysForgotten) {
  const std::string verdict = OnASmallDisk(ForgetOnAFullDisk);
  if (verdict == "skip") GTEST_SKIP() << kSkip;
  EXPECT_EQ(verdict, "");
}

TEST(ColdDiskFullTest, AnIndexThatCannotBeOpenedIsNotMadeAnew) {
  const std::string verdict = OnASmallDisk(OpenOnAFullDisk);
  if (verdict == "skip") GTEST_SKIP() << kSkip;
  EXPECT_EQ(verdict, "");
}

TEST(ColdDiskFullTest, TheIndexRefusesAndRecovers) {
  const std::string verdict = OnASmallDisk(FillTheIndex);
  if (verdict == "skip") GTEST_SKIP() << kSkip;
  EXPECT_EQ(verdict, "");
}

}  // namespace
}  // namespace kvshare::agentd

// The process that cold_crash_test kills: it stores, loads and removes pages for ever and says so, one line each, on
// standard output:
//   stored ID     Store took page ID                 flushed      all stored before this line is on disk
//   removing ID   page ID is about to be removed     wrong WHAT   something came back that should not have
//   open          the tier is open
// Arguments: directory, quota in MiB, seed, number of page ids.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "agentd/tiers/cold_tier.h"
#include "tests/agentd/tiers/tier_harness.h"

namespace kvshare::agentd {
namespace {

constexpr std::size_t kPageBytes = 5000;

void Say(const std::string& line) {
  const std::string text = line + "\n";
  if (write(STDOUT_FILENO, text.data(), text.size()) < 0) _exit(0);  // the test is gone
}

int Work(const std::string& directory, std::int64_t quota_mib, std::uint64_t seed, std::uint64_t ids) {
  auto opened = ColdTier::Open({.directory = directory,
                                .max_bytes = quota_mib << 20,
                                .space = TestSpace(),
                                .page_bytes = kPageBytes,
                                .scrub_bytes_per_second = 1 << 30});
  if (!opened.ok()) {
    Say("wrong " + opened.status().message());
    return 1;
  }
  ColdTier& tier = **opened;
  Say("open");
  std::mt19937_64 rng(seed);
  for (std::uint64_t step = 0;; ++step) {
    const std::uint64_t id = rng() % ids;
    const std::uint64_t kind = rng() % 100;
    if (kind < 70) {
      const ColdPage page = rng() % 4 == 0 ? TestPartialPage(id, 1 + rng() % 63) : TestPage(id);
      if (tier.Store(page, TestKv(page.context, kPageBytes)) && page.tokens.size() == 64) {
        Say("stored " + std::to_string(id));
      }
    } else if (kind < 85) {
      const std::string verdict = Judge(tier, TestPage(id), kPageBytes);
      if (!verdict.empty() && verdict != "missing") Say("wrong " + verdict);
    } else if (kind < 90) {
      Say("removing " + std::to_string(id));
      tier.Remove(TestPage(id).context);
    } else if (kind < 99) {
      if (tier.Flush().ok()) Say("flushed");
    } else if (step > 200 && rng() % 10 == 0) {
      Say("removing all");
      tier.Clear();
    }
  }
}

}  // namespace
}  // namespace kvshare::agentd

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  return kvshare::agentd::Work(argv[1], std::atoll(argv[2]), std::strtoull(argv[3], nullptr, 10),
                               std::strtoull(argv[4], nullptr, 10));
}

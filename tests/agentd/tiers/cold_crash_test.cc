// kill -9 at every named step and at random moments: what was acknowledged is served after the restart, nothing that is
// served is wrong, and the books balance.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <set>
#include <sstream>

#include "agentd/tiers/cold_tier.h"
#include "gtest/gtest.h"
#include "tests/agentd/tiers/tier_harness.h"
#include "tests/testing/temp_dir.h"

extern char** environ;

namespace kvshare::agentd {
namespace {

constexpr std::size_t kPageBytes = 5000;

// crash_worker as a child process, whose lines can be read one after the other.
class Worker {
 public:
  Worker(const std::string& directory, int quota_mib, std::uint64_t seed, std::uint64_t ids, const std::string& fault) {
    int ends[2];
    KVS_CHECK(pipe2(ends, O_CLOEXEC) == 0);
    std::vector<std::string> words = {KVS_CRASH_WORKER, directory, std::to_string(quota_mib), std::to_string(seed),
                                      std::to_string(ids)};
    std::vector<std::string> settings = {"KVSHARE_FAULT=" + fault};
    for (char** variable = environ; *variable != nullptr; ++variable) {
      if (std::string(*variable).rfind("KVSHARE_FAULT=", 0) != 0) settings.push_back(*variable);
    }
    std::vector<char*> arguments, environment;
    for (std::string& word : words) arguments.push_back(word.data());
    for (std::string& setting : settings) environment.push_back(setting.data());
    arguments.push_back(nullptr);
    environment.push_back(nullptr);
    pid_ = fork();
    KVS_CHECK(pid_ >= 0);
    if (pid_ == 0) {
      dup2(ends[1], STDOUT_FILENO);
      const int quiet = open("/dev/null", O_WRONLY);
      if (quiet >= 0) dup2(quiet, STDERR_FILENO);
      execve(arguments[0], arguments.data(), environment.data());
      _exit(127);
    }
    close(ends[1]);
    out_ = ends[0];
  }
  ~Worker() {
    if (pid_ > 0) Kill();
    close(out_);
  }

  // False when the worker has ended, or has said nothing for two minutes.
  bool NextLine(std::string* line) {
    while (true) {
      const std::size_t end = text_.find('\n');
      if (end != std::string::npos) {
        *line = text_.substr(0, end);
        text_.erase(0, end + 1);
        return true;
      }
      pollfd ready = {.fd = out_, .events = POLLIN, .revents = 0};
      if (poll(&ready, 1, 120'000) <= 0) return false;
      char buffer[65536];
      const ssize_t n = read(out_, buffer, sizeof buffer);
      if (n <= 0) return false;
      text_.append(buffer, static_cast<std::size_t>(n));
    }
  }
  // Kills it, if it still lives, and returns the signal that ended it (0: none).
  int Kill() {
    kill(pid_, SIGKILL);
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = -1;
    return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
  }
  // Waits for its end by itself.
  int Wait() {
    std::string line;
    while (NextLine(&line)) {
    }
    return Kill();
  }

 private:
  pid_t pid_ = -1;
  int out_ = -1;
  std::string text_;
};

class ColdCrashTest : public ::testing::Test {
 protected:
  // What a worker said, in order.
  void Hear(const std::string& line) {
    std::istringstream words(line);
    std::string verb, object;
    words >> verb >> object;
    if (verb == "stored") stored_.insert(std::stoull(object));
    if (verb == "flushed") acknowledged_.insert(stored_.begin(), stored_.end());
    if (verb == "flushed") stored_.clear();
    if (line == "removing all") {
      stored_.clear();
      acknowledged_.clear();
    } else if (verb == "removing") {
      stored_.erase(std::stoull(object));
      acknowledged_.erase(std::stoull(object));
    }
    if (verb == "wrong") ADD_FAILURE() << line;
  }
  void HearTheRest(Worker& worker) {
    std::string line;
    while (worker.NextLine(&line)) Hear(line);
    stored_.clear();
  }
  // Stores pages [0, ids) here, on a quota that holds them.
  void Fill(std::uint64_t ids) {
    auto tier = ColdTier::Open({.directory = directory_.path().string(),
                                .max_bytes = 64 << 20,
                                .space = TestSpace(),
                                .page_bytes = kPageBytes});
    ASSERT_TRUE(tier.ok()) << tier.status().message();
    for (std::uint64_t id = 0; id < ids; ++id) ASSERT_TRUE(StorePage(**tier, TestPage(id), kPageBytes));
    ASSERT_TRUE((*tier)->Flush().ok());
    ASSERT_EQ((*tier)->stats().entries, static_cast<std::int64_t>(ids));
  }
  // Opens the directory here and judges everything.
  void Check(int quota_mib, std::uint64_t ids, bool evicts, const std::string& when) {
    auto tier = ColdTier::Open({.directory = directory_.path().string(),
                                .max_bytes = std::int64_t{quota_mib} << 20,
                                .space = TestSpace(),
                                .page_bytes = kPageBytes,
                                .scrub_bytes_per_second = 0});
    ASSERT_TRUE(tier.ok()) << when << ": " << tier.status().message();
    const Status sound = (*tier)->CheckIntegrity();
    EXPECT_TRUE(sound.ok()) << when << ": " << sound.message();
    for (std::uint64_t id = 0; id < ids; ++id) {
      const std::string verdict = Judge(**tier, TestPage(id), kPageBytes);
      if (verdict == "missing") {
        EXPECT_TRUE(evicts || acknowledged_.count(id) == 0) << when << ": page " << id << " is lost";
      } else {
        EXPECT_EQ(verdict, "") << when << ": page " << id;
      }
    }
    EXPECT_EQ((*tier)->Scrub().damaged, 0) << when;
    EXPECT_EQ((*tier)->stats().integrity_errors, expected_errors_) << when;
  }

  testing::TempDir directory_;
  std::set<std::uint64_t> stored_, acknowledged_;
  std::int64_t expected_errors_ = 0;
};

TEST_F(ColdCrashTest, AtRandomMoments) {
  std::mt19937_64 rng(11);
  std::size_t acknowledged = 0;
  for (int round = 0; round < 200; ++round) {
    // Every other round is on a quota so small that pages are evicted all the time.
    const bool evicts = round % 2 == 1;
    const int quota = evicts ? 8 : 64;
    const std::uint64_t ids = evicts ? 400 : 150;
    if (round % 2 == 0 && round > 0) acknowledged_.clear();  // the small quota has evicted what it liked
    {
      Worker worker(directory_.path().string(), quota, rng(), ids, "");
      std::string line;
      const std::uint64_t lines = 1 + rng() % 400;
      for (std::uint64_t i = 0; i < lines && worker.NextLine(&line); ++i) Hear(line);
      const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(rng() % 3000);
      while (std::chrono::steady_clock::now() < until) {
      }
      ASSERT_EQ(worker.Kill(), SIGKILL) << "the worker ended by itself";
      HearTheRest(worker);
    }
    acknowledged += acknowledged_.size();
    Check(quota, ids, evicts, "round " + std::to_string(round));
    if (HasFailure()) return;
  }
  EXPECT_GT(acknowledged, 1000u);
}

TEST_F(ColdCrashTest, AtEveryFaultPoint) {
  std::uint64_t seed = 0;
  for (const char* point :
       {"demote.before_payload", "publish.after_payload", "publish.after_index", "evict.after_index_delete",
        "grow.after_allocate", "promote.before_read", "promote.after_read", "clear.after_index"}) {
    for (const int pass : {1, 2, 7, 40}) {
      const std::string when = std::string(point) + ":" + std::to_string(pass);
      const bool evicts = std::string(point).rfind("evict", 0) == 0;
      const bool rare = std::string(point) == "clear.after_index" || std::string(point) == "grow.after_allocate";
      if (rare && pass > 2) continue;
      {
        Worker worker(directory_.path().string(), evicts ? 8 : 64, ++seed, 300, when);
        std::string line;
        while (worker.NextLine(&line)) Hear(line);
        ASSERT_EQ(worker.Kill(), SIGKILL) << when << " was never passed";
        stored_.clear();
      }
      if (evicts) acknowledged_.clear();
      Check(evicts ? 8 : 64, 300, evicts, when);
      if (HasFailure()) return;
    }
    // An empty tier for the next one, so that it has to grow.
    std::filesystem::remove_all(directory_.path());
    acknowledged_.clear();
  }
}

// What a smaller quota gives back is no damage, whoever comes to see it.
TEST_F(ColdCrashTest, WhileAQuotaBecomesSmaller) {
  constexpr std::uint64_t kIds = 600;
  for (const char* point : {"shrink.before_index", "shrink.after_index", "shrink.after_slots"}) {
    ASSERT_NO_FATAL_FAILURE(Fill(kIds));
    Worker worker(directory_.path().string(), 8, 1, kIds, std::string(point) + ":1");
    ASSERT_EQ(worker.Wait(), SIGKILL) << point << " was never passed";
    Check(8, kIds, true, point);
    if (HasFailure()) return;
  }
}

TEST_F(ColdCrashTest, WhileTheIndexIsMadeAnew) {
  for (const char* point : {"rebuild.before_scan", "rebuild.before_move", "rebuild.between_moves"}) {
    ASSERT_NO_FATAL_FAILURE(Fill(50));
    for (std::uint64_t id = 0; id < 50; ++id) acknowledged_.insert(id);
    for (const std::string& file : FilesEndingIn(directory_.path(), "CURRENT")) {
      if (file.find("damaged") == std::string::npos) Overwrite(file, 0, std::string(8, '\0'));
    }
    Worker worker(directory_.path().string(), 64, 1, 50, std::string(point) + ":1");
    ASSERT_EQ(worker.Wait(), SIGKILL) << point << " was never passed";
    expected_errors_ = 1;  // the index itself
    Check(64, 50, false, point);
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace kvshare::agentd

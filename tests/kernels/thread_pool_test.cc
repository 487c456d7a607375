// ThreadPool: every task runs once, whatever the number of threads and however fast jobs follow each other.
#include "kernels/cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace kvshare::kernels {
namespace {

TEST(ThreadPoolTest, EveryTaskRunsExactlyOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.size(), threads);
    for (const std::int64_t tasks : {0, 1, 2, 7, 64, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
      pool.ParallelFor(tasks, [&](std::int64_t i) { runs[static_cast<std::size_t>(i)].fetch_add(1); });
      for (const std::atomic<int>& count : runs) EXPECT_EQ(count.load(), 1);
    }
  }
}

TEST(ThreadPoolTest, EveryTaskRunsExactlyOnceAtHome) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    for (const std::int64_t tasks : {0, 1, 2, 7, 64, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
      for (int job = 1; job <= 50; ++job) {
        pool.ParallelForAtHome(tasks, [&](std::int64_t i, int worker) {
          EXPECT_TRUE(worker >= 0 && worker < threads);
          runs[static_cast<std::size_t>(i)].fetch_add(1);
        });
        for (const std::atomic<int>& count : runs) ASSERT_EQ(count.load(), job);
      }
    }
  }
}

TEST(ThreadPoolTest, WorkersAreNumberedWithinThePool) {
  ThreadPool pool(3);
  std::vector<std::atomic<int>> by_worker(3);
  pool.ParallelFor(10000,
                   [&](std::int64_t, int worker) { by_worker.at(static_cast<std::size_t>(worker)).fetch_add(1); });
  EXPECT_EQ(by_worker[0].load() + by_worker[1].load() + by_worker[2].load(), 10000);
}

// Jobs back to back, of changing size, with more threads than cores, so that threads lose their core at every point: a
// worker that comes late to one job must take no part in the next with what it has read of the old one. Where it does,
// a task runs twice or the job never ends.
TEST(ThreadPoolTest, JobsInQuickSuccessionDoNotMix) {
  constexpr std::int64_t kMostTasks = 41;
  for (const int threads : {2, 3, 8, 16}) {
    ThreadPool pool(threads);
    std::vector<std::atomic<std::int64_t>> last_job(kMostTasks);
    for (std::int64_t job = 1; job <= 50000; ++job) {
      const std::int64_t tasks = 2 + job * 7919 % (kMostTasks - 1);
      std::atomic<std::int64_t> runs{0};
      pool.ParallelFor(tasks, [&last_job, &runs, job](std::int64_t i) {
        EXPECT_LT(last_job[static_cast<std::size_t>(i)].exchange(job), job);
        runs.fetch_add(1);
      });
      ASSERT_EQ(runs.load(), tasks) << threads << " threads, job " << job;
      for (std::int64_t i = 0; i < tasks; ++i) ASSERT_EQ(last_job[static_cast<std::size_t>(i)].load(), job);
    }
  }
}

// What the owner writes between jobs needs no lock, and neither does what tasks write: a job's start and end order
// them.
TEST(ThreadPoolTest, AJobSeesWhatCameBeforeItAndTheOwnerSeesTheJob) {
  ThreadPool pool(3);
  std::vector<std::int64_t> plain(5);
  for (std::int64_t job = 1; job <= 2000; ++job) {
    for (std::int64_t& value : plain) value += 1;
    pool.ParallelFor(5, [&plain](std::int64_t i) { plain[static_cast<std::size_t>(i)] *= 2; });
    pool.ParallelFor(5, [&plain](std::int64_t i) { plain[static_cast<std::size_t>(i)] -= 2; });
    ASSERT_EQ(plain, std::vector<std::int64_t>(5, 0)) << "job " << job;
  }
}

void KeepBusy(std::chrono::microseconds time) {
  const auto end = std::chrono::steady_clock::now() + time;
  while (std::chrono::steady_clock::now() < end) {
  }
}

// Longer than anyone spins: workers sleep when the next job comes.
TEST(ThreadPoolTest, SleepingWorkersWakeUp) {
  ThreadPool pool(4);
  for (int job = 0; job < 200; ++job) {
    KeepBusy(std::chrono::microseconds(300));
    // Each task waits for all others, so the job can only end if every worker has come.
    std::atomic<int> arrived{0};
    pool.ParallelFor(4, [&arrived](std::int64_t) {
      arrived.fetch_add(1);
      while (arrived.load() < 4) std::this_thread::yield();
    });
    ASSERT_EQ(arrived.load(), 4);
  }
}

// Longer than anyone spins: the owner sleeps until the last task has ended, and then wakes up.
TEST(ThreadPoolTest, TheOwnerWaitsForALongTask) {
  for (const int threads : {2, 4}) {
    ThreadPool pool(threads);
    for (int job = 0; job < 100; ++job) {
      std::atomic<int> arrived{0}, ended{0};
      pool.ParallelFor(threads, [&](std::int64_t, int worker) {
        arrived.fetch_add(1);
        while (arrived.load() < threads) std::this_thread::yield();  // one task for each thread
        if (worker != 0) KeepBusy(std::chrono::microseconds(400));
        ended.fetch_add(1);
      });
      ASSERT_EQ(ended.load(), threads);
    }
  }
}

TEST(ThreadPoolTest, EndsWithoutEverHavingHadAJob) {
  for (int i = 0; i < 50; ++i) ThreadPool pool(4);
}

TEST(ThreadPoolTest, UsableCoresAreAtLeastOne) {
  EXPECT_GE(UsableCores(), 1);
  EXPECT_LE(UsableCores(), 1 << 16);
}

}  // namespace
}  // namespace kvshare::kernels

// ThreadPool: every task runs once, whatever the number of threads and however fast jobs follow each other.
#include "kernels/cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <numeric>
#include <set>
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

TEST(ThreadPoolTest, WorkersAreNumberedWithinThePool) {
  ThreadPool pool(3);
  std::vector<std::atomic<int>> by_worker(3);
  pool.ParallelFor(10000,
                   [&](std::int64_t, int worker) { by_worker.at(static_cast<std::size_t>(worker)).fetch_add(1); });
  EXPECT_EQ(by_worker[0].load() + by_worker[1].load() + by_worker[2].load(), 10000);
}

// Short jobs back to back: a worker that comes late to one job must never take part in the next with the old one's
// function.
TEST(ThreadPoolTest, JobsInQuickSuccessionDoNotMix) {
  ThreadPool pool(4);
  std::int64_t plain = 0;  // written by the caller between jobs: a straggler of the last job would race with it
  for (std::int64_t job = 0; job < 20000; ++job) {
    std::atomic<std::int64_t> sum{0};
    const std::int64_t tasks = 2 + job % 5;
    pool.ParallelFor(tasks, [&sum, &plain, job](std::int64_t i) { sum.fetch_add(job * 10 + i + plain * 0); });
    ASSERT_EQ(sum.load(), tasks * job * 10 + tasks * (tasks - 1) / 2);
    ++plain;
  }
}

}  // namespace
}  // namespace kvshare::kernels

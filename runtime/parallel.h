// ParallelFor: the loader's way to use all cores. Kernels have a thread pool of their own (kernels/cpu); this one
// starts threads per call, which suits work of milliseconds and more.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace kvshare::runtime {

// The number of threads that `requested` (0: one per core this process may use) stands for.
inline int LoaderThreads(int requested) {
  return requested > 0 ? requested : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Calls body(begin, end) for pieces of at most `grain` that cover [0, count), from up to `threads` threads, and returns
// when all are done. The body must not throw.
template <typename Body>
void ParallelFor(std::int64_t count, std::int64_t grain, int threads, const Body& body) {
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    while (true) {
      const std::int64_t begin = next.fetch_add(grain);
      if (begin >= count) return;
      body(begin, std::min(count, begin + grain));
    }
  };
  const std::int64_t pieces = (count + grain - 1) / grain;
  std::vector<std::jthread> helpers;  // joined on every way out
  for (int t = 1; t < std::min<std::int64_t>(threads, pieces); ++t) helpers.emplace_back(work);
  work();
}

}  // namespace kvshare::runtime

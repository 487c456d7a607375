#include "kernels/cpu/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <limits>

#include "libkvshare/core/check.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvshare::kernels {

namespace {

using std::chrono::nanoseconds;

// About the cost of a wake-up on a virtual machine: spinning longer than that loses more than it saves.
constexpr nanoseconds kLongestSpin = std::chrono::microseconds(50);
constexpr nanoseconds kShortestSpin = std::chrono::microseconds(2);

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Spins until `done` holds or `longest` has passed; returns whether it holds.
template <typename Done>
bool SpinUntil(nanoseconds longest, Done done) {
  if (done()) return true;
  if (longest == nanoseconds::zero()) return false;
  const auto deadline = std::chrono::steady_clock::now() + longest;
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      Pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return done();
}

std::uint32_t Generation(std::uint64_t ticket) { return static_cast<std::uint32_t>(ticket >> 32); }

}  // namespace

int UsableCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

ThreadPool::ThreadPool(int threads)
    : ranges_(static_cast<std::size_t>(std::max(threads, 1))), spin_(threads <= UsableCores()) {
  KVS_CHECK(threads >= 1);
  workers_.reserve(static_cast<std::size_t>(threads - 1));
  for (int worker = 1; worker < threads; ++worker) {
    workers_.emplace_back([this, worker] { WorkerLoop(worker); });
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stop_.store(true);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(std::int64_t tasks, Call call, void* context) {
  KVS_CHECK(tasks <= std::numeric_limits<std::int32_t>::max());
  const std::uint32_t generation = Generation(ticket_.load(std::memory_order_relaxed)) + 1;
  ticket_.store(std::uint64_t{generation - 1} << 32 | kClosed);
  // Released, so that a worker that sees one of them also sees the closed ticket.
  tasks_.store(static_cast<std::uint32_t>(tasks), std::memory_order_release);
  call_.store(call, std::memory_order_release);
  context_.store(context, std::memory_order_release);
  finished_.store(0, std::memory_order_relaxed);
  // Sequentially consistent, like the sleeper's look at it: either we see the sleeper or it sees the job.
  ticket_.store(std::uint64_t{generation} << 32);
  if (sleepers_.load() > 0) {
    std::lock_guard lock(mutex_);
    wake_.notify_all();
  }
  Work(generation, 0);
  // A worker that lost its core in the middle of a task needs one: the owner gives its own away rather than spin on.
  const auto all_finished = [&] { return finished_.load() == tasks; };
  if (SpinUntil(spin_ ? kLongestSpin : nanoseconds::zero(), all_finished)) return;
  std::unique_lock lock(mutex_);
  waiting_.store(true);
  done_.wait(lock, all_finished);
  waiting_.store(false);
}

void ThreadPool::Work(std::uint32_t generation, int worker) {
  std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while (Generation(ticket) == generation) {
    const std::uint32_t tasks = tasks_.load(std::memory_order_acquire);
    const Call call = call_.load(std::memory_order_acquire);
    void* const context = context_.load(std::memory_order_acquire);
    const auto task = static_cast<std::uint32_t>(ticket);
    if (task >= tasks) return;
    if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
      call(context, task, worker);
      // Sequentially consistent, like waiting_: either we see the owner wait or it sees that this was the last.
      if (finished_.fetch_add(1) + 1 == tasks && waiting_.load()) {
        std::lock_guard lock(mutex_);
        done_.notify_one();
      }
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }
}

void ThreadPool::WorkerLoop(int worker) {
  std::uint32_t seen = 0;
  const auto has_news = [&] { return stop_.load() || Generation(ticket_.load()) != seen; };
  // How long it pays to spin follows from how soon the last job came: all the while, or half as long each time.
  const nanoseconds longest = spin_ ? kLongestSpin : nanoseconds::zero();
  const nanoseconds shortest = spin_ ? kShortestSpin : nanoseconds::zero();
  nanoseconds spin = longest;
  while (true) {
    const auto start = std::chrono::steady_clock::now();
    if (!SpinUntil(spin, has_news)) {
      std::unique_lock lock(mutex_);
      sleepers_.fetch_add(1);
      wake_.wait(lock, has_news);
      sleepers_.fetch_sub(1);
    }
    const bool soon = std::chrono::steady_clock::now() - start < 2 * kLongestSpin;  // the wake-up included
    spin = soon ? longest : std::max(spin / 2, shortest);
    if (stop_.load()) return;
    seen = Generation(ticket_.load(std::memory_order_acquire));
    Work(seen, worker);
  }
}

}  // namespace kvshare::kernels

#include "kernels/cpu/thread_pool.h"

#include <chrono>
#include <limits>

#include "libkvshare/core/check.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvshare::kernels {

namespace {

// About the cost of a wake-up on a virtual machine: spinning longer than that loses more than it saves.
constexpr auto kSpin = std::chrono::microseconds(50);

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Spins until `done` holds or kSpin has passed.
template <typename Done>
bool SpinUntil(Done done) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
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

ThreadPool::ThreadPool(int threads) {
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
  tasks_.store(static_cast<std::uint32_t>(tasks), std::memory_order_relaxed);
  call_.store(call, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  finished_.store(0, std::memory_order_relaxed);
  // Sequentially consistent, like the sleeper's look at it: either we see the sleeper or it sees the job.
  ticket_.store(std::uint64_t{generation} << 32);
  if (sleepers_.load() > 0) {
    std::lock_guard lock(mutex_);
    wake_.notify_all();
  }
  Work(generation, 0);
  const auto all_finished = [&] { return finished_.load(std::memory_order_acquire) == tasks; };
  while (!SpinUntil(all_finished)) std::this_thread::yield();
}

void ThreadPool::Work(std::uint32_t generation, int worker) {
  std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while (Generation(ticket) == generation) {
    const std::uint32_t tasks = tasks_.load(std::memory_order_relaxed);
    const Call call = call_.load(std::memory_order_relaxed);
    void* const context = context_.load(std::memory_order_relaxed);
    const auto task = static_cast<std::uint32_t>(ticket);
    if (task >= tasks) return;
    if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
      call(context, task, worker);
      finished_.fetch_add(1, std::memory_order_release);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }
}

void ThreadPool::WorkerLoop(int worker) {
  std::uint32_t seen = 0;
  const auto has_news = [&] { return stop_.load() || Generation(ticket_.load()) != seen; };
  while (true) {
    if (!SpinUntil(has_news)) {
      std::unique_lock lock(mutex_);
      sleepers_.fetch_add(1);
      wake_.wait(lock, has_news);
      sleepers_.fetch_sub(1);
    }
    if (stop_.load()) return;
    seen = Generation(ticket_.load(std::memory_order_acquire));
    Work(seen, worker);
  }
}

}  // namespace kvshare::kernels

// ThreadPool: the CPU backend's threads. One job at a time, cut into tasks that whoever is free takes next.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace kvshare::kernels {

// How many cores this process may run on, by its affinity; at least 1.
int UsableCores();

// Owned by one thread, which is worker 0 and the only one to call ParallelFor. The other workers spin for a moment
// after a job (a wake-up costs tens of microseconds, a forward step has hundreds of jobs) and then sleep. Nobody spins
// where there are more threads than cores: it would only keep the one that has work from running.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls fn(task) or fn(task, worker) for every task in [0, tasks), worker in [0, size()); returns when all are done.
  // Tasks start in ascending order. A task must not call ParallelFor.
  template <typename Fn>
  void ParallelFor(std::int64_t tasks, Fn&& fn) {
    using F = std::remove_reference_t<Fn>;
    const auto call = [](void* context, std::int64_t task, int worker) {
      if constexpr (std::is_invocable_v<F&, std::int64_t, int>) {
        (*static_cast<F*>(context))(task, worker);
      } else {
        (*static_cast<F*>(context))(task);
      }
    };
    if (tasks <= 1 || workers_.empty()) {
      for (std::int64_t i = 0; i < tasks; ++i) call(&fn, i, 0);
      return;
    }
    Run(tasks, call, &fn);
  }

  // As ParallelFor, with each worker at home in its own share of the tasks: worker w starts with the w-th of size()
  // equal ranges and takes from others' only when that is done. Jobs over the same rows then find them in the caches of
  // the same core, job after job; what moves between cores costs as much as memory. Tasks start in ascending order only
  // within a range.
  template <typename Fn>
  void ParallelForAtHome(std::int64_t tasks, Fn&& fn) {
    if (tasks <= 1 || workers_.empty()) {
      for (std::int64_t i = 0; i < tasks; ++i) fn(i, 0);
      return;
    }
    const std::int64_t workers = size();
    for (std::int64_t w = 0; w < workers; ++w) {
      ranges_[static_cast<std::size_t>(w)].next.store(tasks * w / workers, std::memory_order_relaxed);
      ranges_[static_cast<std::size_t>(w)].end = tasks * (w + 1) / workers;
    }
    // One task a worker; who comes late finds its range taken by others.
    ParallelFor(workers, [&](std::int64_t, int worker) {
      for (std::int64_t i = 0; i < workers; ++i) {
        Range& range = ranges_[static_cast<std::size_t>((worker + i) % workers)];
        for (std::int64_t task; (task = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
          fn(task, worker);
        }
      }
    });
  }

 private:
  struct alignas(64) Range {
    std::atomic<std::int64_t> next{0};
    std::int64_t end = 0;
  };
  using Call = void (*)(void* context, std::int64_t task, int worker);

  void Run(std::int64_t tasks, Call call, void* context);
  // Takes tasks of generation `generation` until none is left.
  void Work(std::uint32_t generation, int worker);
  void WorkerLoop(int worker);

  // The current job. ticket_ = generation << 32 | next task. A worker reads the job's fields, then claims a task by
  // compare-and-swap on the ticket it read before them. That it succeeds proves that the fields belong to this
  // generation: before they change, the ticket is closed (its task becomes kClosed), so whoever has seen a new field
  // finds its ticket gone.
  static constexpr std::uint32_t kClosed = 0xffffffff;
  std::atomic<std::uint64_t> ticket_{kClosed};
  std::atomic<std::uint32_t> tasks_{0};
  std::atomic<Call> call_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<std::uint32_t> finished_{0};
  std::atomic<bool> stop_{false};

  std::vector<Range> ranges_;  // of ParallelForAtHome, by worker

  const bool spin_;
  std::mutex mutex_;
  std::condition_variable wake_;      // for workers: a new generation, or stop_
  std::condition_variable done_;      // for the owner: all tasks have finished
  std::atomic<int> sleepers_{0};      // workers in wake_
  std::atomic<bool> waiting_{false};  // the owner in done_
  std::vector<std::thread> workers_;
};

}  // namespace kvshare::kernels

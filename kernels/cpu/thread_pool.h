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

// Owned by one thread, which is worker 0 and the only one to call ParallelFor. The other workers spin for a moment
// after a job (a wake-up costs tens of microseconds, a forward step has hundreds of jobs) and then sleep.
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

 private:
  using Call = void (*)(void* context, std::int64_t task, int worker);

  void Run(std::int64_t tasks, Call call, void* context);
  // Takes tasks of generation `generation` until none is left.
  void Work(std::uint32_t generation, int worker);
  void WorkerLoop(int worker);

  // The current job. ticket_ = generation << 32 | next task. A worker reads the job's fields, then claims a task by
  // compare-and-swap on the ticket it read before them: that it succeeds proves that the fields belonged to this
  // generation, because they only change when every task of the generation has been claimed and finished.
  std::atomic<std::uint64_t> ticket_{0};
  std::atomic<std::uint32_t> tasks_{0};
  std::atomic<Call> call_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<std::uint32_t> finished_{0};
  std::atomic<bool> stop_{false};

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<int> sleepers_{0};
  std::vector<std::thread> workers_;
};

}  // namespace kvshare::kernels

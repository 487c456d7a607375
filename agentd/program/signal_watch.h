// SignalWatch: SIGTERM and SIGINT, by a thread of their own: a handler could do next to nothing. The first one starts
// the drain, the second one ends the program at once.
#pragma once

#include <atomic>
#include <csignal>
#include <future>
#include <mutex>

namespace kvshare::agentd {

// One in a program, made before any other thread, which inherit the blocked mask, and never destroyed: its thread is
// never joined. Thread-safe.
class SignalWatch {
 public:
  SignalWatch();
  SignalWatch(const SignalWatch&) = delete;
  SignalWatch& operator=(const SignalWatch&) = delete;

  // Before this, there is nothing to drain and the first signal ends the program with exit code 0.
  void Ready() { ready_ = true; }
  void Wait() { first_.get_future().wait(); }
  // As a first signal, if none has come.
  void End();

 private:
  void Run();

  sigset_t signals_;
  std::atomic<bool> ready_ = false;
  std::once_flag ended_;
  std::promise<void> first_;
};

}  // namespace kvshare::agentd

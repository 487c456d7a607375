// SignalWatch: SIGTERM and SIGINT, by a thread of their own: a handler could do next to nothing. The first one starts
// the drain, the second one ends the program at once.
#pragma once

#include <atomic>
#include <condition_variable>
#include <csignal>
#include <mutex>

namespace kvshare::agentd {

// One in a program, made before any other thread, which inherit the blocked mask, and never destroyed: its thread is
// never joined. Thread-safe.
class SignalWatch {
 public:
  SignalWatch();
  SignalWatch(const SignalWatch&) = delete;
  SignalWatch& operator=(const SignalWatch&) = delete;

  // There is nothing to drain from now on, as at the start: the first signal ends the program with exit code 0. False
  // when it has come already, and the caller should end.
  bool NothingToDrain();
  // From now on it is Wait that the first signal ends.
  void Ready();
  // Returns when the first signal has come, or `end` is true; whoever makes it true calls Wake.
  void Wait(const std::atomic<bool>& end);
  void Wake();
  // As the first signal, for which Wait returns; a signal that comes later is the first all the same.
  void Drain();

 private:
  void Run();

  sigset_t signals_;
  std::mutex mu_;
  std::condition_variable changed_;
  bool ready_ = false;  // guarded by mu_, as what follows
  bool came_ = false;
};

}  // namespace kvshare::agentd

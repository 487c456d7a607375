#include "agentd/program/signal_watch.h"

#include <pthread.h>

#include <cstdlib>
#include <thread>

#include "agentd/program/exit_code.h"

namespace kvshare::agentd {

SignalWatch::SignalWatch() {
  sigemptyset(&signals_);
  sigaddset(&signals_, SIGTERM);
  sigaddset(&signals_, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals_, nullptr);
  std::signal(SIGPIPE, SIG_IGN);  // a reader of our log that went away must not end the daemon
  // Detached and never joined: it waits for signals until the program ends.
  std::thread([this] { Run(); }).detach();
}

bool SignalWatch::NothingToDrain() {
  const std::lock_guard lock(mu_);
  ready_ = false;
  return !came_;
}

void SignalWatch::Ready() {
  const std::lock_guard lock(mu_);
  ready_ = true;
}

void SignalWatch::Wait(const std::atomic<bool>& end) {
  std::unique_lock lock(mu_);
  changed_.wait(lock, [&] { return came_ || end; });
}

void SignalWatch::Wake() {
  const std::lock_guard lock(mu_);  // so that no Wait is between its look and its sleep
  changed_.notify_all();
}

void SignalWatch::Drain() {
  const std::lock_guard lock(mu_);
  came_ = true;
  changed_.notify_all();
}

void SignalWatch::Run() {
  int signal = 0;
  sigwait(&signals_, &signal);
  {
    const std::lock_guard lock(mu_);
    if (!ready_) std::_Exit(kExitOk);
    came_ = true;
    changed_.notify_all();
  }
  sigwait(&signals_, &signal);
  std::_Exit(kExitInterrupted);
}

}  // namespace kvshare::agentd

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

void SignalWatch::End() {
  std::call_once(ended_, [this] { first_.set_value(); });
}

void SignalWatch::Run() {
  int signal = 0;
  sigwait(&signals_, &signal);
  if (!ready_) std::_Exit(kExitOk);
  End();
  sigwait(&signals_, &signal);
  std::_Exit(kExitInterrupted);
}

}  // namespace kvshare::agentd

#include "tools/kvctl/exit_code.h"

#include <unistd.h>

#include <csignal>
#include <cstdio>

namespace kvshare::kvctl {
namespace {

volatile std::sig_atomic_t interrupted = 0;

void OnAlarm(int) { _exit(kInterrupted); }

void OnInterrupt(int) {
  if (interrupted) _exit(kInterrupted);
  interrupted = 1;
  alarm(2);
}

}  // namespace

ExitCode ExitCodeOf(const Status& status) {
  switch (status.code()) {
    case StatusCode::kOk: return kOk;
    case StatusCode::kUnavailable: return kCannotConnect;
    case StatusCode::kNotFound: return kNotFound;
    case StatusCode::kFailedPrecondition: return kVersion;
    case StatusCode::kDataLoss: return kIntegrity;
    case StatusCode::kCancelled: return kInterrupted;
    default: return kFailed;
  }
}

int Fail(ExitCode code, const std::string& message) {
  std::string line = message;
  for (char& c : line) {
    if (c == '\n' || c == '\r') c = ' ';
  }
  std::fprintf(stderr, "kvctl: %s\n", line.c_str());
  return code;
}

int Fail(const Status& status) { return Fail(ExitCodeOf(status), status.message()); }

void HandleInterrupts() {
  struct sigaction action = {};
  action.sa_handler = OnAlarm;
  sigaction(SIGALRM, &action, nullptr);
  action.sa_handler = OnInterrupt;
  sigaction(SIGINT, &action, nullptr);
  // A closed pipe (kvctl ... | head) is a failed write, which main() notices, not a signal.
  action.sa_handler = SIG_IGN;
  sigaction(SIGPIPE, &action, nullptr);
}

bool Interrupted() { return interrupted != 0; }

}  // namespace kvshare::kvctl

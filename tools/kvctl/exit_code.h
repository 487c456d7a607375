// Exit codes of kvctl, and the one line that goes with each failure.
#pragma once

#include <string>

#include "kvshare/status.h"

namespace kvshare::kvctl {

enum ExitCode : int {
  kOk = 0,
  kFailed = 1,
  kUsage = 2,
  kCannotConnect = 3,
  kNotFound = 4,
  kModel = 5,
  kVersion = 6,
  kIntegrity = 7,
  kThreshold = 8,
  kInterrupted = 130,
};

// The code that a failed call maps to when its place says nothing more.
ExitCode ExitCodeOf(const Status& status);

// Prints "kvctl: message" on stderr, as one line, and returns `code`.
int Fail(ExitCode code, const std::string& message);
int Fail(const Status& status);

// Ctrl-C sets a flag, so that a command can cancel its request; two seconds later, or at the second one, the process
// ends with 130 whatever it was doing.
void HandleInterrupts();
bool Interrupted();

}  // namespace kvshare::kvctl

// The exit codes of all our programs (docs/ARCHITECTURE.md lists them), and the one line that goes with them.
#pragma once

#include <cstdio>
#include <string>

namespace kvshare::agentd {

inline constexpr int kExitOk = 0;
inline constexpr int kExitFailed = 1;
inline constexpr int kExitUsage = 2;
inline constexpr int kExitCannotListen = 3;
inline constexpr int kExitModel = 5;
inline constexpr int kExitInterrupted = 130;

inline int Fail(int exit_code, const std::string& message) {
  std::fprintf(stderr, "agentd: %s\n", message.c_str());
  return exit_code;
}

}  // namespace kvshare::agentd

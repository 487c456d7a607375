// Fault points: named places where a test can make the process die as if by kill -9. Always compiled in; they do
// nothing unless the environment has KVSHARE_FAULT=<name>:<n>, which kills the process at the n-th pass (from 1).
#pragma once

#include <string_view>

namespace kvshare::agentd {

namespace internal {
// Whether KVSHARE_FAULT was set when the program started: the only cost of a point that is not armed.
extern const bool kFaultArmed;
void PassFaultPoint(std::string_view name);
}  // namespace internal

inline void FaultPoint(std::string_view name) {
  if (internal::kFaultArmed) internal::PassFaultPoint(name);
}

}  // namespace kvshare::agentd

#include "agentd/tiers/fault_points.h"

#include <unistd.h>

#include <atomic>
#include <charconv>
#include <csignal>
#include <cstdlib>

namespace kvshare::agentd::internal {

const bool kFaultArmed = std::getenv("KVSHARE_FAULT") != nullptr;

void PassFaultPoint(std::string_view name) {
  static std::atomic<long> passes{0};
  const char* const value = std::getenv("KVSHARE_FAULT");
  if (value == nullptr) return;
  const std::string_view fault(value);
  const std::size_t colon = fault.rfind(':');
  if (colon == std::string_view::npos || fault.substr(0, colon) != name) return;
  long at = 0;
  std::from_chars(fault.data() + colon + 1, fault.data() + fault.size(), at);
  if (passes.fetch_add(1) + 1 == at) kill(getpid(), SIGKILL);  // what an operator's kill -9 does, nothing gentler
}

}  // namespace kvshare::agentd::internal

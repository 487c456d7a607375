// How much memory this process may still take.
#pragma once

#include <cstdint>

namespace kvshare::agentd {

// The smaller of what the machine has available (/proc/meminfo) and what its control group leaves (cgroup v2), in
// bytes. 0 when neither can be read.
std::int64_t AvailableMemoryBytes();

}  // namespace kvshare::agentd

#include "agentd/system_memory.h"

#include <algorithm>
#include <fstream>
#include <optional>
#include <string>

namespace kvshare::agentd {
namespace {

std::optional<std::int64_t> ReadNumber(const char* path) {
  std::ifstream file(path);
  std::int64_t value = 0;
  if (!(file >> value)) return std::nullopt;  // also for "max": no limit
  return value;
}

std::int64_t MachineAvailable() {
  std::ifstream file("/proc/meminfo");
  std::string name;
  std::int64_t kib = 0;
  std::string unit;
  while (file >> name >> kib) {
    if (name == "MemAvailable:") return kib * 1024;
    std::getline(file, unit);
  }
  return 0;
}

}  // namespace

std::int64_t AvailableMemoryBytes() {
  const std::int64_t machine = MachineAvailable();
  const std::optional<std::int64_t> limit = ReadNumber("/sys/fs/cgroup/memory.max");
  const std::optional<std::int64_t> used = ReadNumber("/sys/fs/cgroup/memory.current");
  if (!limit.has_value()) return machine;
  return std::min(machine, std::max<std::int64_t>(0, *limit - used.value_or(0)));
}

}  // namespace kvshare::agentd

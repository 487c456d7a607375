#include "tools/kvctl/machine.h"

#include <sched.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace kvshare::kvctl {
namespace {

// The value after "key:" in a /proc file of such lines; empty when there is none.
std::string ProcField(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(':');
    if (colon == line.npos || line.compare(0, key.size(), key) != 0) continue;
    if (line.find_first_not_of(" \t", key.size()) != colon) continue;
    const std::size_t value = line.find_first_not_of(" \t", colon + 1);
    return value == line.npos ? "" : line.substr(value);
  }
  return "";
}

std::int64_t KilobyteField(const char* path, const char* key) {
  std::istringstream value(ProcField(path, key));
  std::int64_t kilobytes = 0;
  return value >> kilobytes ? kilobytes * 1024 : 0;
}

}  // namespace

int AvailableCores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
}

std::int64_t TotalMemoryBytes() { return KilobyteField("/proc/meminfo", "MemTotal"); }
std::int64_t AvailableMemoryBytes() { return KilobyteField("/proc/meminfo", "MemAvailable"); }

std::string CpuName() {
  const std::string name = ProcField("/proc/cpuinfo", "model name");
  return name.empty() ? "unknown" : name;
}

std::string OsName() {
  std::ifstream file("/etc/os-release");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("PRETTY_NAME=\"", 0) == 0) return line.substr(13, line.size() - 14);
  }
  return "unknown";
}

std::optional<std::int64_t> PeakRssBytes() {
  const std::int64_t bytes = KilobyteField("/proc/self/status", "VmHWM");
  return bytes > 0 ? std::optional(bytes) : std::nullopt;
}

void ResetPeakRss() { std::ofstream("/proc/self/clear_refs") << "5"; }

std::string FindSmolLm2() {
  std::error_code error;
  if (const char* named = std::getenv("KVSHARE_SMOLLM2"); named != nullptr && std::filesystem::exists(named, error))
    return named;
  const char* home = std::getenv("HOME");
  if (home == nullptr) return "";
  const std::string path = std::string(home) + "/.cache/kvshare/models/SmolLM2-135M-Instruct.Q4_1.gguf";
  return std::filesystem::exists(path, error) ? path : "";
}

}  // namespace kvshare::kvctl

#include "tools/kvctl/machine.h"

#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
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

Result<DiskFacts> JudgeDisk(const std::string& directory) {
  namespace fs = std::filesystem;
  std::error_code error;
  fs::path where = fs::absolute(directory, error);
  while (!where.empty() && !fs::exists(where, error) && where != where.parent_path()) where = where.parent_path();
  if (!fs::is_directory(where, error)) return Unavailable(where.string() + " is not a directory");
  DiskFacts facts;
  const fs::space_info space = fs::space(where, error);
  if (error) return Unavailable(where.string() + ": " + error.message());
  facts.free_bytes = static_cast<std::int64_t>(space.available);

  constexpr std::size_t kBlock = 4096;
  std::string name = (where / ".kvctl-doctor-XXXXXX").string();
  const int file = mkstemp(name.data());
  if (file < 0) return Unavailable(where.string() + " cannot be written: " + std::strerror(errno));
  void* block = nullptr;
  if (posix_memalign(&block, kBlock, kBlock) == 0) {
    std::memset(block, 'x', kBlock);
    const int direct = open(name.c_str(), O_RDWR | O_DIRECT | O_CLOEXEC);
    facts.direct = direct >= 0 && pwrite(direct, block, kBlock, 0) == static_cast<ssize_t>(kBlock) &&
                   pread(direct, block, kBlock, 0) == static_cast<ssize_t>(kBlock);
    if (direct >= 0) close(direct);
    std::free(block);
  }
  close(file);
  unlink(name.c_str());
  return facts;
}

}  // namespace kvshare::kvctl

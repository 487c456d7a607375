// Facts of the machine this process runs on, read from the kernel.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "kvshare/status.h"

namespace kvshare::kvctl {

int AvailableCores();                 // cores this process may use
std::int64_t TotalMemoryBytes();      // 0 when unknown
std::int64_t AvailableMemoryBytes();  // 0 when unknown
std::string CpuName();
std::string OsName();

// The process's highest resident size since the last ResetPeakRss(); nullopt when the kernel does not say.
std::optional<std::int64_t> PeakRssBytes();
void ResetPeakRss();

// SmolLM2's file where quickstart puts it (or KVSHARE_SMOLLM2 names it); empty when it is not there.
std::string FindSmolLm2();

// What a disk offers a cold tier.
struct DiskFacts {
  std::int64_t free_bytes = 0;  // for this user
  bool direct = false;          // O_DIRECT reads and writes work
};
// Writes and removes a small file there; where the directory does not exist, in the nearest one above it that does.
// Unavailable, naming what is wrong, when that cannot be.
Result<DiskFacts> JudgeDisk(const std::string& directory);

}  // namespace kvshare::kvctl

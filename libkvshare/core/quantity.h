// Sizes and durations as people write them: in flags, environment variables and files.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

#include "kvshare/status.h"

namespace kvshare {

// "30s", "500ms", "2m", "1h"; a bare number is seconds. At most a year.
Result<std::chrono::milliseconds> ParseDuration(std::string_view text);
// "8GiB", "512MiB", "64KiB", "1GB" (powers of ten), "4096" (bytes). At most 2^60.
Result<std::int64_t> ParseSize(std::string_view text);
// The shortest text that ParseSize reads back as `bytes`: "8GiB", "1000".
std::string FormatSize(std::int64_t bytes);

}  // namespace kvshare

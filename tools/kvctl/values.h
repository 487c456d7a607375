// Values as people write them on a command line.
#pragma once

#include <chrono>
#include <cstdint>
#include <string_view>
#include <vector>

#include "kernels/tensor.h"
#include "kvshare/status.h"
#include "kvshare/types.h"

namespace kvshare::kvctl {

// "30s", "500ms", "2m", "1h"; a bare number is seconds. At most a year.
Result<std::chrono::milliseconds> ParseDuration(std::string_view text);
// "8GiB", "512MiB", "64KiB", "1GB" (powers of ten), "4096" (bytes). At most 2^60.
Result<std::int64_t> ParseSize(std::string_view text);
// "7,1,64": whole numbers from 1 to `max`, at least one.
Result<std::vector<std::int64_t>> ParseCounts(std::string_view text, std::int64_t max);
// "off,exact": at least one, each once.
Result<std::vector<ReuseMode>> ParseModes(std::string_view text);
Result<kernels::DType> ParseDType(std::string_view text);

}  // namespace kvshare::kvctl

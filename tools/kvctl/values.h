// Values as people write them on a command line; sizes and durations are libkvshare/core/quantity.h.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/tensor.h"
#include "kvshare/status.h"
#include "kvshare/types.h"
#include "libkvshare/core/quantity.h"
#include "runtime/model.h"

namespace kvshare::kvctl {

// "7,1,64": whole numbers from 1 to `max`, at least one.
Result<std::vector<std::int64_t>> ParseCounts(std::string_view text, std::int64_t max);
// "0.15": 0..1.
Result<double> ParseFraction(std::string_view text);
// "0.05,0.2": above 0, at most 1, at least one.
Result<std::vector<double>> ParseFractions(std::string_view text);
// "lru,belady": at least one, none empty.
Result<std::vector<std::string>> ParseNames(std::string_view text);
// "off,exact": at least one, each once.
Result<std::vector<ReuseMode>> ParseModes(std::string_view text);
Result<kernels::DType> ParseDType(std::string_view text);
Result<kernels::DType> ParseCpuDType(std::string_view text);  // not float16

}  // namespace kvshare::kvctl

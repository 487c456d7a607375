// One line of somebody's file as JSON, within bounds.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string_view>

#include "kvshare/status.h"

namespace kvshare::trace {

inline constexpr std::size_t kMaxLineBytes = std::size_t{64} << 20;

// InvalidArgument when it is not JSON (ParseJson), ResourceExhausted when it is longer than kMaxLineBytes.
Result<nlohmann::json> ParseJsonLine(std::string_view line);

}  // namespace kvshare::trace

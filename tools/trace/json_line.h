// One line of somebody's file as JSON, within bounds.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string_view>

#include "kvshare/status.h"

namespace kvshare::trace {

inline constexpr std::size_t kMaxLineBytes = std::size_t{64} << 20;
inline constexpr int kMaxJsonDepth = 256;  // writing a value out again takes a stack frame per level

// InvalidArgument when it is no JSON or nested too deep, ResourceExhausted when it is longer than kMaxLineBytes.
Result<nlohmann::json> ParseJsonLine(std::string_view line);

}  // namespace kvshare::trace

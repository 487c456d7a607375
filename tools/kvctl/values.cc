#include "tools/kvctl/values.h"

#include <algorithm>
#include <charconv>
#include <optional>
#include <string>
#include <utility>

#include "libkvshare/core/status_macros.h"

namespace kvshare::kvctl {
namespace {

std::vector<std::string_view> Split(std::string_view text) {
  std::vector<std::string_view> parts;
  while (true) {
    const std::size_t comma = text.find(',');
    parts.push_back(text.substr(0, comma));
    if (comma == text.npos) return parts;
    text.remove_prefix(comma + 1);
  }
}

}  // namespace

Result<std::vector<std::int64_t>> ParseCounts(std::string_view text, std::int64_t max) {
  std::vector<std::int64_t> counts;
  for (std::string_view part : Split(text)) {
    std::int64_t value = 0;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), value);
    if (error != std::errc() || end != part.data() + part.size() || value < 1 || value > max) {
      return InvalidArgument("'" + std::string(part) + "' is not a whole number from 1 to " + std::to_string(max));
    }
    counts.push_back(value);
  }
  return counts;
}

Result<double> ParseFraction(std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !(value >= 0 && value <= 1)) {
    return InvalidArgument("'" + std::string(text) + "' is not a number from 0 to 1");
  }
  return value;
}

Result<std::vector<double>> ParseFractions(std::string_view text) {
  std::vector<double> fractions;
  for (std::string_view part : Split(text)) {
    const auto fraction = ParseFraction(part);
    if (!fraction.ok() || *fraction == 0) {
      return InvalidArgument("'" + std::string(part) + "' is not a number above 0 and at most 1");
    }
    fractions.push_back(*fraction);
  }
  return fractions;
}

Result<std::vector<std::string>> ParseNames(std::string_view text) {
  std::vector<std::string> names;
  for (std::string_view part : Split(text)) {
    if (part.empty()) return InvalidArgument("'" + std::string(text) + "' has an empty name in it");
    names.emplace_back(part);
  }
  return names;
}

Result<std::vector<ReuseMode>> ParseModes(std::string_view text) {
  std::vector<ReuseMode> modes;
  for (std::string_view part : Split(text)) {
    KVS_ASSIGN_OR_RETURN(const ReuseMode mode, ParseReuseMode(part));
    if (std::find(modes.begin(), modes.end(), mode) != modes.end()) {
      return InvalidArgument("'" + std::string(part) + "' is named twice");
    }
    modes.push_back(mode);
  }
  return modes;
}

Result<kernels::DType> ParseDType(std::string_view text) {
  if (text == "f32") return kernels::DType::kF32;
  if (text == "bf16") return kernels::DType::kBf16;
  if (text == "f16") return kernels::DType::kF16;
  if (const std::optional<kernels::DType> dtype = kernels::DTypeNamed(text); dtype.has_value()) return *dtype;
  return InvalidArgument("'" + std::string(text) + "' is not a dtype: float32, bfloat16 or, on a GPU, float16");
}

Result<kernels::DType> ParseCpuDType(std::string_view text) {
  KVS_ASSIGN_OR_RETURN(const kernels::DType dtype, ParseDType(text));
  if (dtype != kernels::DType::kF16) return dtype;
  return InvalidArgument("this command computes on the CPU: float32 or bfloat16, not float16");
}

}  // namespace kvshare::kvctl

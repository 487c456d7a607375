#include "libkvshare/core/quantity.h"

#include <charconv>
#include <string>
#include <vector>

#include "libkvshare/core/status_macros.h"

namespace kvshare {
namespace {

struct Unit {
  std::string_view name;
  double factor;
};

// A non-negative decimal number and its unit. InvalidArgument unless the whole text is that and the product is <= max.
Result<double> ParseWithUnit(std::string_view text, const std::vector<Unit>& units, double max, const char* example) {
  const Status wrong = InvalidArgument("'" + std::string(text) + "' is not a " + example);
  double number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number, std::chars_format::fixed);
  if (error != std::errc() || !(number >= 0)) return wrong;
  const std::string_view unit = text.substr(static_cast<std::size_t>(end - text.data()));
  for (const Unit& known : units) {
    if (unit == known.name) {
      if (number * known.factor > max) return InvalidArgument("'" + std::string(text) + "' is too large");
      return number * known.factor;
    }
  }
  return wrong;
}

}  // namespace

Result<std::chrono::milliseconds> ParseDuration(std::string_view text) {
  static const std::vector<Unit> kUnits = {{"", 1e3}, {"ms", 1}, {"s", 1e3}, {"m", 6e4}, {"h", 3.6e6}};
  KVS_ASSIGN_OR_RETURN(const double ms, ParseWithUnit(text, kUnits, 3.6e6 * 24 * 365, "duration (30s, 500ms, 2m)"));
  return std::chrono::milliseconds(static_cast<std::int64_t>(ms));
}

Result<std::int64_t> ParseSize(std::string_view text) {
  static const std::vector<Unit> kUnits = {
      {"", 1},     {"B", 1},    {"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1099511627776.0},
      {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9},      {"TB", 1e12}};
  KVS_ASSIGN_OR_RETURN(const double bytes, ParseWithUnit(text, kUnits, 1152921504606846976.0, "size (8GiB, 512MiB)"));
  return static_cast<std::int64_t>(bytes);
}

std::string FormatSize(std::int64_t bytes) {
  static constexpr const char* kNames[] = {"", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (unit < 4 && bytes != 0 && bytes % 1024 == 0) {
    bytes /= 1024;
    ++unit;
  }
  return std::to_string(bytes) + kNames[unit];
}

}  // namespace kvshare

#include "kvshare/types.h"

#include <string>
#include <utility>

namespace kvshare {

namespace {

constexpr std::pair<ReuseMode, std::string_view> kReuseModes[] = {
    {ReuseMode::kOff, "off"},
    {ReuseMode::kExact, "exact"},
    {ReuseMode::kRotate, "rotate"},
    {ReuseMode::kEpic, "epic"},
    {ReuseMode::kCacheBlend, "cacheblend"},
    {ReuseMode::kDhd, "dhd"},
    {ReuseMode::kKvcomm, "kvcomm"},
    {ReuseMode::kAuto, "auto"},
};

}  // namespace

std::string_view ReuseModeName(ReuseMode mode) {
  for (const auto& [known, name] : kReuseModes) {
    if (known == mode) return name;
  }
  return "off";
}

Result<ReuseMode> ParseReuseMode(std::string_view name) {
  for (const auto& [mode, known] : kReuseModes) {
    if (known == name) return mode;
  }
  return InvalidArgument("unknown reuse mode '" + std::string(name) +
                         "'; use off, exact, rotate, epic, cacheblend, dhd, kvcomm or auto");
}

std::string_view FinishReasonName(FinishReason reason) { return reason == FinishReason::kStop ? "stop" : "length"; }

}  // namespace kvshare

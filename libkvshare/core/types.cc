#include "kvshare/types.h"

namespace kvshare {

std::string_view ReuseModeName(ReuseMode mode) {
  switch (mode) {
    case ReuseMode::kOff: return "off";
    case ReuseMode::kExact: return "exact";
  }
  return "off";
}

Result<ReuseMode> ParseReuseMode(std::string_view name) {
  if (name == "off") return ReuseMode::kOff;
  if (name == "exact") return ReuseMode::kExact;
  for (std::string_view later : {"rotate", "epic", "cacheblend", "dhd", "kvcomm", "auto"}) {
    if (name == later) {
      return Unimplemented("reuse mode '" + std::string(name) + "' is not built yet; use off or exact");
    }
  }
  return InvalidArgument("unknown reuse mode '" + std::string(name) + "'; use off or exact");
}

std::string_view FinishReasonName(FinishReason reason) { return reason == FinishReason::kStop ? "stop" : "length"; }

}  // namespace kvshare

// The daemon's numbers as Prometheus reads them. docs/reference/metrics.md lists them for people.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "agentd/server/http_server.h"
#include "agentd/server/router_server.h"
#include "kvshare/types.h"

namespace kvshare::agentd {

// What a scrape shows. All zero before the model serves: every series is there from the first second, so that rates
// and alerts need no special case.
struct MetricsInput {
  std::string version;
  bool ready = false;
  std::optional<ServerInfo> info;  // once the model is loaded
  Stats stats;
  RouterServerCounters wire;
  HttpCounters http;
};

// Text exposition format 0.0.4.
std::string MetricsText(const MetricsInput& input);
inline constexpr std::string_view kMetricsContentType = "text/plain; version=0.0.4; charset=utf-8";

// The reasons that docs/miss-reasons.md lists: series of them exist before they happen.
std::span<const std::string_view> KnownMissReasons();

}  // namespace kvshare::agentd

// The daemon between its settings and its exit code: HTTP from the first moment to the last, and the service in
// between.
#pragma once

#include "agentd/config/config.h"
#include "agentd/program/signal_watch.h"

namespace kvshare::agentd {

// Serves until a signal comes, or the device that computes has failed, and then drains. Returns the exit code.
int RunDaemon(const Config& config, SignalWatch& signals);

}  // namespace kvshare::agentd

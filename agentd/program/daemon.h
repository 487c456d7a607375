// The daemon between its settings and its exit code: HTTP from the first moment to the last, and the services that
// come and go in between.
#pragma once

#include "agentd/config/config.h"
#include "agentd/program/signal_watch.h"

namespace kvshare::agentd {

// Serves until a signal comes, and then drains. Where the device that computes fails for good, whatever runs or waits
// on it fails once; with --device auto another service then takes the endpoints, on the CPU, and with --device cuda
// the daemon ends. Returns the exit code.
int RunDaemon(const Config& config, SignalWatch& signals);

}  // namespace kvshare::agentd

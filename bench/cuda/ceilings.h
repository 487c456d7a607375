// What the GPU and its link can copy: the limits that kernels stand beside, measured in the same run.
#pragma once

#include <functional>

#include "kvshare/status.h"

// Calls `report` with a name, the seconds of one copy, and GB/s (read + write on the device; one way across the link).
kvshare::Status MeasureCeilings(const std::function<void(const char* name, double seconds, double gbps)>& report);

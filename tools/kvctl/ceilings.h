// What this machine can do at most, measured through the same library calls that the model uses: the yardstick of
// `bench model` and of `doctor`.
#pragma once

#include "kernels/backend.h"
#include "kvshare/status.h"

namespace kvshare::kvctl {

// FLOP/s of one large Backend::Linear (1024 x 2048 by 2048 x 8192), the best of several runs.
Result<double> MeasureMatmulFlops(kernels::Backend& backend);

// Bytes/s that `threads` threads read from memory, the best of several runs over a buffer larger than any cache.
double MeasureReadBytesPerSecond(int threads);

}  // namespace kvshare::kvctl

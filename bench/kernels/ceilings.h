// The machine's limits, measured in the same process as what is compared with them.
#pragma once

namespace kvshare::bench {

// Dot products of registers alone: bf16 pairs where the processor has them, else fp32 multiply-add. FLOP/s of one core.
double MeasureDotFlops(bool bf16);

// Reading 256 MiB front to back with `threads` threads: bytes/s.
double MeasureReadBytes(int threads);

}  // namespace kvshare::bench

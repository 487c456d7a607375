// The machine's limits, measured in the same process as what is compared with them.
#pragma once

namespace kvshare::bench {

// Dot products of registers alone: bf16 pairs where the processor has them, else fp32 multiply-add. FLOP per
// second of one core's time, whatever else the machine does.
double MeasureDotFlops(bool bf16);

// Reading 256 MiB on huge pages front to back with `threads` threads: bytes/s. 0 when there is no such memory.
double MeasureReadBytes(int threads);

// What all threads of this process have computed so far, in seconds of one core. On a machine that others use too, work
// per second of this is what can be compared.
double ProcessCpuSeconds();

}  // namespace kvshare::bench

// The machine's limits, measured in the same process as what is compared with them.
#pragma once

namespace kvshare::bench {

enum class Dot { kF32, kAvx512Bf16, kAmxBf16 };

// Dot products of registers alone: FLOP per second of one core's time, whatever else the machine does. 0 where the
// processor has no such instruction, or the process was not given AMX's registers.
double MeasureDotFlops(Dot dot);

// Reading 256 MiB on huge pages front to back with `threads` threads: bytes/s. 0 when there is no such memory.
double MeasureReadBytes(int threads);

// What all threads of this process have computed so far, in seconds of one core. On a machine that others use too, work
// per second of this is what can be compared.
double ProcessCpuSeconds();

}  // namespace kvshare::bench

// Which version of the kernels runs: the best one this machine has, or the one asked for.
#pragma once

#include <string_view>
#include <vector>

#include "kernels/backend.h"

namespace kvshare::kernels {

std::string_view CpuIsaName(CpuIsa isa);

// True when processor and operating system support it. kAuto is always supported.
bool CpuHasIsa(CpuIsa isa);

// Whether its dot products take bf16 operands as they are; the others widen them to fp32.
constexpr bool MultipliesBf16(CpuIsa isa) { return isa == CpuIsa::kAmxBf16 || isa == CpuIsa::kAvx512Bf16; }

// Every version this machine has, best first; never empty (kPlain is always there).
std::vector<CpuIsa> AvailableIsas();

// kAuto becomes KVSHARE_ISA's version if set, else the best. InvalidArgument when this machine lacks it.
Result<CpuIsa> ResolveCpuIsa(CpuIsa wanted);

}  // namespace kvshare::kernels

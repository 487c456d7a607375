#include "kernels/cpu/isa.h"

#include <cstdlib>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "libkvshare/core/status_macros.h"

namespace kvshare::kernels {

namespace {
constexpr CpuIsa kBestFirst[] = {CpuIsa::kAmxBf16, CpuIsa::kAvx512Bf16, CpuIsa::kAvx512, CpuIsa::kAvx2, CpuIsa::kPlain};

// Linux gives a process AMX's registers only when it asks for them, before its threads do.
bool MayUseTiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
}  // namespace

std::string_view CpuIsaName(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kAuto: return "auto";
    case CpuIsa::kAmxBf16: return "amx-bf16";
    case CpuIsa::kAvx512Bf16: return "avx512-bf16";
    case CpuIsa::kAvx512: return "avx512";
    case CpuIsa::kAvx2: return "avx2";
    case CpuIsa::kPlain: return "plain";
  }
  return "plain";
}

Result<CpuIsa> ParseCpuIsa(std::string_view name) {
  for (CpuIsa isa :
       {CpuIsa::kAuto, CpuIsa::kAmxBf16, CpuIsa::kAvx512Bf16, CpuIsa::kAvx512, CpuIsa::kAvx2, CpuIsa::kPlain}) {
    if (name == CpuIsaName(isa)) return isa;
  }
  return InvalidArgument("unknown instruction set '" + std::string(name) +
                         "'; use auto, amx-bf16, avx512-bf16, avx512, avx2 or plain");
}

bool CpuHasIsa(CpuIsa isa) {
#if defined(__x86_64__)
  // The compiler's CPUID table also checks that the operating system saves the registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case CpuIsa::kAmxBf16:
      return CpuHasIsa(CpuIsa::kAvx512Bf16) && __builtin_cpu_supports("amx-tile") &&
             __builtin_cpu_supports("amx-bf16") && MayUseTiles();
    case CpuIsa::kAvx512Bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    case CpuIsa::kAvx512: return avx512;
    case CpuIsa::kAvx2: return avx2;
    case CpuIsa::kAuto:
    case CpuIsa::kPlain: return true;
  }
  return false;
#else
  return isa == CpuIsa::kAuto || isa == CpuIsa::kPlain;
#endif
}

std::vector<CpuIsa> AvailableIsas() {
  std::vector<CpuIsa> isas;
  for (CpuIsa isa : kBestFirst) {
    if (CpuHasIsa(isa)) isas.push_back(isa);
  }
  return isas;
}

Result<CpuIsa> ResolveCpuIsa(CpuIsa wanted) {
  if (wanted == CpuIsa::kAuto) {
    if (const char* name = std::getenv("KVSHARE_ISA"); name != nullptr && *name != '\0') {
      auto parsed = ParseCpuIsa(name);
      if (!parsed.ok()) return parsed.status().WithContext("environment variable KVSHARE_ISA");
      wanted = *parsed;
    }
  }
  if (wanted == CpuIsa::kAuto) return AvailableIsas().front();
  if (!CpuHasIsa(wanted)) {
    return InvalidArgument("this machine has no " + std::string(CpuIsaName(wanted)) + "; the best it has is " +
                           std::string(CpuIsaName(AvailableIsas().front())));
  }
  return wanted;
}

}  // namespace kvshare::kernels

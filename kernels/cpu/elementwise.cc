#include "kernels/cpu/elementwise.h"

namespace kvshare::kernels {

const ElementwiseKernel& ElementwiseFor(CpuIsa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case CpuIsa::kAmxBf16:
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512: return Avx512Elementwise();
    case CpuIsa::kAvx2: return Avx2Elementwise();
    case CpuIsa::kAuto:
    case CpuIsa::kPlain: break;
  }
#else
  static_cast<void>(isa);
#endif
  return PlainElementwise();
}

}  // namespace kvshare::kernels

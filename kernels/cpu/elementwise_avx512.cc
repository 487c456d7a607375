#include "kernels/cpu/simd_avx512.h"
// The functions above and below are those of this instruction set.
#include "kernels/cpu/elementwise_impl.h"

namespace kvshare::kernels {
const ElementwiseKernel& Avx512Elementwise() { return kElementwise; }
}  // namespace kvshare::kernels

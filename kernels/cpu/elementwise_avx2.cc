#include "kernels/cpu/simd_avx2.h"
// The functions above and below are those of this instruction set.
#include "kernels/cpu/elementwise_impl.h"

namespace kvshare::kernels {
const ElementwiseKernel& Avx2Elementwise() { return kElementwise; }
}  // namespace kvshare::kernels

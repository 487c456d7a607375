#include "kernels/cpu/simd_plain.h"
// The functions above and below are those of this instruction set.
#include "kernels/cpu/elementwise_impl.h"

namespace kvshare::kernels {
const ElementwiseKernel& PlainElementwise() { return kElementwise; }
}  // namespace kvshare::kernels

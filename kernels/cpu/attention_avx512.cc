// Attention tiles in fp32 with AVX-512. Compiled with -march=x86-64-v4.
#include "kernels/cpu/attention_vec_avx512.h"

namespace kvshare::kernels {
namespace {

constexpr AttentionKernel kBf16 = F32Attention<Avx512Vec>::Make<std::uint16_t>();
constexpr AttentionKernel kF32 = F32Attention<Avx512Vec>::Make<float>();

}  // namespace

const AttentionKernel& Avx512Attention(DType pages) { return pages == DType::kBf16 ? kBf16 : kF32; }

}  // namespace kvshare::kernels

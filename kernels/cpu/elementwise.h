// Row-local operations, one table of functions per instruction set. PODs and raw pointers only: each table is compiled
// with flags of its own. Every function's result for element i depends on that row alone, in a fixed order.
#pragma once

#include <cstdint>

#include "kernels/backend.h"

namespace kvshare::kernels {

struct ElementwiseKernel {
  // out[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i], n values; `out` is fp32 or bf16, and may be x when fp32.
  void (*rms_norm)(const float* x, const float* weight, float eps, std::int64_t n, DType dtype, void* out);
  // out[i] = table row in fp32
  void (*widen)(const void* x, DType dtype, std::int64_t n, float* out);
  // fp32 -> dtype
  void (*narrow)(const float* x, std::int64_t n, DType dtype, void* out);
  // x[i] += y[i]
  void (*add)(const float* y, std::int64_t n, float* x);
  // out[i] = silu(gate[i]) * up[i], silu(g) = g / (1 + exp(-g))
  void (*silu_mul)(const float* gate, const float* up, std::int64_t n, DType dtype, void* out);
  // Rotates one head in place: (x[j], x[j + half]) by the angle of frequency j.
  void (*rotate)(float* x, const float* cos, const float* sin, int half);
};

const ElementwiseKernel& PlainElementwise();
const ElementwiseKernel& Avx2Elementwise();
const ElementwiseKernel& Avx512Elementwise();
const ElementwiseKernel& ElementwiseFor(CpuIsa isa);

}  // namespace kvshare::kernels

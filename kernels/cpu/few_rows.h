// A few rows times packed weights: decoding. Reading the weights is all of the work then. oneDNN's kernels reach half
// of the memory's speed at it on the machines measured (bench/kernels/linear_bench.cc).
#pragma once

#include <cstdint>

namespace kvshare::kernels {

inline constexpr std::int64_t kFewRows = 8;

// What oneDNN calls BA16a64b2a: blocks of 64 columns, one after another; in each, for every pair of K, the pair's two
// bf16 of each column. A last block that is not full holds zeros. K is a multiple of 32.
struct PackedPanel {
  const std::uint16_t* data;
  std::int64_t k;
  std::int64_t k_chunk;  // a multiple of 32
  std::int64_t cols;
};

// out[r, c] = sum over K of x[r] w[c], in oneDNN's order: chunks of K, each one chain of the processor's dot-product
// instructions from zero in ascending order (AVX-512-BF16 sums pairs at a time, AMX blocks of 32); chunks are then
// added in ascending order. How long oneDNN's chunks are depends on its version and on K: whoever calls finds out by
// comparing bits. x has `rows` rows of bf16, at most kFewRows, x_stride elements apart; out is [rows, cols], dense.
// Needs AVX-512-BF16 or AMX.
void Avx512Bf16FewRows(const std::uint16_t* x, std::int64_t x_stride, std::int64_t rows, const PackedPanel& panel,
                       float* out);
void AmxBf16FewRows(const std::uint16_t* x, std::int64_t x_stride, std::int64_t rows, const PackedPanel& panel,
                    float* out);

using FewRowsKernel = decltype(&Avx512Bf16FewRows);

}  // namespace kvshare::kernels

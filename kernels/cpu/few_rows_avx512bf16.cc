#include "kernels/cpu/few_rows.h"

#include <immintrin.h>

namespace kvshare::kernels {
namespace {

constexpr std::int64_t kBlockCols = 64;
constexpr int kVectors = 4;  // of 16 columns

struct Block {
  const std::uint16_t* w;
  std::int64_t k, k_chunk;
  std::int64_t cols;  // of 64
};

// Rows [0, kRows) times [begin, end) of K of one block. Weights are read front to back: the hardware's prefetcher then
// reaches the memory's full speed, and fetching ahead by instructions only costs.
template <int kRows>
void MultiplyChunk(const std::uint16_t* x, std::int64_t x_stride, const Block& block, std::int64_t begin,
                   std::int64_t end, float* out, std::int64_t out_stride) {
  const std::uint16_t* w = block.w;
  __m512 sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_ps();
  }
  for (std::int64_t i = begin; i < end; i += 2) {
    __m512bh weights[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      weights[v] = (__m512bh)_mm512_loadu_si512(w + i * kBlockCols + v * 32);
    }
    for (int r = 0; r < kRows; ++r) {
      int pair;
      __builtin_memcpy(&pair, x + r * x_stride + i, sizeof pair);
      const auto both = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], both, weights[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const std::int64_t lanes = block.cols - v * 16;
    if (lanes <= 0) break;
    const auto mask = static_cast<__mmask16>(lanes >= 16 ? 0xffff : (1 << lanes) - 1);
    for (int r = 0; r < kRows; ++r) {
      float* to = out + r * out_stride + v * 16;
      const __m512 sum = begin == 0 ? sums[r][v] : _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sums[r][v]);
      _mm512_mask_storeu_ps(to, mask, sum);
    }
  }
}

template <int kRows>
void MultiplyBlock(const std::uint16_t* x, std::int64_t x_stride, const Block& block, float* out,
                   std::int64_t out_stride) {
  for (std::int64_t begin = 0; begin < block.k; begin += block.k_chunk) {
    const std::int64_t end = begin + block.k_chunk < block.k ? begin + block.k_chunk : block.k;
    MultiplyChunk<kRows>(x, x_stride, block, begin, end, out, out_stride);
  }
}

void MultiplyRows(const std::uint16_t* x, std::int64_t x_stride, std::int64_t rows, const Block& block, float* out,
                  std::int64_t out_stride) {
  switch (rows) {
    case 1: return MultiplyBlock<1>(x, x_stride, block, out, out_stride);
    case 2: return MultiplyBlock<2>(x, x_stride, block, out, out_stride);
    case 3: return MultiplyBlock<3>(x, x_stride, block, out, out_stride);
    default: return MultiplyBlock<4>(x, x_stride, block, out, out_stride);
  }
}

}  // namespace

void Avx512Bf16FewRows(const std::uint16_t* x, std::int64_t x_stride, std::int64_t rows, const PackedPanel& panel,
                       float* out) {
  for (std::int64_t col = 0; col < panel.cols; col += kBlockCols) {
    const Block block{panel.data + col * panel.k, panel.k, panel.k_chunk,
                      panel.cols - col < kBlockCols ? panel.cols - col : kBlockCols};
    // Four rows' sums fill half the registers; rows beyond them read the block again, from the cache.
    for (std::int64_t r = 0; r < rows; r += 4) {
      MultiplyRows(x + r * x_stride, x_stride, rows - r < 4 ? rows - r : 4, block, out + r * panel.cols + col,
                   panel.cols);
    }
  }
}

}  // namespace kvshare::kernels

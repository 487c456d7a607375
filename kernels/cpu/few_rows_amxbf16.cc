#include <immintrin.h>

#include "kernels/cpu/amx_tiles.h"
#include "kernels/cpu/few_rows.h"

namespace kvshare::kernels {
namespace {

constexpr std::int64_t kBlockCols = 64;
constexpr std::int64_t kStepBytes = kBlockCols * kTileSummed * 2;  // of weights, that one step of K takes

// Registers 0 to 3 are sums, 4 the rows, 5 to 7 weights.
constexpr TileConfig ForRows(int rows) {
  TileConfig config = WholeTiles();
  for (int t = 0; t < 5; ++t) config.rows[t] = static_cast<std::uint8_t>(rows);
  return config;
}
constexpr TileConfig kForRows[kFewRows] = {ForRows(1), ForRows(2), ForRows(3), ForRows(4),
                                           ForRows(5), ForRows(6), ForRows(7), ForRows(8)};

// A register takes every fourth line of a step's 4 KiB, and each step begins a page of its own: the hardware would
// not guess what comes next.
[[gnu::always_inline]] inline void Fetch(const char* at) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm_prefetch(at + 64 * i, _MM_HINT_T0);
}

// Adds [begin, end) of K of one block to registers 0 to 3.
void AddSteps(const char* x, std::int64_t row_bytes, const char* w, std::int64_t steps) {
  constexpr std::int64_t kAhead = 2 * kStepBytes;
  constexpr std::int64_t kStride = kBlockCols * 4;
  for (std::int64_t i = 0; i < steps; ++i, x += kTileRowBytes, w += kStepBytes) {
    _tile_loadd(4, x, row_bytes);
    _tile_loadd(5, w, kStride);
    _tile_dpbf16ps(0, 4, 5);
    Fetch(w + kAhead);
    _tile_loadd(6, w + kTileRowBytes, kStride);
    _tile_dpbf16ps(1, 4, 6);
    Fetch(w + kAhead + 1024);
    _tile_loadd(7, w + 2 * kTileRowBytes, kStride);
    _tile_dpbf16ps(2, 4, 7);
    Fetch(w + kAhead + 2048);
    _tile_loadd(5, w + 3 * kTileRowBytes, kStride);
    _tile_dpbf16ps(3, 4, 5);
    Fetch(w + kAhead + 3072);
  }
}

}  // namespace

void AmxBf16FewRows(const std::uint16_t* x, std::int64_t x_stride, std::int64_t rows, const PackedPanel& panel,
                    float* out) {
  alignas(64) float sums[kFewRows * kBlockCols];
  constexpr int kStride = kBlockCols * 4;
  _tile_loadconfig(&kForRows[rows - 1]);
  for (std::int64_t col = 0; col < panel.cols; col += kBlockCols) {
    const std::int64_t lanes = panel.cols - col < kBlockCols ? panel.cols - col : kBlockCols;
    for (std::int64_t begin = 0; begin < panel.k; begin += panel.k_chunk) {
      const std::int64_t end = begin + panel.k_chunk < panel.k ? begin + panel.k_chunk : panel.k;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      AddSteps(reinterpret_cast<const char*>(x + begin), 2 * x_stride,
               reinterpret_cast<const char*>(panel.data + col * panel.k + begin * kBlockCols),
               (end - begin) / kTileSummed);
      _tile_stored(0, sums, kStride);
      _tile_stored(1, sums + 16, kStride);
      _tile_stored(2, sums + 32, kStride);
      _tile_stored(3, sums + 48, kStride);
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < lanes; c += 16) {
          const auto mask = static_cast<__mmask16>(lanes - c >= 16 ? 0xffff : (1 << (lanes - c)) - 1);
          float* const to = out + r * panel.cols + col + c;
          const __m512 sum = _mm512_load_ps(sums + r * kBlockCols + c);
          _mm512_mask_storeu_ps(to, mask, begin == 0 ? sum : _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sum));
        }
      }
    }
  }
  _tile_release();
}

}  // namespace kvshare::kernels

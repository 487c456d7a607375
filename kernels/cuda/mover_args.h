// What the CUDA kernels are handed that move KV, code it in bytes, and choose rows; and the codes themselves.
#pragma once

#include "kernels/cuda/row_ops_args.h"

namespace kvshare::kernels::cuda {

// Rows from slots to slots. Blocks: rows in x, layers in y.
struct CopyRowsArgs {
  std::byte* pages = nullptr;
  std::int64_t page_bytes = 0;
  std::int64_t slab_bytes = 0;
  std::int64_t row_bytes = 0;  // of one head, a multiple of 16
  int slabs_per_layer = 0;     // 2 * kv heads
  int layer_begin = 0;
  int layers = 0;
  const SlotView* from = nullptr;
  const SlotView* to = nullptr;
  std::int64_t rows = 0;
};

// Pages to or from a block of as many. Blocks: pages in x, pieces of kPieceBytes in y.
inline constexpr std::int64_t kPieceBytes = 1 << 16;
struct CopyPagesArgs {
  std::byte* pages = nullptr;
  std::int64_t page_bytes = 0;
  const std::uint32_t* index = nullptr;
  int count = 0;
  std::byte* block = nullptr;
  bool gather = true;
};

// The same through codes. Blocks: pages in x, slabs in y; a warp for each token.
struct CodePagesArgs {
  std::byte* pages = nullptr;
  std::int64_t page_bytes = 0;
  std::int64_t slab_bytes = 0;
  int slabs = 0;
  int head_dim = 0;
  DType dtype = DType::kBf16;  // of the pages; or kF16
  const std::uint32_t* index = nullptr;
  int count = 0;
  std::byte* block = nullptr;
  bool fp8 = false;
  bool quantize = true;
};

// Deviation of V. One block a row.
struct DeviationArgs {
  const float* fresh = nullptr;
  std::int64_t fresh_stride = 0;
  PageView pages;
  int head_dim = 0;
  const SlotView* stored = nullptr;
  float* out = nullptr;  // [rows, 2]: squares, cosine
  std::int64_t rows = 0;
};

// score = sqrt(squares) * mass. One thread a row.
struct ScoreArgs {
  const float* deviations = nullptr;  // [n, 2], of which the first counts
  const float* mass = nullptr;        // [n]
  float* scores = nullptr;            // [n]
  std::int64_t n = 0;
};

// The rows of greatest score. One thread a row, twice: whether it is chosen, then where it goes.
struct ChooseArgs {
  const float* scores = nullptr;  // of row i at i * stride
  int stride = 1;
  std::int64_t n = 0;
  std::int64_t count = 0;
  std::uint8_t* chosen = nullptr;  // [n]
  std::int32_t* out = nullptr;     // [count]
};

inline constexpr float kGreatestInt8 = 127.0f;
inline constexpr float kGreatestFp8 = 448.0f;

// To the nearest integer, ties to even; |x| < 2^22.
KVS_HD float RoundEven(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (x + kMagic) - kMagic;
}

// E4M3 without infinities (OCP OFP8): 1 sign, 4 exponent (bias 7), 3 mantissa bits. Requires |x| <= 448.
KVS_HD std::uint8_t Fp8Bits(float x) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const std::uint32_t sign = bits >> 24 & 0x80u;
  std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude < 0x3c800000u) {  // below 2^-6: subnormal, units of 2^-9
    float a;
    __builtin_memcpy(&a, &magnitude, sizeof a);
    return static_cast<std::uint8_t>(sign | static_cast<std::uint32_t>(RoundEven(a * 512.0f)));  // 8: the first normal
  }
  magnitude += 0x7ffffu + (magnitude >> 20 & 1u);  // to 3 mantissa bits
  return static_cast<std::uint8_t>(sign | ((magnitude >> 20) - (120u << 3)));
}

KVS_HD float FromFp8(std::uint8_t code) {
  const std::uint32_t exponent = code >> 3 & 15u, mantissa = code & 7u;
  float x;
  if (exponent == 0) {
    x = static_cast<float>(mantissa) * 0x1p-9f;
  } else {
    const std::uint32_t bits = (exponent + 120u) << 23 | mantissa << 20;
    __builtin_memcpy(&x, &bits, sizeof x);
  }
  return (code & 0x80u) != 0 ? -x : x;
}

}  // namespace kvshare::kernels::cuda

// What the bf16 attention kernels have in common: packing, softmax and folding, with AVX-512-BF16. Included by files
// that are compiled for it, each of which has its own copy.
#pragma once

#include "kernels/cpu/attention_vec_avx512.h"

namespace kvshare::kernels {
namespace {

constexpr int kPairs = kPageTokens / 2;

void Rotate(const float* q, const float* cos, const float* sin, int half, int head_dim, float scale, void* out) {
  std::uint16_t* o = static_cast<std::uint16_t*>(out);
  const __m512 by = _mm512_set1_ps(scale);
  const auto lanes = [](int left) { return static_cast<__mmask16>(left < 16 ? (1u << left) - 1 : 0xffffu); };
  const auto store = [&](int at, __mmask16 mask, __m512 x) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_mul_ps(x, by));
    _mm256_mask_storeu_epi16(o + at, mask, reinterpret_cast<__m256i>(rounded));
  };
  for (int j = 0; j < half; j += 16) {
    const __mmask16 mask = lanes(half - j);
    const __m512 a = _mm512_maskz_loadu_ps(mask, q + j);
    const __m512 b = _mm512_maskz_loadu_ps(mask, q + j + half);
    const __m512 c = _mm512_maskz_loadu_ps(mask, cos + j);
    const __m512 s = _mm512_maskz_loadu_ps(mask, sin + j);
    store(j, mask, _mm512_sub_ps(_mm512_mul_ps(a, c), _mm512_mul_ps(b, s)));
    store(j + half, mask, _mm512_add_ps(_mm512_mul_ps(b, c), _mm512_mul_ps(a, s)));
  }
  for (int j = 2 * half; j < head_dim; j += 16) {
    const __mmask16 mask = lanes(head_dim - j);
    store(j, mask, _mm512_maskz_loadu_ps(mask, q + j));
  }
}

// 16 x 16 of 32 bits: row r of the result is column r of in.
[[gnu::always_inline]] inline void Transpose16(__m512i* x) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    x[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    x[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    x[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    x[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // x[4i + c] holds, in 128-bit lane l, column 4l + c of rows 4i .. 4i + 3.
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88);       // lanes 0 2 of rows 0-3, 4-7
    const __m512i b = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);       // lanes 1 3
    const __m512i d = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);  // the same of rows 8-11, 12-15
    const __m512i e = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(a, d, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(a, d, 0xdd);
    t[4 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(b, e, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = t[i];
}

void PackKeys(const void* slab, int head_dim, void* out) {
  const std::uint32_t* k = static_cast<const std::uint32_t*>(slab);
  std::uint32_t* o = static_cast<std::uint32_t*>(out);
  const int pairs = head_dim / 2;
  for (int j = 0; j < pairs; j += 16) {
    const int width = pairs - j < 16 ? pairs - j : 16;
    const __mmask16 lanes = static_cast<__mmask16>((1u << width) - 1);
    for (int t = 0; t < kPageTokens; t += 16) {
      __m512i x[16];
      for (int r = 0; r < 16; ++r) x[r] = _mm512_maskz_loadu_epi32(lanes, k + (t + r) * pairs + j);
      Transpose16(x);
      for (int r = 0; r < width; ++r) _mm512_storeu_si512(o + (j + r) * kPageTokens + t, x[r]);
    }
  }
}

// Dimension i of the even key, then of the odd key: index vectors for _mm512_permutex2var_epi16.
alignas(64) constexpr std::uint16_t kInterleave[64] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                       8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
                                                       16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};

bool PackValues(const void* slab, int head_dim, std::uint64_t keep, void* out) {
  const std::uint16_t* v = static_cast<const std::uint16_t*>(slab);
  std::uint32_t* o = static_cast<std::uint32_t*>(out);
  const int padded = (head_dim + 15) / 16 * 16;
  const __m512i low = _mm512_load_si512(kInterleave);
  const __m512i high = _mm512_load_si512(kInterleave + 32);
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 bad = 0;
  for (int j = 0; j < head_dim; j += 32) {
    const int width = head_dim - j < 32 ? head_dim - j : 32;
    const __mmask32 lanes = static_cast<__mmask32>((std::uint64_t{1} << width) - 1);
    for (int i = 0; i < kPairs; ++i) {
      const std::uint16_t* even = v + 2 * i * head_dim + j;
      const __m512i a = _mm512_maskz_loadu_epi16((keep >> (2 * i)) & 1 ? lanes : 0, even);
      const __m512i b = _mm512_maskz_loadu_epi16((keep >> (2 * i + 1)) & 1 ? lanes : 0, even + head_dim);
      bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(a, exponent), exponent);
      bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(b, exponent), exponent);
      _mm512_storeu_si512(o + i * padded + j, _mm512_permutex2var_epi16(a, low, b));
      if (width > 16) _mm512_storeu_si512(o + i * padded + j + 16, _mm512_permutex2var_epi16(a, high, b));
    }
  }
  return bad == 0;
}

// Moves the row's reference to its greatest score and scales what it has; with no key before, that becomes zeros.
[[gnu::noinline]] float MoveReference(const __m512* s, const __mmask16* seen, int vecs, int padded, float* out,
                                      float* sum, float* max) {
  __m512 top = _mm512_set1_ps(-__builtin_inff());
  for (int c = 0; c < vecs; ++c) top = _mm512_mask_max_ps(top, seen[c], top, s[c]);
  const float next = _mm512_reduce_max_ps(top);
  if (*max != -__builtin_inff()) {
    const __m512 alpha = Avx512Vec::Exp2(_mm512_set1_ps(*max - next));
    for (int j = 0; j < padded; j += 16) _mm512_storeu_ps(out + j, _mm512_mul_ps(_mm512_loadu_ps(out + j), alpha));
    _mm512_storeu_ps(sum, _mm512_mul_ps(_mm512_loadu_ps(sum), alpha));
  } else {
    for (int j = 0; j < padded; j += 16) _mm512_storeu_ps(out + j, _mm512_setzero_ps());
    _mm512_storeu_ps(sum, _mm512_setzero_ps());
  }
  *max = next;
  return next;
}

// One row's scores to weights in bf16; its sum takes the weights before they are rounded.
template <int N>
[[gnu::always_inline]] inline void SoftmaxRow(const float* scores, std::uint64_t mask, int padded, float* out,
                                              float* sum, float* max, std::uint32_t* weights) {
  __m512 s[N];
  __mmask16 seen[N];
  for (int c = 0; c < N; ++c) s[c] = _mm512_load_ps(scores + 16 * c);
  for (int c = 0; c < N; ++c) seen[c] = static_cast<__mmask16>(mask >> (16 * c));
  float m = *max;
  const __m512 limit = _mm512_set1_ps(m + kMaxSlack);
  unsigned above = 0;
  for (int c = 0; c < N; ++c) above |= _mm512_mask_cmp_ps_mask(seen[c], s[c], limit, _CMP_NLE_UQ);
  if (above != 0) m = MoveReference(s, seen, N, padded, out, sum, max);
  const __m512 reference = _mm512_set1_ps(m);
  __m512 total = _mm512_loadu_ps(sum);
  for (int c = 0; c < N; ++c) {
    s[c] = _mm512_maskz_mov_ps(seen[c], Avx512Vec::Exp2(_mm512_sub_ps(s[c], reference)));
    total = _mm512_add_ps(total, s[c]);
  }
  _mm512_storeu_ps(sum, total);
  for (int c = 0; c < N; c += 2) {
    const __m512 odd = c + 1 < N ? s[c + 1 < N ? c + 1 : c] : _mm512_setzero_ps();
    _mm512_store_si512(weights + 8 * c, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, s[c])));
  }
}

// Rows of a tile's scores to where AttentionMass wants them.
void CopyScores(const float* block, int rows, float* s, std::int64_t stride) {
  for (int r = 0; r < rows; ++r) __builtin_memcpy(s + r * stride, block + r * kPageTokens, kPageTokens * sizeof(float));
}

struct FoldVec : Avx512Vec {
  static constexpr int kVecs = 1;
};

// A kernel of these parts and its own products.
constexpr AttentionKernel KernelWith(decltype(AttentionKernel::add_tile) add_tile,
                                     decltype(AttentionKernel::add_page) add_page,
                                     decltype(AttentionKernel::scores) scores,
                                     decltype(AttentionKernel::release) release) {
  using Folded = F32Attention<FoldVec>;
  return {sizeof(std::uint16_t), &Rotate,         &PackKeys, &PackValues,      add_tile, add_page,
          &Folded::Fold,         &Folded::Finish, scores,    &Folded::AddMass, release};
}

}  // namespace
}  // namespace kvshare::kernels

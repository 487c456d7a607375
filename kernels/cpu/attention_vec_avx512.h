// Vectors of 16 fp32 for attention. For files compiled with AVX-512's flags, each of which has its own copy.
#pragma once

#include <immintrin.h>

#include "kernels/cpu/attention_f32.h"

namespace kvshare::kernels {
namespace {

struct Avx512Vec {
  using Reg = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kRows = 6;  // 6 x 4 sums, 4 keys, 1 query: 29 of 32 registers
  static constexpr int kVecs = 4;

  static Reg Zero() { return _mm512_setzero_ps(); }
  static Reg Set1(float x) { return _mm512_set1_ps(x); }
  static Reg Load(const float* p) { return _mm512_loadu_ps(p); }
  static void Store(float* p, Reg r) { _mm512_storeu_ps(p, r); }
  static Reg Add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg Sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg Mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg MulAdd(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg Max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg Select(std::uint64_t bits, Reg a, Reg b) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), b, a);
  }
  // Also true for NaN, which thereby reaches the reference and the answer.
  static bool AnyAbove(Reg a, Reg b, std::uint64_t bits) {
    return _mm512_mask_cmp_ps_mask(static_cast<__mmask16>(bits), a, b, _CMP_NLE_UQ) != 0;
  }
  static float ReduceMax(Reg r) { return _mm512_reduce_max_ps(r); }
  static float First(Reg r) { return _mm512_cvtss_f32(r); }
  static Reg Exp2(Reg x) {
    x = _mm512_max_ps(_mm512_set1_ps(-1000.0f), x);  // -inf - -inf would be NaN; NaN passes
    const Reg n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Reg f = _mm512_sub_ps(x, n);
    Reg p = _mm512_set1_ps(kExp2C5);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2C4));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2C3));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2C2));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2C1));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
  }
};

}  // namespace
}  // namespace kvshare::kernels

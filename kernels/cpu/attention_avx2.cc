// Attention tiles in fp32 with AVX2 and FMA. Compiled with -mavx2 -mfma.
#include <immintrin.h>

#include "kernels/cpu/attention_f32.h"

namespace kvshare::kernels {
namespace {

struct Avx2Vec {
  using Reg = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kRows = 6;  // 6 x 2 sums, 2 keys, 1 query: 15 of 16 registers
  static constexpr int kVecs = 2;

  static Reg Zero() { return _mm256_setzero_ps(); }
  static Reg Set1(float x) { return _mm256_set1_ps(x); }
  static Reg Load(const float* p) { return _mm256_loadu_ps(p); }
  static void Store(float* p, Reg r) { _mm256_storeu_ps(p, r); }
  static Reg Add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg Sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg Mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg MulAdd(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg Max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static __m256 Lanes(std::uint64_t bits) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits & 255)), each);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, each));
  }
  static Reg Select(std::uint64_t bits, Reg a, Reg b) { return _mm256_blendv_ps(b, a, Lanes(bits)); }
  // Also true for NaN, which thereby reaches the reference and the answer.
  static bool AnyAbove(Reg a, Reg b, std::uint64_t bits) {
    return (static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ))) & bits) != 0;
  }
  static float ReduceMax(Reg r) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  static float First(Reg r) { return _mm256_cvtss_f32(r); }
  static Reg Exp2(Reg x) {
    x = _mm256_max_ps(_mm256_set1_ps(-127.0f), x);  // 2^-127 becomes 0 below; NaN passes
    const Reg n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Reg f = _mm256_sub_ps(x, n);
    Reg p = _mm256_set1_ps(kExp2C5);
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2C4));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2C3));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2C2));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2C1));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)));
  }
};

constexpr AttentionKernel kBf16 = F32Attention<Avx2Vec>::Make<std::uint16_t>();
constexpr AttentionKernel kF32 = F32Attention<Avx2Vec>::Make<float>();

}  // namespace

const AttentionKernel& Avx2Attention(DType pages) { return pages == DType::kBf16 ? kBf16 : kF32; }

}  // namespace kvshare::kernels

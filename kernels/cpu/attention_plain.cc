// Attention tiles with the compiler's own 4-lane vectors: correct on every machine, fast on none.
#include "kernels/cpu/attention_f32.h"

namespace kvshare::kernels {
namespace {

struct PlainVec {
  typedef float Reg __attribute__((vector_size(16)));
  typedef std::int32_t Int __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;
  static constexpr int kRows = 4;
  static constexpr int kVecs = 2;

  static Reg Zero() { return Reg{}; }
  static Reg Set1(float x) { return Reg{x, x, x, x}; }
  static Reg Load(const float* p) {
    Reg r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
  }
  static void Store(float* p, Reg r) { __builtin_memcpy(p, &r, sizeof r); }
  static Reg Add(Reg a, Reg b) { return a + b; }
  static Reg Sub(Reg a, Reg b) { return a - b; }
  static Reg Mul(Reg a, Reg b) { return a * b; }
  static Reg MulAdd(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg Blend(Int m, Reg a, Reg b) { return (Reg)((m & (Int)a) | (~m & (Int)b)); }
  static Reg Max(Reg a, Reg b) { return Blend(a > b, a, b); }
  static Int Lanes(std::uint64_t bits) {
    const std::int32_t b = static_cast<std::int32_t>(bits & 15);
    const Int each = {1, 2, 4, 8};
    return (Int{b, b, b, b} & each) == each;
  }
  static Reg Select(std::uint64_t bits, Reg a, Reg b) { return Blend(Lanes(bits), a, b); }
  // Also true for NaN, which thereby reaches the reference and the answer.
  static bool AnyAbove(Reg a, Reg b, std::uint64_t bits) {
    const Int m = ~(a <= b) & Lanes(bits);
    return (m[0] | m[1] | m[2] | m[3]) != 0;
  }
  static float ReduceMax(Reg r) {
    float m = r[0];
    for (int i = 1; i < kWidth; ++i) m = r[i] > m || r[i] != r[i] ? r[i] : m;
    return m;
  }
  static float First(Reg r) { return r[0]; }
  static Reg Exp2(Reg x) {
    x = Blend(x < Set1(-127.0f), Set1(-127.0f), x);  // 2^-127 becomes 0 below
    const Reg magic = Set1(12582912.0f);             // 1.5 * 2^23: adding it rounds to an integer
    const Reg n = (x + magic) - magic;
    const Reg f = x - n;
    Reg p = Set1(kExp2C5);
    p = p * f + Set1(kExp2C4);
    p = p * f + Set1(kExp2C3);
    p = p * f + Set1(kExp2C2);
    p = p * f + Set1(kExp2C1);
    p = p * f + Set1(1.0f);
    return p * (Reg)((__builtin_convertvector(n, Int) + 127) << 23);
  }
};

constexpr AttentionKernel kBf16 = F32Attention<PlainVec>::Make<std::uint16_t>();
constexpr AttentionKernel kF32 = F32Attention<PlainVec>::Make<float>();

}  // namespace

const AttentionKernel& PlainAttention(DType pages) { return pages == DType::kBf16 ? kBf16 : kF32; }

}  // namespace kvshare::kernels

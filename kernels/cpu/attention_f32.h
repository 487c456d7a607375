// Attention tiles in fp32 arithmetic, written once over a vector type V; included by the plain, avx2 and avx512
// implementations only. V gives: Reg, kWidth, kRows and kVecs (register tile: kRows rows x kVecs vectors), and the
// operations used below. All loops run in a fixed order per element, so a row's bits do not depend on its companions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/attention_kernel.h"

namespace kvshare::kernels {

// The unnamed namespace is deliberate in this header: each includer is built with other instruction-set flags.
namespace {  // NOLINT

// 2^f on [-0.5, 0.5]: 1 + f (c1 + f (c2 + ...)), minimax for the relative error with the constant term held at 1 so
// that 2^0 == 1 exactly. Error of the polynomial: 1.1e-7 (about 1 ulp), found by iteratively reweighted least squares.
inline constexpr float kExp2C1 = 0.693147004f;
inline constexpr float kExp2C2 = 0.240222424f;
inline constexpr float kExp2C3 = 0.0555073358f;
inline constexpr float kExp2C4 = 0.00967151299f;
inline constexpr float kExp2C5 = 0.00132647273f;

inline float FloatFromBf16(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}

// Round to nearest even; NaN stays NaN.
inline std::uint16_t Bf16FromFloat(float f) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &f, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// A slab of the page to come, into L2: slabs lie too far apart for the hardware to guess the next one. Inlined by
// force, because GCC 12 takes a function of prefetches for one without effect and drops the calls.
[[gnu::always_inline]] inline void FetchSlab(const void* slab, int bytes) {
  if (slab == nullptr) return;
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(slab) + i, 0, 2);
}

inline float Widen(float x) { return x; }
inline float Widen(std::uint16_t x) { return FloatFromBf16(x); }

template <class V>
struct F32Attention {
  using Reg = typename V::Reg;
  static constexpr int kWidth = V::kWidth;
  static constexpr int kBlock = V::kWidth * V::kVecs;  // keys (or dimensions) of one register tile
  static_assert(kPageTokens % kBlock == 0);

  static void Rotate(const float* q, const float* cos, const float* sin, int half, int head_dim, float scale,
                     void* out) {
    float* o = static_cast<float*>(out);
    for (int j = 0; j < half; ++j) {
      const float a = q[j];
      const float b = q[j + half];
      o[j] = (a * cos[j] - b * sin[j]) * scale;
      o[j + half] = (b * cos[j] + a * sin[j]) * scale;
    }
    for (int j = 2 * half; j < head_dim; ++j) o[j] = q[j] * scale;
  }

  // 8 dimensions of all 64 keys at a time: one cache line of K feeds whole lines of the transposed tile.
  template <typename T>
  static void PackKeys(const void* slab, int head_dim, void* out) {
    const T* k = static_cast<const T*>(slab);
    float* o = static_cast<float*>(out);
    for (int j0 = 0; j0 < head_dim; j0 += 8) {
      for (int t = 0; t < kPageTokens; ++t) {
        for (int j = 0; j < 8; ++j) o[(j0 + j) * kPageTokens + t] = Widen(k[t * head_dim + j0 + j]);
      }
    }
  }

  template <typename T>
  static bool PackValues(const void* slab, int head_dim, std::uint64_t keep, void* out) {
    const T* v = static_cast<const T*>(slab);
    const int padded = (head_dim + 15) / 16 * 16;
    float* o = static_cast<float*>(out);
    std::uint32_t bad = 0;
    for (int t = 0; t < kPageTokens; ++t, o += padded) {
      const bool kept = (keep >> t) & 1;
      for (int j = 0; j < head_dim; ++j) {
        const float x = kept ? Widen(v[t * head_dim + j]) : 0.0f;
        std::uint32_t bits;
        __builtin_memcpy(&bits, &x, sizeof bits);
        bad |= (bits & 0x7f800000u) == 0x7f800000u;
        o[j] = x;
      }
      for (int j = head_dim; j < padded; ++j) o[j] = 0.0f;
    }
    return bad == 0;
  }

  // s[r][block] = q[r] . k for M rows and one block of keys.
  template <int M>
  static void Scores(const float* q, int head_dim, const float* k, float* s) {
    Reg acc[M][V::kVecs];
    for (int r = 0; r < M; ++r) {
      for (int c = 0; c < V::kVecs; ++c) acc[r][c] = V::Zero();
    }
    for (int j = 0; j < head_dim; ++j) {
      Reg b[V::kVecs];
      for (int c = 0; c < V::kVecs; ++c) b[c] = V::Load(k + j * kPageTokens + c * kWidth);
      for (int r = 0; r < M; ++r) {
        const Reg a = V::Set1(q[r * head_dim + j]);
        for (int c = 0; c < V::kVecs; ++c) acc[r][c] = V::MulAdd(a, b[c], acc[r][c]);
      }
    }
    for (int r = 0; r < M; ++r) {
      for (int c = 0; c < V::kVecs; ++c) V::Store(s + r * kPageTokens + c * kWidth, acc[r][c]);
    }
  }

  // out[r][N vectors] += p[r] . v over keys [0, keys).
  template <int M, int N>
  static void Values(const float* p, const float* v, int keys, int padded, float* out) {
    Reg acc[M][N];
    for (int r = 0; r < M; ++r) {
      for (int c = 0; c < N; ++c) acc[r][c] = V::Load(out + r * padded + c * kWidth);
    }
    for (int t = 0; t < keys; ++t) {
      Reg b[N];
      for (int c = 0; c < N; ++c) b[c] = V::Load(v + t * padded + c * kWidth);
      for (int r = 0; r < M; ++r) {
        const Reg a = V::Set1(p[r * kPageTokens + t]);
        for (int c = 0; c < N; ++c) acc[r][c] = V::MulAdd(a, b[c], acc[r][c]);
      }
    }
    for (int r = 0; r < M; ++r) {
      for (int c = 0; c < N; ++c) V::Store(out + r * padded + c * kWidth, acc[r][c]);
    }
  }

  // Scores -> weights in place; updates the row's reference, sum and, if the reference moved, its output.
  static void SoftmaxRow(float* s, std::uint64_t mask, int padded, float* out, float* sum, float* max) {
    constexpr int kVecs = kPageTokens / kWidth;
    constexpr std::uint64_t kLanes = (std::uint64_t{1} << kWidth) - 1;
    float m = *max;
    bool above = false;
    for (int c = 0; c < kVecs; ++c) {
      above |= V::AnyAbove(V::Load(s + c * kWidth), V::Set1(m + kMaxSlack), (mask >> (c * kWidth)) & kLanes);
    }
    if (above) {
      Reg top = V::Set1(-__builtin_inff());
      for (int c = 0; c < kVecs; ++c) {
        top = V::Max(top,
                     V::Select((mask >> (c * kWidth)) & kLanes, V::Load(s + c * kWidth), V::Set1(-__builtin_inff())));
      }
      const float next = V::ReduceMax(top);
      if (m != -__builtin_inff()) {
        const Reg alpha = V::Exp2(V::Set1(m - next));
        for (int j = 0; j < padded; j += kWidth) V::Store(out + j, V::Mul(V::Load(out + j), alpha));
        for (int j = 0; j < kSumLanes; j += kWidth) V::Store(sum + j, V::Mul(V::Load(sum + j), alpha));
      } else {
        for (int j = 0; j < padded; j += kWidth) V::Store(out + j, V::Zero());
        for (int j = 0; j < kSumLanes; j += kWidth) V::Store(sum + j, V::Zero());
      }
      m = *max = next;
    }
    for (int j = 0; j < kSumLanes; j += kWidth) {
      Reg lane = V::Load(sum + j);
      for (int t = j; t < kPageTokens; t += kSumLanes) {
        const Reg e = V::Exp2(V::Sub(V::Load(s + t), V::Set1(m)));
        const Reg p = V::Select((mask >> t) & kLanes, e, V::Zero());
        V::Store(s + t, p);
        lane = V::Add(lane, p);
      }
      V::Store(sum + j, lane);
    }
  }

  template <int M>
  static void AddGroup(const AttentionTile& a, int r0, float* s) {
    std::uint64_t any = 0;
    for (int r = 0; r < M; ++r) any |= a.masks[r0 + r];
    if (any == 0) return;
    const int keys = 64 - __builtin_clzll(any);
    const float* q = static_cast<const float*>(a.q) + r0 * a.head_dim;
    const float* k = static_cast<const float*>(a.k);
    const float* v = static_cast<const float*>(a.v);
    for (int t = 0; t < keys; t += kBlock) Scores<M>(q, a.head_dim, k + t, s + t);
    for (int r = 0; r < M; ++r) {
      const int row = r0 + r;
      SoftmaxRow(s + r * kPageTokens, a.masks[row], a.padded, a.state.out + row * a.padded,
                 a.state.sum + row * kSumLanes, a.state.max + row);
    }
    float* out = a.state.out + r0 * a.padded;
    int j = 0;
    for (; j + kBlock <= a.padded; j += kBlock) Values<M, V::kVecs>(s, v + j, keys, a.padded, out + j);
    for (; j < a.padded; j += kWidth) Values<M, 1>(s, v + j, keys, a.padded, out + j);
  }

  template <typename T>
  static void AddTile(const AttentionTile& a) {
    FetchSlab(a.next_k, kPageTokens * a.head_dim * static_cast<int>(sizeof(T)));
    FetchSlab(a.next_v, kPageTokens * a.head_dim * static_cast<int>(sizeof(T)));
    alignas(64) float s[V::kRows * kPageTokens] = {};
    int r = 0;
    for (; r + V::kRows <= a.rows; r += V::kRows) AddGroup<V::kRows>(a, r, s);
    for (; r < a.rows; ++r) AddGroup<1>(a, r, s);
  }

  static float SumLanes(const float* x) {
    float t[kSumLanes / 2];
    for (int i = 0; i < 8; ++i) t[i] = x[i] + x[i + 8];
    for (int i = 0; i < 4; ++i) t[i] = t[i] + t[i + 4];
    return (t[0] + t[2]) + (t[1] + t[3]);
  }

  static void Fold(const AttentionPartial& total, const AttentionPartial& part, int rows, int padded) {
    for (int r = 0; r < rows; ++r) {
      const float pm = part.max[r];
      if (pm == -__builtin_inff()) continue;
      const float sum = SumLanes(part.sum + r * kSumLanes);
      float* out = total.out + r * padded;
      const float* add = part.out + r * padded;
      float* tm = total.max + r;
      float* ts = total.sum + r * kSumLanes;
      if (*tm == -__builtin_inff()) {
        for (int j = 0; j < padded; j += kWidth) V::Store(out + j, V::Load(add + j));
        *ts = sum;
        *tm = pm;
        continue;
      }
      const float m = *tm > pm ? *tm : pm;
      const Reg a = V::Exp2(V::Set1(*tm - m));
      const Reg b = V::Exp2(V::Set1(pm - m));
      for (int j = 0; j < padded; j += kWidth) {
        V::Store(out + j, V::MulAdd(V::Load(add + j), b, V::Mul(V::Load(out + j), a)));
      }
      *ts = *ts * V::First(a) + sum * V::First(b);
      *tm = m;
    }
  }

  static void Finish(const float* out, float sum, float max, int head_dim, DType dtype, void* dst) {
    const bool none = max == -__builtin_inff();
    const float inverse = none ? 0.0f : 1.0f / sum;
    if (dtype == DType::kF32) {
      float* d = static_cast<float*>(dst);
      for (int j = 0; j < head_dim; ++j) d[j] = none ? 0.0f : out[j] * inverse + 0.0f;
    } else {
      std::uint16_t* d = static_cast<std::uint16_t*>(dst);
      for (int j = 0; j < head_dim; ++j) d[j] = none ? std::uint16_t{0} : Bf16FromFloat(out[j] * inverse + 0.0f);
    }
  }

  static void TileScores(const void* query, int rows, int head_dim, const void* keys, float* s, std::int64_t stride) {
    const float* q = static_cast<const float*>(query);
    const float* k = static_cast<const float*>(keys);
    alignas(64) float tile[V::kRows * kPageTokens] = {};
    int r = 0;
    const auto store = [&](int count) {
      for (int i = 0; i < count; ++i) {
        __builtin_memcpy(s + (r + i) * stride, tile + i * kPageTokens, kPageTokens * sizeof(float));
      }
      r += count;
    };
    while (r + V::kRows <= rows) {
      for (int t = 0; t < kPageTokens; t += kBlock) Scores<V::kRows>(q + r * head_dim, head_dim, k + t, tile + t);
      store(V::kRows);
    }
    while (r < rows) {
      for (int t = 0; t < kPageTokens; t += kBlock) Scores<1>(q + r * head_dim, head_dim, k + t, tile + t);
      store(1);
    }
  }

  static void AddMass(float* s, std::int64_t keys, float* mass) {
    Reg top = V::Set1(-__builtin_inff());
    for (std::int64_t t = 0; t < keys; t += kWidth) top = V::Max(top, V::Load(s + t));
    const float max = V::ReduceMax(top);
    if (max == -__builtin_inff()) return;
    Reg sums = V::Zero();
    for (std::int64_t t = 0; t < keys; t += kWidth) {
      const Reg w = V::Exp2(V::Sub(V::Load(s + t), V::Set1(max)));
      V::Store(s + t, w);
      sums = V::Add(sums, w);
    }
    float lanes[kWidth];
    V::Store(lanes, sums);
    float sum = 0;
    for (const float lane : lanes) sum += lane;
    const Reg scale = V::Set1(1.0f / sum);
    for (std::int64_t t = 0; t < keys; t += kWidth) {
      V::Store(mass + t, V::MulAdd(V::Load(s + t), scale, V::Load(mass + t)));
    }
  }

  template <typename T>
  static constexpr AttentionKernel Make() {
    return {sizeof(float), &Rotate, &PackKeys<T>, &PackValues<T>, &AddTile<T>,
            nullptr,       &Fold,   &Finish,      &TileScores,    &AddMass};
  }
};

}  // namespace
}  // namespace kvshare::kernels

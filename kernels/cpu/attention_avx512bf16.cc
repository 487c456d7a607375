// Attention tiles with vdpbf16ps: bf16 pages, fp32 sums. Compiled with -march=x86-64-v4 -mavx512bf16.
//
// Both products keep one lane per output element and walk the summed index in 32-bit pairs, so an element's bits
// depend on the order of the pairs only, not on how many rows share a register tile:
//   scores: lanes = 16 keys,       pairs along head_dim, query pairs broadcast
//   values: lanes = 16 dimensions, pairs along the keys, weight pairs broadcast
// Register tile: 6 rows x 4 vectors of sums, 4 vectors of operand, 1 broadcast: 29 of 32.
#include "kernels/cpu/attention_bf16.h"

namespace kvshare::kernels {
namespace {

constexpr int kRows = 6;

__m512bh AsBf16(__m512i x) { return reinterpret_cast<__m512bh>(x); }
__m512bh BroadcastPair(const std::uint32_t* p) { return AsBf16(_mm512_set1_epi32(static_cast<int>(*p))); }
__m512bh LoadPairs(const std::uint32_t* p) { return AsBf16(_mm512_loadu_si512(p)); }

// s[r][16 c ..] = q[r] . k for M rows and N vectors of keys.
template <int M, int N>
[[gnu::always_inline]] inline void Scores(const std::uint32_t* q, int pairs, const std::uint32_t* k, float* s) {
  __m512 acc[M][N];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) acc[r][c] = _mm512_setzero_ps();
  }
  for (int j = 0; j < pairs; ++j) {
    __m512bh b[N];
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) b[c] = LoadPairs(k + j * kPageTokens + 16 * c);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      const __m512bh a = BroadcastPair(q + r * pairs + j);
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], a, b[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) _mm512_store_ps(s + r * kPageTokens + 16 * c, acc[r][c]);
  }
}

// out[r][16 c ..] += p[r] . v over the first `pairs` pairs of keys.
template <int M, int N>
[[gnu::always_inline]] inline void Values(const std::uint32_t* p, const std::uint32_t* v, int pairs, int padded,
                                          float* out) {
  __m512 acc[M][N];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) acc[r][c] = _mm512_loadu_ps(out + r * padded + 16 * c);
  }
  for (int i = 0; i < pairs; ++i) {
    __m512bh b[N];
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) b[c] = LoadPairs(v + i * padded + 16 * c);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      const __m512bh a = BroadcastPair(p + r * kPairs + i);
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], a, b[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) _mm512_storeu_ps(out + r * padded + 16 * c, acc[r][c]);
  }
}

// N vectors of keys from vector `c0` on.
template <int M, int N>
void AddKeys(const AttentionTile& a, int r0, int c0) {
  alignas(64) float s[M * kPageTokens];
  alignas(64) std::uint32_t w[M * kPairs];
  const int pairs = a.head_dim / 2;
  Scores<M, N>(static_cast<const std::uint32_t*>(a.q) + r0 * pairs, pairs,
               static_cast<const std::uint32_t*>(a.k) + 16 * c0, s);
  for (int r = 0; r < M; ++r) {
    const int row = r0 + r;
    SoftmaxRow<N>(s + r * kPageTokens, a.masks[row] >> (16 * c0), a.padded, a.state.out + row * a.padded,
                  a.state.sum + row * kSumLanes, a.state.max + row, w + r * kPairs);
  }
  const std::uint32_t* v = static_cast<const std::uint32_t*>(a.v) + 8 * c0 * a.padded;
  float* out = a.state.out + r0 * a.padded;
  int j = 0;
  for (; j + 64 <= a.padded; j += 64) Values<M, 4>(w, v + j, 8 * N, a.padded, out + j);
  for (; j < a.padded; j += 16) Values<M, 1>(w, v + j, 8 * N, a.padded, out + j);
}

// M rows; of the keys only the vectors between the first and the last that any of them sees: a chunk may begin and end
// anywhere in a page.
template <int M>
void AddGroup(const AttentionTile& a, int r0) {
  std::uint64_t any = 0;
  for (int r = 0; r < M; ++r) any |= a.masks[r0 + r];
  if (any == 0) return;
  const int begin = __builtin_ctzll(any) / 16, last = (63 - __builtin_clzll(any)) / 16;
  switch (last - begin) {
    case 0: return AddKeys<M, 1>(a, r0, begin);
    case 1: return AddKeys<M, 2>(a, r0, begin);
    case 2: return AddKeys<M, 3>(a, r0, begin);
    default: return AddKeys<M, 4>(a, r0, begin);
  }
}

void AddTile(const AttentionTile& a) {
  FetchSlab(a.next_k, 2 * kPageTokens * a.head_dim);
  FetchSlab(a.next_v, 2 * kPageTokens * a.head_dim);
  int r = 0;
  for (; r + kRows <= a.rows; r += kRows) AddGroup<kRows>(a, r);
  switch (a.rows - r) {
    case 1: return AddGroup<1>(a, r);
    case 2: return AddGroup<2>(a, r);
    case 3: return AddGroup<3>(a, r);
    case 4: return AddGroup<4>(a, r);
    case 5: return AddGroup<5>(a, r);
    default: return;
  }
}

// As FetchSlab, of `lines` cache lines from `offset` on.
[[gnu::always_inline]] inline void Fetch(const void* slab, int offset, int lines) {
  if (slab == nullptr) return;
  const char* at = static_cast<const char*>(slab) + offset;
#pragma GCC unroll 16
  for (int i = 0; i < lines; ++i) _mm_prefetch(at + 64 * i, _MM_HINT_T1);
}

// The scores of 16 keys, their block of K transposed in registers.
template <int M>
void ScoreBlock(const AttentionPage& a, int block, float* s) {
  const int pairs = a.head_dim / 2;
  const std::uint32_t* q = static_cast<const std::uint32_t*>(a.q);
  const std::uint32_t* k = static_cast<const std::uint32_t*>(a.k) + 16 * block * pairs;
  __m512 acc[M];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) acc[r] = _mm512_setzero_ps();
  for (int j = 0; j < pairs; j += 16) {
    __m512i x[16];
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t) x[t] = _mm512_loadu_si512(k + t * pairs + j);
    Fetch(a.next_k, (16 * block * pairs + 16 * j) * 4, 16);
    Transpose16(x);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) acc[r] = _mm512_dpbf16_ps(acc[r], BroadcastPair(q + r * pairs + j + i), AsBf16(x[i]));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) _mm512_store_ps(s + r * kPageTokens + 16 * block, acc[r]);
}

// out += w . V for 32 C dimensions from j on, pairs of keys interleaved in registers.
template <int M, int C>
void ValueColumns(const AttentionPage& a, const std::uint32_t* w, int j) {
  const int d = a.head_dim;
  const std::uint16_t* v = static_cast<const std::uint16_t*>(a.v) + j;
  const __m512i low = _mm512_load_si512(kInterleave);
  const __m512i high = _mm512_load_si512(kInterleave + 32);
  float* out = a.state.out + j;
  __m512 acc[M][2 * C];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < 2 * C; ++c) acc[r][c] = _mm512_loadu_ps(out + r * d + 16 * c);
  }
  const int pairs = (64 - __builtin_clzll(a.mask) + 1) / 2;
  for (int i = 0; i < pairs; ++i) {
    const __mmask32 even = (a.mask >> (2 * i)) & 1 ? ~__mmask32{0} : 0;
    const __mmask32 odd = (a.mask >> (2 * i + 1)) & 1 ? ~__mmask32{0} : 0;
    __m512bh b[2 * C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      const __m512i x = _mm512_maskz_loadu_epi16(even, v + 2 * i * d + 32 * c);
      const __m512i y = _mm512_maskz_loadu_epi16(odd, v + (2 * i + 1) * d + 32 * c);
      b[2 * c] = AsBf16(_mm512_permutex2var_epi16(x, low, y));
      b[2 * c + 1] = AsBf16(_mm512_permutex2var_epi16(x, high, y));
    }
    Fetch(a.next_v, (2 * i * d + j * 2) * 2, 2 * C);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      const __m512bh p = BroadcastPair(w + r * kPairs + i);
#pragma GCC unroll 8
      for (int c = 0; c < 2 * C; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], p, b[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < 2 * C; ++c) _mm512_storeu_ps(out + r * d + 16 * c, acc[r][c]);
  }
}

template <int M>
bool AddPageRows(const AttentionPage& a) {
  alignas(64) float s[M * kPageTokens] = {};
  alignas(64) std::uint32_t w[M * kPairs];
  const int blocks = (63 - __builtin_clzll(a.mask)) / 16 + 1;
  for (int b = 0; b < blocks; ++b) ScoreBlock<M>(a, b, s);
  for (int r = 0; r < M; ++r) {
    SoftmaxRow<4>(s + r * kPageTokens, a.mask, a.head_dim, a.state.out + r * a.head_dim, a.state.sum + r * kSumLanes,
                  a.state.max + r, w + r * kPairs);
  }
  // With few rows, wide columns keep enough sums in flight; with many, narrow ones keep them in registers.
  constexpr int kColumns = M <= 4 ? 2 : 1;
  int j = 0;
  for (; j + 32 * kColumns <= a.head_dim; j += 32 * kColumns) ValueColumns<M, kColumns>(a, w, j);
  for (; j < a.head_dim; j += 32) ValueColumns<M, 1>(a, w, j);
  return true;
}

bool AddPage(const AttentionPage& a) {
  if (a.head_dim % 32 != 0) return false;
  if (a.mask == 0) return true;
  switch (a.rows) {
    case 1: return AddPageRows<1>(a);
    case 2: return AddPageRows<2>(a);
    case 3: return AddPageRows<3>(a);
    case 4: return AddPageRows<4>(a);
    case 5: return AddPageRows<5>(a);
    case 6: return AddPageRows<6>(a);
    case 7: return AddPageRows<7>(a);
    case 8: return AddPageRows<8>(a);
    default: return false;
  }
}

void TileScores(const void* query, int rows, int head_dim, const void* k, float* s, std::int64_t stride) {
  alignas(64) float block[kRows * kPageTokens];
  const int pairs = head_dim / 2;
  const std::uint32_t* q = static_cast<const std::uint32_t*>(query);
  const std::uint32_t* keys = static_cast<const std::uint32_t*>(k);
  int r = 0;
  for (; r + kRows <= rows; r += kRows) {
    Scores<kRows, 4>(q + r * pairs, pairs, keys, block);
    CopyScores(block, kRows, s + r * stride, stride);
  }
  for (; r < rows; ++r) {
    Scores<1, 4>(q + r * pairs, pairs, keys, block);
    CopyScores(block, 1, s + r * stride, stride);
  }
}

constexpr AttentionKernel kKernel = KernelWith(&AddTile, &AddPage, &TileScores, nullptr);

}  // namespace

const AttentionKernel& Avx512Bf16Attention() { return kKernel; }

}  // namespace kvshare::kernels

// Attention tiles with AMX's tdpbf16ps: bf16 pages, fp32 sums. Compiled with AVX-512-BF16's flags, -mamx-tile and
// -mamx-bf16.
//
// One instruction multiplies 16 rows by 16 columns over 32 summed elements. An output element's bits depend on the
// order in which blocks of 32 are added only: even and odd elements are summed apart within a block, and the block's
// sum is added to what was there. So neither the number of rows nor which operand is the left one changes them, and
// one token's rows, for which keys are the left operand as they lie in the pool, get a tile's bits.
// The rest is as in attention_avx512bf16.cc, in the same packed forms.
#include "kernels/cpu/amx_tiles.h"
#include "kernels/cpu/attention_bf16.h"

namespace kvshare::kernels {
namespace {

constexpr TileConfig kWhole = WholeTiles();

// Loading a configuration takes longer than a product: a thread keeps the one it has until its task is over.
thread_local const TileConfig* loaded = nullptr;

void Use(const TileConfig& config) {
  if (loaded == &config) return;
  _tile_loadconfig(&config);
  loaded = &config;
}

void Release() {
  if (loaded == nullptr) return;
  _tile_release();
  loaded = nullptr;
}

// s[r][16 c ..] = q[r] . k for 16 rows and N blocks of 16 keys.
template <int N>
void Scores(const char* q, int head_dim, const char* k, float* s) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (N == 4) {
    _tile_zero(2);
    _tile_zero(3);
  }
  constexpr int kStride = kPageTokens * 4;
  for (int j = 0; j < head_dim; j += kTileSummed, k += kTileRows * kStride) {
    _tile_loadd(4, q + 2 * j, 2 * head_dim);
    _tile_loadd(5, k, kStride);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, k + kTileRowBytes, kStride);
    _tile_dpbf16ps(1, 4, 6);
    if constexpr (N == 4) {
      _tile_loadd(7, k + 2 * kTileRowBytes, kStride);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, k + 3 * kTileRowBytes, kStride);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, s, kStride);
  _tile_stored(1, s + kTileRows, kStride);
  if constexpr (N == 4) {
    _tile_stored(2, s + 2 * kTileRows, kStride);
    _tile_stored(3, s + 3 * kTileRows, kStride);
  }
}

// out[r][..] += w[r] . v over 16 N keys, a multiple of 32. Registers 4 and 5 hold w.
template <int N>
void Values(const std::uint32_t* w, const char* v, int padded, float* out) {
  const int stride = 4 * padded;
  _tile_loadd(4, w, 4 * kPairs);
  if constexpr (N == 4) _tile_loadd(5, w + kTileRows, 4 * kPairs);
  for (int j = 0; j < padded; j += 2 * kTileRows, v += 2 * kTileRowBytes, out += 2 * kTileRows) {
    _tile_loadd(0, out, stride);
    _tile_loadd(1, out + kTileRows, stride);
    _tile_loadd(6, v, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, v + kTileRowBytes, stride);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (N == 4) {
      _tile_loadd(6, v + kTileRows * stride, stride);
      _tile_dpbf16ps(0, 5, 6);
      _tile_loadd(7, v + kTileRows * stride + kTileRowBytes, stride);
      _tile_dpbf16ps(1, 5, 7);
    }
    _tile_stored(0, out, stride);
    _tile_stored(1, out + kTileRows, stride);
  }
}

constexpr int kMaxHeadDim = 256;

// Fetches the next page little by little: what waits for memory in one go computes nothing meanwhile.
class Ahead {
 public:
  Ahead(const void* next_k, const void* next_v, int head_dim)
      : k_(static_cast<const char*>(next_k)),
        v_(static_cast<const char*>(next_v)),
        lines_(next_k == nullptr ? 0 : kPageTokens * head_dim * 2 / 64) {}

  int left() const { return 2 * lines_ - next_; }
  // N divides a slab's lines.
  template <int N>
  [[gnu::always_inline]] void Lines() {
    if (next_ >= 2 * lines_) return;
    const char* at = next_ < lines_ ? k_ + 64 * next_ : v_ + 64 * (next_ - lines_);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) _mm_prefetch(at + 64 * i, _MM_HINT_T1);
    next_ += N;
  }

 private:
  const char* k_;
  const char* v_;
  int lines_;  // of a slab
  int next_ = 0;
};

// Two blocks of rows go through each step together: a product that reads weights which were written just before waits
// until they have reached the cache.
constexpr int kRows = 2 * kTileRows;
constexpr int kLinesPerRow = 2;  // of the next page, fetched beside each row's softmax

// `rows` <= kRows rows over N blocks of 16 keys from block c0 on, which is even.
template <int N>
void AddKeys(const AttentionTile& a, int r0, int rows, int c0, Ahead& ahead) {
  alignas(64) float s[kRows * kPageTokens];
  alignas(64) std::uint32_t w[kRows * kPairs];
  // Registers have 16 rows: the last ones of a tile are computed beside rows of no meaning, in buffers of their own.
  alignas(64) char few_q[kTileRows * kMaxHeadDim * 2];
  alignas(64) float few_out[kTileRows * kMaxHeadDim];
  const int whole = rows / kTileRows * kTileRows;
  const int few = rows - whole;
  const char* q = static_cast<const char*>(a.q) + 2 * r0 * a.head_dim;
  const char* k = static_cast<const char*>(a.k) + kTileRowBytes * c0;
  for (int r = 0; r < whole; r += kTileRows) Scores<N>(q + 2 * r * a.head_dim, a.head_dim, k, s + r * kPageTokens);
  if (few > 0) {
    __builtin_memcpy(few_q, q + 2 * whole * a.head_dim, static_cast<std::size_t>(2 * few * a.head_dim));
    Scores<N>(few_q, a.head_dim, k, s + whole * kPageTokens);
  }
  float* out = a.state.out + r0 * a.padded;
  for (int r = 0; r < rows; ++r) {
    SoftmaxRow<N>(s + r * kPageTokens, a.masks[r0 + r] >> (16 * c0), a.padded, out + r * a.padded,
                  a.state.sum + (r0 + r) * kSumLanes, a.state.max + r0 + r, w + r * kPairs);
    ahead.Lines<kLinesPerRow>();
  }
  const char* v = static_cast<const char*>(a.v) + 4 * 8 * c0 * a.padded;
  for (int r = 0; r < whole; r += kTileRows) Values<N>(w + r * kPairs, v, a.padded, out + r * a.padded);
  if (few > 0) {
    const std::size_t bytes = static_cast<std::size_t>(few * a.padded) * sizeof(float);
    __builtin_memcpy(few_out, out + whole * a.padded, bytes);
    Values<N>(w + whole * kPairs, v, a.padded, few_out);
    __builtin_memcpy(out + whole * a.padded, few_out, bytes);
  }
}

void AddTile(const AttentionTile& a) {
  Use(kWhole);
  Ahead ahead(a.next_k, a.next_v, a.head_dim);
  while (ahead.left() > kLinesPerRow * a.rows) ahead.Lines<8>();  // few rows: their softmaxes leave no time for all
  for (int r = 0; r < a.rows; r += kRows) {
    const int rows = a.rows - r < kRows ? a.rows - r : kRows;
    std::uint64_t any = 0;
    for (int i = 0; i < rows; ++i) any |= a.masks[r + i];
    if (any == 0) continue;
    if (any >> 32 == 0) {
      AddKeys<2>(a, r, rows, 0, ahead);
    } else if (static_cast<std::uint32_t>(any) == 0) {
      AddKeys<2>(a, r, rows, 2, ahead);
    } else {
      AddKeys<4>(a, r, rows, 0, ahead);
    }
  }
}

constexpr int kMaxPageRows = 8;
constexpr int kFour = 4;  // rows whose scores are computed at once: the right operand's columns

// For one token's rows: registers 0 and 1 are scores [16 keys][4 rows], 2 queries, 3 sums, 4 and 5 weights.
constexpr TileConfig ForPage(int rows) {
  TileConfig config = WholeTiles();
  for (const int t : {0, 1, 2}) config.row_bytes[t] = kFour * 4;
  for (const int t : {3, 4, 5}) config.rows[t] = static_cast<std::uint8_t>(rows);
  return config;
}
constexpr TileConfig kForPage[kMaxPageRows] = {ForPage(1), ForPage(2), ForPage(3), ForPage(4),
                                               ForPage(5), ForPage(6), ForPage(7), ForPage(8)};

// Pairs of four rows side by side, [pairs][4]: rows that are not there are zeros.
void PackFourQueries(const std::uint32_t* q, int rows, int pairs, std::uint32_t* out) {
  for (int j = 0; j < pairs; j += 4, out += 16) {
    __m128 x[kFour];
    for (int r = 0; r < kFour; ++r) {
      x[r] = r < rows ? _mm_loadu_ps(reinterpret_cast<const float*>(q + r * pairs + j)) : _mm_setzero_ps();
    }
    _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
    for (int i = 0; i < 4; ++i) _mm_store_ps(reinterpret_cast<float*>(out) + 4 * i, x[i]);
  }
}

// s[r][..] for four rows from t[key][4].
void UnpackFourScores(const float* t, float* s) {
  const __m512i low = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(2));
  for (int c = 0; c < kPageTokens; c += 16, t += 64) {
    const __m512 x0 = _mm512_load_ps(t), x1 = _mm512_load_ps(t + 16);
    const __m512 x2 = _mm512_load_ps(t + 32), x3 = _mm512_load_ps(t + 48);
    const __m512 a = _mm512_permutex2var_ps(x0, low, x1), b = _mm512_permutex2var_ps(x2, low, x3);
    const __m512 d = _mm512_permutex2var_ps(x0, high, x1), e = _mm512_permutex2var_ps(x2, high, x3);
    _mm512_store_ps(s + c, _mm512_shuffle_f32x4(a, b, 0x44));
    _mm512_store_ps(s + kPageTokens + c, _mm512_shuffle_f32x4(a, b, 0xee));
    _mm512_store_ps(s + 2 * kPageTokens + c, _mm512_shuffle_f32x4(d, e, 0x44));
    _mm512_store_ps(s + 3 * kPageTokens + c, _mm512_shuffle_f32x4(d, e, 0xee));
  }
}

// Four rows over a page: keys are the left operand, as they lie in the pool.
void ScoreFour(const AttentionPage& a, const std::uint32_t* q, float* s, Ahead& ahead) {
  alignas(64) float t[kPageTokens * kFour];
  const int key_bytes = 2 * a.head_dim;
  const char* keys = static_cast<const char*>(a.k);
  for (int c = 0; c < kPageTokens; c += 2 * kTileRows, keys += 2 * kTileRows * key_bytes) {
    _tile_zero(0);
    _tile_zero(1);
    for (int j = 0; j < a.head_dim; j += kTileSummed) {
      _tile_loadd(2, q + j / 2 * kFour, 4 * kFour);
      _tile_loadd(6, keys + 2 * j, key_bytes);
      _tile_dpbf16ps(0, 6, 2);
      ahead.Lines<8>();
      _tile_loadd(7, keys + kTileRows * key_bytes + 2 * j, key_bytes);
      _tile_dpbf16ps(1, 7, 2);
      ahead.Lines<8>();
    }
    _tile_stored(0, t + c * kFour, 4 * kFour);
    _tile_stored(1, t + (c + kTileRows) * kFour, 4 * kFour);
  }
  UnpackFourScores(t, s);
}

// As PackValues, for finite and other values alike: what no row sees becomes zeros.
void InterleaveValues(const AttentionPage& a, std::uint32_t* out, Ahead& ahead) {
  const std::uint16_t* v = static_cast<const std::uint16_t*>(a.v);
  const __m512i low = _mm512_load_si512(kInterleave);
  const __m512i high = _mm512_load_si512(kInterleave + 32);
  const int d = a.head_dim;
  for (int i = 0; i < kPairs; ++i, v += 2 * d, out += d) {
    const __mmask32 even = (a.mask >> (2 * i)) & 1 ? ~__mmask32{0} : 0;
    const __mmask32 odd = (a.mask >> (2 * i + 1)) & 1 ? ~__mmask32{0} : 0;
    for (int j = 0; j < d; j += 32) {
      const __m512i x = _mm512_maskz_loadu_epi16(even, v + j);
      const __m512i y = _mm512_maskz_loadu_epi16(odd, v + d + j);
      _mm512_store_si512(out + j, _mm512_permutex2var_epi16(x, low, y));
      _mm512_store_si512(out + j + 16, _mm512_permutex2var_epi16(x, high, y));
      ahead.Lines<2>();
    }
  }
}

bool AddPage(const AttentionPage& a) {
  if (a.rows > kMaxPageRows) return false;
  if (a.mask == 0) return true;
  alignas(64) float s[kMaxPageRows * kPageTokens];
  alignas(64) std::uint32_t w[kMaxPageRows * kPairs];
  alignas(64) std::uint32_t q[kMaxHeadDim / 2 * kFour];
  alignas(64) std::uint32_t v[kPairs * kMaxHeadDim];
  const int pairs = a.head_dim / 2;
  Ahead ahead(a.next_k, a.next_v, a.head_dim);
  Use(kForPage[a.rows - 1]);
  for (int r = 0; r < a.rows; r += kFour) {
    PackFourQueries(static_cast<const std::uint32_t*>(a.q) + r * pairs, a.rows - r, pairs, q);
    ScoreFour(a, q, s + r * kPageTokens, ahead);
  }
  for (int r = 0; r < a.rows; ++r) {
    SoftmaxRow<4>(s + r * kPageTokens, a.mask, a.head_dim, a.state.out + r * a.head_dim, a.state.sum + r * kSumLanes,
                  a.state.max + r, w + r * kPairs);
    ahead.Lines<8>();
  }
  InterleaveValues(a, v, ahead);
  const int stride = 4 * a.head_dim;
  const char* values = reinterpret_cast<const char*>(v);
  _tile_loadd(4, w, 4 * kPairs);
  _tile_loadd(5, w + kTileRows, 4 * kPairs);
  for (int j = 0; j < a.head_dim; j += kTileRows, values += kTileRowBytes) {
    _tile_loadd(3, a.state.out + j, stride);
    _tile_loadd(6, values, stride);
    _tile_dpbf16ps(3, 4, 6);
    ahead.Lines<8>();
    _tile_loadd(7, values + kTileRows * stride, stride);
    _tile_dpbf16ps(3, 5, 7);
    ahead.Lines<8>();
    _tile_stored(3, a.state.out + j, stride);
  }
  return true;
}

void TileScores(const void* query, int rows, int head_dim, const void* k, float* s, std::int64_t stride) {
  Use(kWhole);
  alignas(64) float block[kTileRows * kPageTokens];
  alignas(64) char few_q[kTileRows * kMaxHeadDim * 2];
  const char* q = static_cast<const char*>(query);
  for (int r = 0; r < rows; r += kTileRows, q += 2 * kTileRows * head_dim) {
    const int count = rows - r < kTileRows ? rows - r : kTileRows;
    if (count < kTileRows) __builtin_memcpy(few_q, q, static_cast<std::size_t>(2 * count * head_dim));
    Scores<4>(count < kTileRows ? few_q : q, head_dim, static_cast<const char*>(k), block);
    CopyScores(block, count, s + r * stride, stride);
  }
}

constexpr AttentionKernel kKernel = KernelWith(&AddTile, &AddPage, &TileScores, &Release);

}  // namespace

const AttentionKernel& AmxBf16Attention() { return kKernel; }

}  // namespace kvshare::kernels

// What one instruction set contributes to attention: six functions over packed tiles, with PODs and raw pointers
// only, because each implementation is compiled with flags of its own (no inline library code may leak out of it).
//
// Words: a "row" here is one query head of one token; a "tile" is the 64 keys of one page for one kv head.
// Packed forms, with E the element (bf16 pair-interleaved, or fp32) chosen by the implementation:
//   query  [rows][head_dim]                rotated, times scale * log2(e)
//   keys   fp32: [head_dim][64]            bf16: [head_dim / 2][64] pairs along head_dim
//   values fp32: [64][padded]              bf16: [32][padded] pairs along the keys;  padded = round_up(head_dim, 16)
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/backend.h"

namespace kvshare::kernels {

inline constexpr int kSumLanes = 16;  // row sums are kept by (key mod 16) and added up once, in a fixed tree

// Online softmax of some rows over the keys of one split so far: sum of 2^(s - max) and of 2^(s - max) v.
// `max` is a reference, not the exact maximum: it moves only when a score exceeds it by more than kMaxSlack. While it
// is -inf, a row has seen no key, and its out and sum hold anything: who sees the first key clears them.
struct AttentionPartial {
  float* out = nullptr;  // [rows][padded]
  float* sum = nullptr;  // [rows][kSumLanes]
  float* max = nullptr;  // [rows]
};

// 2^8: weights stay far inside fp32 and keep their relative precision in bf16; rescaling becomes rare.
inline constexpr float kMaxSlack = 8.0f;

struct AttentionTile {
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  const void* next_k = nullptr;  // slabs of the page to come, to be fetched meanwhile; may be null
  const void* next_v = nullptr;
  const std::uint64_t* masks = nullptr;  // per row: bit t set = key t is seen
  int rows = 0;
  int head_dim = 0;
  int padded = 0;
  AttentionPartial state;
};

// The rows of one token over one page as it lies in the pool: nothing is packed, because nobody would use it again.
struct AttentionPage {
  const void* q = nullptr;
  const void* k = nullptr;  // slabs
  const void* v = nullptr;
  const void* next_k = nullptr;  // slabs of the page to come, to be fetched meanwhile; may be null
  const void* next_v = nullptr;
  std::uint64_t mask = 0;  // keys seen, by all rows alike
  int rows = 0;
  int head_dim = 0;
  AttentionPartial state;
};

struct AttentionKernel {
  std::size_t element_bytes;  // of packed q, k and v
  // One query row; cos and sin are the table's row of its position. rotate_half pairing (j, j + half).
  void (*rotate)(const float* q, const float* cos, const float* sin, int half, int head_dim, float scale, void* out);
  void (*pack_keys)(const void* slab, int head_dim, void* out);
  // Keys whose bit in `keep` is clear become zeros. Returns false if a kept value is not finite.
  bool (*pack_values)(const void* slab, int head_dim, std::uint64_t keep, void* out);
  // Adds a tile to the state. Row-local: a row's bits do not depend on the other rows, and a masked key is the same
  // as no key.
  void (*add_tile)(const AttentionTile& tile);
  // The same for the rows of one token, with the same bits; null, or false when it does not take such a shape.
  bool (*add_page)(const AttentionPage& page);
  // total <- total (+) part, where part follows total in the order of keys. Total keeps its sum in lane 0.
  void (*fold)(const AttentionPartial& total, const AttentionPartial& part, int rows, int padded);
  // One row of the answer: out / sum, or zeros; to bf16 or fp32. -0 becomes +0.
  void (*finish)(const float* out, float sum, float max, int head_dim, DType dtype, void* dst);
  // For AttentionMass. Scores of `rows` query rows and the 64 keys of a tile: s[r * stride + t] = q[r] . k[t].
  void (*scores)(const void* q, int rows, int head_dim, const void* k, float* s, std::int64_t stride);
  // mass[t] += 2^(s[t] - max) / sum over `keys` (a multiple of 64) scores; keys at -infinity get nothing. Overwrites s.
  void (*add_mass)(float* s, std::int64_t keys, float* mass);
  // Called by each thread after its last call of a task; null where nothing is held in between.
  void (*release)() = nullptr;
};

// The implementations, for pages of this dtype.
const AttentionKernel& PlainAttention(DType pages);
const AttentionKernel& Avx2Attention(DType pages);
const AttentionKernel& Avx512Attention(DType pages);
const AttentionKernel& Avx512Bf16Attention();  // bf16 pages only
const AttentionKernel& AmxBf16Attention();     // and head_dim a multiple of 32
const AttentionKernel& AttentionKernelFor(CpuIsa isa, const KvLayout& pages);

// Sets flush-to-zero for its lifetime: denormal sums would make "a masked key is no key" untrue in dot-product
// instructions that flush them, and are slow elsewhere.
class ScopedFlushDenormals {
 public:
  ScopedFlushDenormals();
  ~ScopedFlushDenormals();
  ScopedFlushDenormals(const ScopedFlushDenormals&) = delete;
  ScopedFlushDenormals& operator=(const ScopedFlushDenormals&) = delete;

 private:
  unsigned saved_;
};

}  // namespace kvshare::kernels

// What is done to KV where it lies, on backends whose memory the host does not read (kv_rows.h is for those whose
// memory it does): moving rows and pages, quantising and copying pages on their way to another tier, ranking and
// choosing the rows to recompute, and KVCOMM's correction, so that nothing but the chosen indices and a distance for
// each anchor crosses to the host. Enqueued, like the operations of Backend; failures show in its Sync().
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "kernels/kv_rows.h"
#include "kernels/paged_kv.h"

namespace kvshare::kernels {

enum class KvCode { kInt8, kFp8E4M3 };

// One byte for each element and one fp32 scale for each token of a slab: per slab [64 tokens][head_dim] codes, then
// [64] scales. x is about code * scale; scale is the row's greatest |x| over the greatest code (127, or 448).
constexpr std::size_t QuantizedSlabBytes(const KvLayout& layout) {
  return std::size_t{kPageTokens} * (static_cast<std::size_t>(layout.head_dim) + sizeof(float));
}
constexpr std::size_t QuantizedPageBytes(const KvLayout& layout) {
  return QuantizedSlabBytes(layout) * 2 * static_cast<std::size_t>(layout.num_layers) *
         static_cast<std::size_t>(layout.num_kv_heads);
}

// KV in the backend's memory in the code in which anchors are kept (anchors/q8.h: 32 values of a byte to a bf16 scale),
// codes and scales apart, because blocks of 34 bytes are no addresses to load from. Value c of a row is
// scales[c / 32] * codes[c]; keys are in the canonical frame (kv_rows.h).
struct CodedKv {
  const std::int8_t* codes = nullptr;     // [num_layers][K, V][tokens][num_kv_heads * head_dim]; null: there is none
  const std::uint16_t* scales = nullptr;  // [num_layers][K, V][tokens][ceil(num_kv_heads * head_dim / 32)]
};

// One of KVCOMM's anchors (arXiv 2510.12872 §3; anchors/anchor_pool.h).
struct AnchorKv {
  CodedKv base;    // what was stored
  CodedKv offset;  // what the reading agent computed, less that; none: it never did
  std::int64_t tokens = 0;
};

// Pages on their way between a pool and pinned host memory. Holds neither; must not outlive its backend.
class PageTransfer {
 public:
  virtual ~PageTransfer() = default;
  // What is enqueued on the backend from now on comes after the copies of this layer and of those before it.
  virtual void AwaitLayer(int layer) = 0;
  // Whether all of it is copied, at once or when it is. The backend's first failure.
  virtual Result<bool> Done() = 0;
  virtual Status Wait() = 0;
};

// Stored tokens and the anchors of their placeholder, token t against token t of each.
struct AnchoredTokens {
  KvPages pages;
  RopeTable rope;                           // half a multiple of 4, head_dim of 8
  std::span<const KvSlot> stored;           // [tokens]
  std::span<const std::int64_t> positions;  // [tokens], each < rope.positions: where their keys were rotated
  std::span<const AnchorKv> anchors;        // at most kMostAnchors, none of fewer tokens
};
inline constexpr std::size_t kMostAnchors = 64;

class DeviceKv {
 public:
  virtual ~DeviceKv() = default;

  // K and V, byte for byte, of layers [layer_begin, layer_end): from[i] to to[i], all at once: no slot of `to` may
  // appear twice, or in `from`.
  virtual void CopyRows(const KvPages& pages, std::span<const KvSlot> from, std::span<const KvSlot> to, int layer_begin,
                        int layer_end) = 0;

  // Whole pages to and from one block of page_bytes() each, in the backend's memory.
  virtual void GatherPages(const KvPages& pages, std::span<const PageIndex> from, std::byte* block) = 0;
  virtual void ScatterPages(const KvPages& pages, const std::byte* block, std::span<const PageIndex> to) = 0;

  // The same through one byte an element; a block has QuantizedPageBytes() for each page. Rounded to nearest even. A
  // row with an infinity or a NaN comes back as NaN. Rows of pages that hold no token are coded like any others.
  virtual void QuantizePages(const KvPages& pages, std::span<const PageIndex> from, KvCode code, std::byte* block) = 0;
  virtual void DequantizePages(const KvPages& pages, const std::byte* block, KvCode code,
                               std::span<const PageIndex> to) = 0;

  // Host memory that pages are copied to and from beside the backend's work; to be released once its copies are over.
  // ResourceExhausted.
  virtual Result<std::unique_ptr<Buffer>> AllocatePinned(std::size_t bytes) = 0;

  // Whole pages from and to such memory, page_bytes() each, layer by layer: of all pages layer 0, then layer 1. They
  // come after all that was enqueued before the call and run beside what is enqueued after it, which until Done() may
  // read demoted pages and use those layers of promoted ones that it awaits, and nothing else of them. Sync() does not
  // wait for them. The pages and `pinned` must outlive the copies. Requires that no page of `to` appears twice. The
  // backend's first failure.
  virtual Result<std::unique_ptr<PageTransfer>> PromotePages(const KvPages& pages, const std::byte* pinned,
                                                             std::span<const PageIndex> to) = 0;
  virtual Result<std::unique_ptr<PageTransfer>> DemotePages(const KvPages& pages, std::span<const PageIndex> from,
                                                            std::byte* pinned) = 0;

  // ValueDeviation of kv_rows.h, with fp32 sums: out[i] of V of row i in `fresh` and V stored at stored[i]. `out` lies
  // in the backend's memory.
  virtual void ValueDeviation(const MatrixView& fresh, const KvPages& pages, int layer, std::span<const KvSlot> stored,
                              RowDeviation* out) = 0;

  // The `count` rows of greatest `squares` among n, ascending, into `chosen` (host memory): of equals the lower index;
  // a NaN is greater than all. Waits. Requires 0 <= count <= n = chosen's bound.
  virtual Status ChooseRows(const RowDeviation* deviations, std::int64_t n, std::span<std::int32_t> chosen) = 0;

  // AttentionMass of attention_mass.h with the scores that attention itself computes here (queries and keys of 16 bits,
  // fp32 sums): adds to mass[s][t] the sum over `rows` and all heads of the weight that the row's softmax gives key t
  // of segment s. mass[s]: [p.segments[s].length] floats in the backend's memory, or null where nobody asks. `rows`:
  // ascending indices into p.q and p.positions. Requires pages of bf16 or fp16 and a head_dim of 64 or 128; p.out is
  // not used. Takes 4 * heads * head_dim FLOP a row and visible key. ResourceExhausted, in Sync(), where there is no
  // memory for 1024 floats for each kv head, 64 packed rows (of 512 at a time) and split that is asked about.
  virtual void AttentionMass(const AttentionParams& p, std::span<const std::int64_t> rows,
                             std::span<float* const> mass) = 0;

  // ChooseRows by what KVShare ranks tokens by (arXiv 2503.16525, DHD): sqrt(deviations[i].squares) * mass[i]; by mass
  // alone where `deviations` is null. Both lie in the backend's memory; [n] each. Waits.
  virtual Status ChooseRowsByMass(const float* mass, const RowDeviation* deviations, std::int64_t n,
                                  std::span<std::int32_t> chosen) = 0;

  // KVCOMM's two passes. The first, over every layer, head and channel c of the canonical x against anchor a's base b:
  //   differences[part][t][a] = sum_c |x_c - b_c|             part 0: keys, 1: values; in the backend's memory
  //   distances[a]            = sqrt(sum_t sum_c (x_c - b_c)^2) of the values; in host memory
  // The gate (eq. 5: entropy of softmax(-distances)) is the caller's, who knows its threshold: a few numbers cross,
  // waited for because what comes next depends on them. [2, tokens, anchors] floats of `differences` stay where they
  // are for the second pass. A number's bits depend on its token and anchor alone. Waits; the first failure of the
  // queue, or ResourceExhausted when there is no memory for [tokens, anchors] floats more.
  virtual Status AnchorDistances(const AnchoredTokens& tokens, float* differences, std::span<float> distances) = 0;

  // The second: for each token, from layer 1 on, over the anchors a that have an offset,
  //   x += sum_a softmax_a(-differences[part][t][a] / (layers * kv heads * head_dim)) * offset_a
  // and the sum goes to to[t], keys rotated at to_positions[t], rounded to nearest even. In layer 0, and where no
  // anchor has an offset, x is moved as it is. to[t] may be stored[t]; else no slot of `to` may appear twice, or in
  // `stored`.
  virtual void ApplyAnchors(const AnchoredTokens& tokens, const float* differences, std::span<const KvSlot> to,
                            std::span<const std::int64_t> to_positions) = 0;
};

}  // namespace kvshare::kernels

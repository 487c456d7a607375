// Paged KV: how keys and values lie in memory (docs/formats, KV format version 1).
//
// One page holds 64 tokens of every layer, contiguous, so that a page is one copy and one blob:
//
//   [layer][K|V][kv_head][64 tokens][head_dim]
//
// K is stored RoPE-rotated at the position where it was produced ("base"); it is never rotated again. Where a
// run of pages stands elsewhere, the query is rotated by its position minus `shift` instead.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "kernels/tensor.h"

namespace kvshare::kernels {

inline constexpr int kPageTokens = 64;

using PageIndex = std::uint32_t;

struct KvLayout {
  int num_layers = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  DType dtype = DType::kBf16;

  // One (layer, K|V, head) slab: [64 tokens][head_dim].
  constexpr std::size_t slab_bytes() const {
    return std::size_t{kPageTokens} * static_cast<std::size_t>(head_dim) * DTypeBytes(dtype);
  }
  constexpr std::size_t page_bytes() const {
    return slab_bytes() * 2 * static_cast<std::size_t>(num_layers) * static_cast<std::size_t>(num_kv_heads);
  }
  // Byte offset of a slab within its page. `value` is 0 for K, 1 for V.
  constexpr std::size_t slab_offset(int layer, int value, int kv_head) const {
    return ((static_cast<std::size_t>(layer) * 2 + static_cast<std::size_t>(value)) *
                static_cast<std::size_t>(num_kv_heads) +
            static_cast<std::size_t>(kv_head)) *
           slab_bytes();
  }
  bool operator==(const KvLayout&) const = default;
};

// All pages of a pool: page p starts at base + p * layout.page_bytes().
struct KvPages {
  std::byte* base = nullptr;
  PageIndex num_pages = 0;
  KvLayout layout;

  std::byte* slab(PageIndex page, int layer, int value, int kv_head) const {
    return base + static_cast<std::size_t>(page) * layout.page_bytes() + layout.slab_offset(layer, value, kv_head);
  }
};

// Where one row's fresh K and V go.
struct KvSlot {
  PageIndex page = 0;
  int offset = 0;  // token within the page, 0..63
  bool operator==(const KvSlot&) const = default;
};

// The slot of a row whose K and V are not stored.
inline constexpr KvSlot kNoSlot{~PageIndex{0}, 0};

// A run of stored keys as one attention operand. Token t of the segment lies in pages[(first + t) / 64], row
// (first + t) % 64, and stands at absolute position start + t or, where `positions` is given, positions[t]. Rows
// [row_begin, row_end) of the batch see it; of its keys, row i sees those whose position is <= the row's.
//
// `positions` is for the rows that a request computed itself, wherever in its prompt they stand: they lie side by side
// in one private run, and since positions ascend, what a row sees of them is still a range of tokens. `first` is for a
// chunk that begins in the middle of a page of somebody's prompt.
struct KvSegment {
  std::span<const PageIndex> pages;
  std::int64_t start = 0;   // absolute position of the first token where it is placed; unused with `positions`
  std::int64_t length = 0;  // tokens; the last page may be partly filled
  std::int64_t shift = 0;   // placed - base: the query is rotated by position - shift
  std::int64_t row_begin = 0;
  std::int64_t row_end = 0;
  std::span<const std::uint64_t> skip = {};      // per page: bit r set = page row r is not seen; empty = all are seen
  std::span<const std::int64_t> positions = {};  // [length], strictly ascending, absolute; empty = start + t
  int first = 0;                                 // page row of token 0 within pages[0], 0..63
  // The layers in which it is seen: [first_layer, end_layer). What a forward pass gives attention is seen in its layer.
  int first_layer = 0;
  int end_layer = std::numeric_limits<int>::max();
};

constexpr bool SeenIn(const KvSegment& s, int layer) { return s.first_layer <= layer && layer < s.end_layer; }

// Where token t of a segment lies.
constexpr KvSlot SlotOf(const KvSegment& s, std::int64_t t) {
  const std::int64_t row = s.first + t;
  return {s.pages[static_cast<std::size_t>(row / kPageTokens)], static_cast<int>(row % kPageTokens)};
}

// The absolute position of token t of a segment.
constexpr std::int64_t PositionOf(const KvSegment& s, std::int64_t t) {
  return s.positions.empty() ? s.start + t : s.positions[static_cast<std::size_t>(t)];
}

}  // namespace kvshare::kernels

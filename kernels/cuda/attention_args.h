// What a CUDA attention kernel is handed, and the arithmetic of pages, masks, splits and packed rows. Plain data and
// functions that host and device share, so that the tests hold them to kernels/paged_kv.h without a GPU.
//
// A "packed row" is one query head of one token among the heads of one kv head: p = token * group + head within the
// group, counted over the whole batch. A "page row" is a token of a segment by its place in the segment's pages.
#pragma once

#include "kernels/cuda/hd.h"

namespace kvshare::kernels::cuda {

inline constexpr int kTileRows = 64;  // packed rows of a block: four warps of 16

// One layer of a pool's pages.
struct PageView {
  std::byte* base = nullptr;  // of layer's K slab of head 0 in page 0
  std::int64_t page_bytes = 0;
  std::int64_t slab_bytes = 0;
  int kv_heads = 0;
  DType dtype = DType::kBf16;  // or kF16

  KVS_HD std::byte* Slab(std::uint32_t page, int value, int head) const {
    return base + static_cast<std::int64_t>(page) * page_bytes +
           (static_cast<std::int64_t>(value) * kv_heads + head) * slab_bytes;
  }
};

struct RopeView {
  const float* cos = nullptr;  // [positions, half]
  const float* sin = nullptr;
  std::int64_t positions = 0;
  int half = 0;
};

// cos and sin of pair j at `angle`, which may lie beyond the table: RopeAngle of kernels/cpu/rope_angle.h, with the
// same bits. Requires 0 <= angle <= 2 (positions - 1).
struct CosSin {
  float cos;
  float sin;
};
KVS_HD CosSin AngleAt(const RopeView& rope, std::int64_t angle, int j) {
  const std::int64_t last = rope.positions - 1;
  if (angle <= last) return {rope.cos[angle * rope.half + j], rope.sin[angle * rope.half + j]};
  const float c = rope.cos[last * rope.half + j], s = rope.sin[last * rope.half + j];
  const float d = rope.cos[(angle - last) * rope.half + j], t = rope.sin[(angle - last) * rope.half + j];
  const float once = 1.0f / rope.cos[0];  // both rows hold yarn's factor, the answer holds it once
  return {(c * d - s * t) * once, (s * d + c * t) * once};
}

// KvSegment with its tables on the device.
struct SegmentView {
  const std::uint32_t* pages = nullptr;
  const std::uint64_t* skip = nullptr;      // null: nothing is skipped
  const std::int64_t* positions = nullptr;  // null: start + t
  std::int64_t start = 0;
  std::int64_t length = 0;
  std::int64_t shift = 0;
  std::int64_t row_begin = 0;
  std::int64_t row_end = 0;
  int first = 0;
  // Spread schedule: partials of (split u, kv head h, packed row p) lie at
  //   partial_base + ((u - first_split) * kv_heads + h) * packed rows of the segment + (p - row_begin * group)
  int first_split = 0;
  std::int64_t partial_base = 0;
};

struct RowRange {  // page rows [begin, end)
  std::int64_t begin;
  std::int64_t end;
};

KVS_HD std::int64_t Clamp(std::int64_t x, std::int64_t low, std::int64_t high) {
  return x < low ? low : (x > high ? high : x);
}

// Tokens of the segment whose position is at most `position`: std::upper_bound over its positions.
KVS_HD std::int64_t TokensUpTo(const SegmentView& s, std::int64_t position) {
  std::int64_t low = 0, high = s.length;
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    if (s.positions[middle] <= position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// SeenBy of kernels/cpu/page_rows.h.
KVS_HD RowRange SeenRows(const SegmentView& s, std::int64_t position, std::int64_t window) {
  std::int64_t begin = 0, end = 0;
  if (s.positions == nullptr) {
    end = position - s.start + 1;
    if (window > 0) begin = position - window + 1 - s.start;
  } else {
    end = TokensUpTo(s, position);
    if (window > 0) begin = TokensUpTo(s, position - window);
  }
  return {Clamp(begin, 0, s.length) + s.first, Clamp(end, 0, s.length) + s.first};
}

// KeptRows of kernels/cpu/page_rows.h: the rows of the segment's page that hold tokens which are not skipped.
KVS_HD std::uint64_t KeptMask(const SegmentView& s, std::int64_t page) {
  std::uint64_t keep = ~std::uint64_t{0};
  const std::int64_t tokens = s.first + s.length - page * kPageRows;
  if (tokens < kPageRows) keep = tokens <= 0 ? 0 : keep >> (kPageRows - tokens);
  if (page == 0) keep = keep >> s.first << s.first;
  if (s.skip != nullptr) keep &= ~s.skip[page];
  return keep;
}

// SeenMask of kernels/cpu/page_rows.h: those of 64 page rows from `first` on that lie in `seen`.
KVS_HD std::uint64_t RangeMask(const RowRange& seen, std::int64_t first) {
  std::uint64_t mask = ~std::uint64_t{0};
  const std::int64_t end = seen.end - first;
  if (end < kPageRows) mask = end <= 0 ? 0 : mask & ((std::uint64_t{1} << end) - 1);
  const std::int64_t begin = seen.begin - first;
  if (begin > 0) mask = begin >= kPageRows ? 0 : mask >> begin << begin;
  return mask;
}

// One block's work, for every kv head: packed rows [packed_begin, packed_begin + rows) over segments
// [segment_begin, segment_end), those that all its rows see. `split` >= 0: only that split, into partials.
struct WorkItem {
  std::int64_t packed_begin = 0;
  int rows = 0;
  int segment_begin = 0;
  int segment_end = 0;
  int split = -1;
};

KVS_HD bool Covers(const SegmentView& s, int group, const WorkItem& item) {
  return s.row_begin * group <= item.packed_begin && item.packed_begin + item.rows <= s.row_end * group;
}

KVS_HD std::int64_t PartialIndex(const SegmentView& s, int group, int kv_heads, std::int64_t split, int head,
                                 std::int64_t packed_row) {
  const std::int64_t rows = (s.row_end - s.row_begin) * group;
  return s.partial_base + ((split - s.first_split) * kv_heads + head) * rows + packed_row - s.row_begin * group;
}

struct AttentionArgs {
  const float* q = nullptr;  // [T, >= heads * head_dim], un-rotated
  std::int64_t q_stride = 0;
  int group = 1;      // query heads per kv head
  float q_scale = 0;  // scale * log2(e)
  std::int64_t window = 0;
  RopeView rope;
  const std::int64_t* positions = nullptr;  // [T]
  const SegmentView* segments = nullptr;
  int num_segments = 0;
  const WorkItem* items = nullptr;  // as many as blocks in x; kv heads in y
  PageView pages;
  void* out = nullptr;  // [T, heads * head_dim]
  std::int64_t out_stride = 0;
  DType out_dtype = DType::kBf16;
  float* partial_out = nullptr;    // [partials, head_dim]
  float* partial_stats = nullptr;  // [partials, 2]: sum, reference
};

}  // namespace kvshare::kernels::cuda

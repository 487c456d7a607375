// What every kernel that scores keys does with a tile of 64 packed rows: their queries turned towards a segment, a slab
// of keys or values, the scores of the one with the other.
//
// Tiles lie in shared memory as rows of head_dim halves (bf16 or fp16) whose 16-byte chunks are permuted by row (chunk
// c of row r at c ^ (r & 7)), so that ldmatrix and cp.async hit every bank once.
//
// Fragments of mma.m16n8k16, with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix fragments for mma.m16n8k16"):
//   sums    c0, c1: row g, columns 2t, 2t + 1; c2, c3: row g + 8
//   A       a0: row g, k 2t..; a1: row g + 8; a2, a3: the same at k + 8;   B  b0: k 2t.., column g; b1: k + 8
#pragma once

#include "kernels/cuda/attention_args.h"

namespace kvshare::kernels::cuda {

inline constexpr int kAttentionThreads = 128;
inline constexpr int kKeyTiles = kTileRows / 8;  // n-tiles of scores

template <int kHeadDim>
KVS_DEV std::byte* TileChunk(std::byte* tile, int row, int chunk) {
  return tile + row * (kHeadDim * 2) + ((chunk ^ (row & 7)) * 16);
}

KVS_DEV float RotatedChannel(const AttentionArgs& a, const float* q, std::int64_t angle, int j) {
  const int half = a.rope.half;
  if (j >= 2 * half) return q[j] * a.q_scale;
  const CosSin r = AngleAt(a.rope, angle, j < half ? j : j - half);
  if (j < half) return (q[j] * r.cos - q[j + half] * r.sin) * a.q_scale;
  return (q[j] * r.cos + q[j - half] * r.sin) * a.q_scale;
}

// Two threads a row, each every other chunk of the lower half with its counterpart; then what is not rotated.
// `q_rows`: where each token's queries are; null: in its own row.
template <class Lane, int kHeadDim, DType kHalf>
KVS_DEV void RotateQueries(const AttentionArgs& a, const SegmentView& s, const WorkItem& item, int head,
                           const std::int64_t* q_rows, const RowRange* seen, std::byte* tile, Lane& lane) {
  const int row = lane.thread() / 2;
  const bool live = row < item.rows && seen[row].begin < seen[row].end;
  const std::int64_t packed = item.packed_begin + row;
  const std::int64_t token = packed / a.group;
  const std::int64_t q_row = q_rows == nullptr || !live ? token : q_rows[token];
  const float* q = a.q + q_row * a.q_stride + (static_cast<std::int64_t>(head) * a.group + packed % a.group) * kHeadDim;
  const std::int64_t angle = live ? a.positions[token] - s.shift : 0;
  for (int j = lane.thread() % 2 * 2; j < kHeadDim; j += 4) {
    float x[2] = {0, 0};
    KVS_UNROLL
    for (int i = 0; i < 2 && live; ++i) x[i] = RotatedChannel(a, q, angle, j + i);
    StoreWord(TileChunk<kHeadDim>(tile, row, j / 8) + j % 8 * 2, lane.template Pack<kHalf>(x[0], x[1]));
  }
}

// What the rows see of a segment, and their queries turned towards it, for all threads to read when it returns. Returns
// what any of them sees.
template <class Lane, int kHeadDim, DType kHalf>
KVS_DEV RowRange EnterSegment(const AttentionArgs& a, const SegmentView& s, const WorkItem& item, int head,
                              const std::int64_t* q_rows, RowRange* seen_rows, std::byte* tile, Lane& lane) {
  lane.Sync();  // nobody reads the last segment's ranges and queries any more
  if (lane.thread() < kTileRows) {
    RowRange seen{0, 0};
    if (lane.thread() < item.rows) {
      seen = SeenRows(s, a.positions[(item.packed_begin + lane.thread()) / a.group], a.window);
    }
    seen_rows[lane.thread()] = seen;
  }
  lane.Sync();
  RowRange all{s.first + s.length, 0};
  for (int r = 0; r < item.rows; ++r) {
    const RowRange seen = seen_rows[r];
    if (seen.end <= seen.begin) continue;
    if (seen.begin < all.begin) all.begin = seen.begin;
    if (seen.end > all.end) all.end = seen.end;
  }
  if (all.end > all.begin) RotateQueries<Lane, kHeadDim, kHalf>(a, s, item, head, q_rows, seen_rows, tile, lane);
  lane.Sync();
  return all;
}

// The page rows of a split that are among `seen`, as the pages that hold them.
struct PageRange {
  std::int64_t begin;
  std::int64_t end;
};
KVS_DEV PageRange PagesOfSplit(const RowRange& seen, std::int64_t split) {
  const std::int64_t end = seen.end < (split + 1) * kSplitRows ? seen.end : (split + 1) * kSplitRows;
  const std::int64_t begin = seen.begin > split * kSplitRows ? seen.begin : split * kSplitRows;
  return {begin / kPageRows, (end + kPageRows - 1) / kPageRows};
}

// The first page from `page` on of which some row is kept.
KVS_DEV std::int64_t NextPage(const SegmentView& s, std::int64_t page, std::int64_t end) {
  while (page < end && KeptMask(s, page) == 0) ++page;
  return page;
}

// Begins to copy a slab, rows that are not kept as zeros.
template <class Lane, int kHeadDim>
KVS_DEV void LoadSlab(const std::byte* slab, std::uint64_t keep, std::byte* tile, Lane& lane) {
  constexpr int kChunks = kHeadDim / 8;
  KVS_NO_UNROLL
  for (int i = lane.thread(); i < kTileRows * kChunks; i += kAttentionThreads) {
    const int row = i / kChunks;
    lane.CopyAsync16(TileChunk<kHeadDim>(tile, row, i % kChunks), slab + i * 16, (keep >> row & 1) != 0);
  }
}

// Of the warp's 16 rows with the slab's 64 keys.
template <class Lane, int kHeadDim, DType kHalf>
KVS_DEV void TileScores(std::byte* queries, std::byte* keys, int warp_row, float (&scores)[kKeyTiles][4], Lane& lane) {
  const int l = lane.thread() % 32;
  KVS_UNROLL
  for (int n = 0; n < kKeyTiles; ++n) {
    KVS_UNROLL
    for (int i = 0; i < 4; ++i) scores[n][i] = 0;
  }
  KVS_UNROLL
  for (int step = 0; step < kHeadDim / 16; ++step) {
    std::uint32_t q[4];
    lane.LoadMatrix4(q, TileChunk<kHeadDim>(queries, warp_row + l % 16, 2 * step + l / 16));
    KVS_UNROLL
    for (int n = 0; n < kKeyTiles; n += 2) {
      std::uint32_t k[4];
      lane.LoadMatrix4(k, TileChunk<kHeadDim>(keys, n * 8 + l / 16 * 8 + l % 8, 2 * step + l / 8 % 2));
      lane.template Mma<kHalf>(scores[n], q, k[0], k[1]);
      lane.template Mma<kHalf>(scores[n + 1], q, k[2], k[3]);
    }
  }
}

// Calls `launch` for the kernel of these heads (64 or 128 channels) and pages (either half).
template <class Launch>
auto ForHeads(int head_dim, DType half, Launch launch) {
  if (head_dim == 64) {
    return half == DType::kF16 ? launch.template operator()<64, DType::kF16>()
                               : launch.template operator()<64, DType::kBf16>();
  }
  return half == DType::kF16 ? launch.template operator()<128, DType::kF16>()
                             : launch.template operator()<128, DType::kBf16>();
}

}  // namespace kvshare::kernels::cuda

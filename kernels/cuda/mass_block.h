// Attention mass on the device, in four kernels: what each split of the keys gives a row (greatest score, sum of
// weights), the fold of that over all its splits, each key's share of the rows' weights, and the sum of the shares.
// Scores are computed twice, because no row's weights are known before all its keys were seen and storing the scores
// would take rows x heads x keys floats. Scores are attention's, by the same tiles and matrix instructions.
#pragma once

#include "kernels/cuda/attention_tile.h"
#include "kernels/cuda/mass_args.h"
#include "kernels/cuda/merge_block.h"

namespace kvshare::kernels::cuda {

template <int kHeadDim>
struct MassShared {
  static constexpr int kTileBytes = kTileRows * kHeadDim * 2;
  static constexpr int kQuery = 0;
  static constexpr int kKeys = kTileBytes;
  static constexpr int kSeen = 2 * kTileBytes;              // RowRange of each packed row
  static constexpr int kWarpSums = kSeen + kTileRows * 16;  // [4 warps][64 keys]
  static constexpr int kBytes = kWarpSums + 4 * kTileRows * 4;
};

// One block for an item and a kv head. kShares: the third kernel, else the first.
template <class Lane, int kHeadDim, DType kHalf, bool kShares>
class MassBlock {
  using Shared = MassShared<kHeadDim>;

 public:
  KVS_DEV MassBlock(const MassArgs& args, Lane& lane) : m_(args), a_(args.attention), lane_(lane) {
    item_ = a_.items[lane.block_x()];
    head_ = lane.block_y();
    thread_ = lane.thread();
    warp_row_ = thread_ / 32 * 16;
    g_ = thread_ % 32 / 4;
    t_ = thread_ % 4;
    q_ = lane.shared() + Shared::kQuery;
    k_ = lane.shared() + Shared::kKeys;
    seen_ = reinterpret_cast<RowRange*>(lane.shared() + Shared::kSeen);
    warp_sums_ = reinterpret_cast<float*>(lane.shared() + Shared::kWarpSums);
  }

  KVS_DEV void Run() {
    const SegmentView& s = a_.segments[item_.segment_begin];
    const RowRange seen = EnterSegment<Lane, kHeadDim, kHalf>(a_, s, item_, head_, m_.q_rows, seen_, q_, lane_);
    Begin();
    const PageRange pages = PagesOfSplit(seen, item_.split);
    std::int64_t page = seen.begin < seen.end ? NextPage(s, pages.begin, pages.end) : pages.end;
    Load(s, page, pages.end);
    while (page < pages.end) {
      const std::int64_t next = NextPage(s, page + 1, pages.end);
      lane_.template WaitForCopies<0>();
      lane_.Sync();
      const bool warp_lives = warp_row_ < item_.rows;  // a warp without rows only copies
      float scores[kKeyTiles][4];
      if (warp_lives) TileScores<Lane, kHeadDim, kHalf>(q_, k_, warp_row_, scores, lane_);
      lane_.Sync();
      Load(s, next, pages.end);
      const std::uint64_t keep = KeptMask(s, page);
      KVS_UNROLL
      for (int i = 0; i < 2 && warp_lives; ++i) {
        Mask(keep & RangeMask(seen_[warp_row_ + g_ + 8 * i], page * kPageRows), i, scores);
      }
      if (!kShares && warp_lives) Weigh(scores);
      if (kShares) Share(page, warp_lives, scores);
      page = next;
    }
    lane_.template WaitForCopies<0>();
    if (!kShares) Store(s);
  }

 private:
  KVS_DEV std::int64_t Packed(int i) const { return item_.packed_begin + warp_row_ + g_ + 8 * i; }
  KVS_DEV bool RowLives(int i) const { return warp_row_ + g_ + 8 * i < item_.rows; }
  KVS_DEV float* Shares() const {
    return m_.shares + (static_cast<std::int64_t>(lane_.block_x()) * a_.pages.kv_heads + head_) * kSplitRows;
  }

  KVS_DEV void Begin() {
    KVS_UNROLL
    for (int i = 0; i < 2; ++i) {
      max_[i] = NoKeySeen();
      sum_[i] = 0;
      if (!kShares || !RowLives(i)) continue;
      const float* total = m_.totals + (head_ * m_.packed_rows + Packed(i)) * 2;
      max_[i] = total[0];
      sum_[i] = total[1];
    }
    if (!kShares) return;
    // Pages that none of these rows sees are not visited. Those that are write after the loop's barriers.
    for (int i = thread_; i < kSplitRows; i += kAttentionThreads) Shares()[i] = 0;
  }

  // Begins to copy the keys of a page. Nobody looks at the scores of keys that are not kept.
  KVS_DEV void Load(const SegmentView& s, std::int64_t page, std::int64_t end) {
    if (page < end) {
      LoadSlab<Lane, kHeadDim>(a_.pages.Slab(s.pages[page], 0, head_), ~std::uint64_t{0}, k_, lane_);
    }
    lane_.CommitCopies();
  }

  KVS_DEV void Mask(std::uint64_t seen, int i, float (&scores)[kKeyTiles][4]) const {
    seen >>= 2 * t_;  // bit 8 n + c: this lane's key c of tile n
    KVS_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) {
      KVS_UNROLL
      for (int c = 0; c < 2; ++c) {
        if ((seen >> (8 * n + c) & 1) == 0) scores[n][2 * i + c] = NoKeySeen();
      }
    }
  }

  // Adds a page to the rows' sums; the reference is the greatest score so far.
  KVS_DEV void Weigh(const float (&scores)[kKeyTiles][4]) {
    KVS_UNROLL
    for (int i = 0; i < 2; ++i) {
      float top = max_[i];
      KVS_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) {
        KVS_UNROLL
        for (int c = 0; c < 2; ++c) top = lane_.MaxOrNan(top, scores[n][2 * i + c]);
      }
      top = lane_.MaxOrNan(top, lane_.ShuffleXor(top, 1));
      top = lane_.MaxOrNan(top, lane_.ShuffleXor(top, 2));
      sum_[i] *= max_[i] == NoKeySeen() ? 0.0f : lane_.Exp2(max_[i] - top);
      max_[i] = top;
      const float from = top == NoKeySeen() ? 0.0f : top;  // 2^-inf, not 2^NaN, for what is not seen
      KVS_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) {
        KVS_UNROLL
        for (int c = 0; c < 2; ++c) sum_[i] += lane_.Exp2(scores[n][2 * i + c] - from);
      }
    }
  }

  KVS_DEV void Store(const SegmentView& s) {
    KVS_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float pair = sum_[i] + lane_.ShuffleXor(sum_[i], 1);
      const float sum = pair + lane_.ShuffleXor(pair, 2);
      if (!RowLives(i) || t_ != 0) continue;
      float* to = a_.partial_stats + 2 * PartialIndex(s, a_.group, a_.pages.kv_heads, item_.split, head_, Packed(i));
      to[0] = sum;
      to[1] = max_[i];
    }
  }

  // What the rows give each key of a page: each lane its two rows, a tree over the warp's, then the warps pairwise.
  KVS_DEV void Share(std::int64_t page, bool warp_lives, const float (&scores)[kKeyTiles][4]) {
    KVS_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) {
      KVS_UNROLL
      for (int c = 0; c < 2; ++c) {
        float share = 0;
        KVS_UNROLL
        for (int i = 0; i < 2; ++i) {
          // Not even a row whose numbers are not finite gives anything to a key that it does not see.
          const bool seen = warp_lives && scores[n][2 * i + c] != NoKeySeen();
          if (seen) share += lane_.Exp2(scores[n][2 * i + c] - max_[i]) * sum_[i];
        }
        KVS_UNROLL
        for (int mask = 4; mask < 32; mask *= 2) share += lane_.ShuffleXor(share, mask);
        if (g_ == 0) warp_sums_[thread_ / 32 * kTileRows + n * 8 + 2 * t_ + c] = share;
      }
    }
    lane_.Sync();
    if (thread_ < kPageRows) {
      const float* at = warp_sums_ + thread_;
      Shares()[page * kPageRows % kSplitRows + thread_] =
          (at[0] + at[kTileRows]) + (at[2 * kTileRows] + at[3 * kTileRows]);
    }
  }

  const MassArgs& m_;
  const AttentionArgs& a_;
  Lane& lane_;
  WorkItem item_;
  int head_, thread_, warp_row_, g_, t_;
  std::byte* q_;
  std::byte* k_;
  RowRange* seen_;
  float* warp_sums_;
  float max_[2], sum_[2];  // of rows warp_row_ + g_ and + 8; sharing: the row's reference and 1 / its sum
};

// One thread a packed row, kv heads in y: its splits left to right, then its segments, as MergeBlock folds them.
template <class Lane>
KVS_DEV void MassTotalsBlock(const MassArgs& m, Lane& lane) {
  const AttentionArgs& a = m.attention;
  const std::int64_t packed = static_cast<std::int64_t>(lane.block_x()) * kMergeThreads + lane.thread();
  if (packed >= m.packed_rows) return;
  const int head = lane.block_y();
  const std::int64_t token = packed / a.group;
  FoldState total;
  for (int n = 0; n < a.num_segments; ++n) {
    const SegmentView& s = a.segments[n];
    if (token < s.row_begin || token >= s.row_end) continue;
    const RowRange seen = SeenRows(s, a.positions[token], a.window);
    if (seen.end <= seen.begin) continue;
    for (std::int64_t u = seen.begin / kSplitRows; u * kSplitRows < seen.end; ++u) {
      const float* from = a.partial_stats + 2 * PartialIndex(s, a.group, a.pages.kv_heads, u, head, packed);
      const FoldState part{from[0], from[1]};
      if (part.max != NoKeySeen()) FoldPartial(lane, total, part);
    }
  }
  float* to = m.totals + (head * m.packed_rows + packed) * 2;
  to[0] = total.max;
  to[1] = total.max == NoKeySeen() ? 0.0f : 1.0f / total.sum;
}

// One block a column: adds to each key's mass the shares of its kv heads, and in each those of its items, in order.
template <class Lane>
KVS_DEV void MassSumBlock(const MassArgs& m, Lane& lane) {
  const MassColumn& column = m.columns[lane.block_x()];
  const SegmentView& s = m.attention.segments[column.segment];
  const int heads = m.attention.pages.kv_heads;
  for (std::int64_t row = lane.thread(); row < kSplitRows; row += kMergeThreads) {
    const std::int64_t token = column.split * kSplitRows + row - s.first;
    if (token < 0 || token >= s.length) continue;
    float sum = 0;
    for (int head = 0; head < heads; ++head) {
      for (int item = column.item_begin; item < column.item_end; ++item) {
        sum += m.shares[(static_cast<std::int64_t>(item) * heads + head) * kSplitRows + row];
      }
    }
    column.mass[token] += sum;
  }
}

}  // namespace kvshare::kernels::cuda

// One block of segment attention: 64 packed rows of one kv head, four warps of 16 rows, pages of 64 keys.
//
// Written over a Lane (lane_cuda.cuh, or the tests' emulator); attention_tile.h says how tiles and fragments lie. K and
// V have one buffer each: the next K arrives while softmax and V are worked on, the next V while scores are.
#pragma once

#include "kernels/cuda/attention_tile.h"

namespace kvshare::kernels::cuda {

inline constexpr float kSlack = 8.0f;  // kMaxSlack of kernels/cpu/attention_kernel.h

template <int kHeadDim>
struct AttentionShared {
  static constexpr int kTileBytes = kTileRows * kHeadDim * 2;
  static constexpr int kQuery = 0;
  static constexpr int kKeys = kTileBytes;
  static constexpr int kValues = 2 * kTileBytes;
  static constexpr int kSeen = 3 * kTileBytes;  // RowRange of each packed row
  static constexpr int kSpreadBytes = kSeen + kTileRows * 16;
  static constexpr int kTotal = kSpreadBytes;  // walking: folded outputs, [register][thread]
  static constexpr int kWalkBytes = kTotal + kTileRows * kHeadDim * 4;
};

template <class Lane, int kHeadDim, DType kHalf>
class AttentionBlock {
  static constexpr int kOutTiles = kHeadDim / 8;    // n-tiles of output
  static constexpr int kKeySteps = kTileRows / 16;  // k-steps of output
  using Shared = AttentionShared<kHeadDim>;

 public:
  KVS_DEV AttentionBlock(const AttentionArgs& args, Lane& lane) : a_(args), lane_(lane) {
    item_ = a_.items[lane.block_x()];
    head_ = lane.block_y();
    thread_ = lane.thread();
    warp_row_ = thread_ / 32 * 16;
    g_ = thread_ % 32 / 4;
    t_ = thread_ % 4;
    q_ = lane.shared() + Shared::kQuery;
    k_ = lane.shared() + Shared::kKeys;
    v_ = lane.shared() + Shared::kValues;
    seen_ = reinterpret_cast<RowRange*>(lane.shared() + Shared::kSeen);
  }

  KVS_DEV void Run() {
    KVS_UNROLL
    for (int i = 0; i < 2; ++i) {
      total_max_[i] = NoKeySeen();
      total_sum_[i] = 0;
    }
    for (int n = item_.segment_begin; n < item_.segment_end; ++n) {
      const SegmentView& s = a_.segments[n];
      if (!Covers(s, a_.group, item_)) continue;
      const RowRange seen = EnterSegment<Lane, kHeadDim, kHalf>(a_, s, item_, head_, nullptr, seen_, q_, lane_);
      if (seen.end <= seen.begin) continue;
      if (item_.split >= 0) {
        RunSplit(s, seen, item_.split);
        StorePartial(s);
        continue;
      }
      for (std::int64_t u = seen.begin / kSplitRows; u * kSplitRows < seen.end; ++u) {
        RunSplit(s, seen, u);
        Fold();
      }
    }
    if (item_.split < 0) StoreFinal();
  }

 private:
  KVS_DEV std::int64_t Packed(int row) const { return item_.packed_begin + row; }
  KVS_DEV std::byte* Chunk(std::byte* tile, int row, int chunk) const { return TileChunk<kHeadDim>(tile, row, chunk); }

  // The partial result of one split into out_, sum_, max_.
  KVS_DEV void RunSplit(const SegmentView& s, const RowRange& seen, std::int64_t split) {
    KVS_UNROLL
    for (int n = 0; n < kOutTiles; ++n) {
      KVS_UNROLL
      for (int i = 0; i < 4; ++i) out_[n][i] = 0;
    }
    KVS_UNROLL
    for (int i = 0; i < 2; ++i) {
      sum_[i] = 0;
      max_[i] = NoKeySeen();
    }
    const PageRange pages = PagesOfSplit(seen, split);
    std::int64_t page = NextPage(s, pages.begin, pages.end);
    LoadTile(s, 0, page, pages.end, k_);
    LoadTile(s, 1, page, pages.end, v_);
    while (page < pages.end) {
      const std::int64_t next = NextPage(s, page + 1, pages.end);
      lane_.template WaitForCopies<1>();
      lane_.Sync();
      const bool warp_lives = warp_row_ < item_.rows;  // a warp without rows only copies
      float scores[kKeyTiles][4];
      if (warp_lives) TileScores<Lane, kHeadDim, kHalf>(q_, k_, warp_row_, scores, lane_);
      lane_.Sync();
      LoadTile(s, 0, next, pages.end, k_);
      std::uint64_t masks[2];
      const std::uint64_t keep = KeptMask(s, page);
      KVS_UNROLL
      for (int i = 0; i < 2; ++i) masks[i] = keep & RangeMask(seen_[warp_row_ + g_ + 8 * i], page * kPageRows);
      if (warp_lives) Softmax(scores, masks);
      lane_.template WaitForCopies<1>();
      lane_.Sync();
      if (warp_lives) AddValues(scores, masks, keep);
      lane_.Sync();
      LoadTile(s, 1, next, pages.end, v_);
      page = next;
    }
    lane_.template WaitForCopies<0>();
    KVS_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float pair = sum_[i] + lane_.ShuffleXor(sum_[i], 1);
      sum_[i] = pair + lane_.ShuffleXor(pair, 2);
    }
  }

  // Begins to copy a slab; nothing beyond the last page, but a group of copies all the same. Values that nobody may see
  // become zeros, because 0 * NaN is not 0; keys may be anything, their scores are never looked at.
  KVS_DEV void LoadTile(const SegmentView& s, int value, std::int64_t page, std::int64_t end, std::byte* tile) {
    if (page < end) {
      const std::byte* slab = a_.pages.Slab(s.pages[page], value, head_);
      const std::uint64_t keep = value == 0 ? ~std::uint64_t{0} : KeptMask(s, page);
      LoadSlab<Lane, kHeadDim>(slab, keep, tile, lane_);
    }
    lane_.CommitCopies();
  }

  // Scores -> weights in place; moves the reference, and with it sum and output, where a score exceeds it by more.
  KVS_DEV void Softmax(float (&scores)[kKeyTiles][4], const std::uint64_t (&masks)[2]) {
    KVS_UNROLL
    for (int i = 0; i < 2; ++i) {
      const std::uint64_t mine = masks[i] >> (2 * t_);  // bit 8 n + c: this lane's key c of tile n
      float top = NoKeySeen();
      KVS_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) {
        KVS_UNROLL
        for (int c = 0; c < 2; ++c) {
          float& x = scores[n][2 * i + c];
          if ((mine >> (8 * n + c) & 1) == 0) x = NoKeySeen();
          top = lane_.MaxOrNan(top, x);
        }
      }
      top = lane_.MaxOrNan(top, lane_.ShuffleXor(top, 1));
      top = lane_.MaxOrNan(top, lane_.ShuffleXor(top, 2));
      // Also where top is NaN, which thereby reaches the answer.
      const bool moves = !(top <= max_[i] + kSlack);
      const float next = moves ? top : max_[i];
      if (lane_.Any(moves)) {  // multiplying by 1 changes nothing, so that a row's bits do not depend on the others
        const float factor = moves ? (max_[i] == NoKeySeen() ? 0.0f : lane_.Exp2(max_[i] - next)) : 1.0f;
        KVS_UNROLL
        for (int n = 0; n < kOutTiles; ++n) {
          out_[n][2 * i] *= factor;
          out_[n][2 * i + 1] *= factor;
        }
        sum_[i] *= factor;
      }
      max_[i] = next;
      const float from = next == NoKeySeen() ? 0.0f : next;  // 2^-inf, not 2^NaN, for what is not seen
      KVS_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) {
        KVS_UNROLL
        for (int c = 0; c < 2; ++c) {
          float& x = scores[n][2 * i + c];
          x = lane_.Exp2(x - from);
          sum_[i] += x;
        }
      }
    }
  }

  // out_ += weights x values, over all 64 keys in steps of 16.
  KVS_DEV void AddValues(const float (&w)[kKeyTiles][4], const std::uint64_t (&masks)[2], std::uint64_t keep) {
    std::uint32_t p[kKeySteps][4];  // the sums' fragments are A's, once rounded
    KVS_UNROLL
    for (int step = 0; step < kKeySteps; ++step) {
      KVS_UNROLL
      for (int i = 0; i < 4; ++i) {
        p[step][i] = lane_.template Pack<kHalf>(w[2 * step + i / 2][i % 2 * 2], w[2 * step + i / 2][i % 2 * 2 + 1]);
      }
    }
    const bool differ = lane_.Any((masks[0] != keep && RowLives(0)) || (masks[1] != keep && RowLives(1)));
    if (differ && lane_.Any(HoldsNonFinite())) return AddValuesByRow(p, masks);
    const int l = thread_ % 32;
    KVS_UNROLL
    for (int step = 0; step < kKeySteps; ++step) {
      KVS_UNROLL
      for (int n = 0; n < kOutTiles; n += 2) {
        std::uint32_t v[4];
        lane_.LoadMatrix4Transposed(v, Chunk(v_, step * 16 + l % 16, n + l / 16));
        lane_.template Mma<kHalf>(out_[n], p[step], v[0], v[1]);
        lane_.template Mma<kHalf>(out_[n + 1], p[step], v[2], v[3]);
      }
    }
  }
  KVS_DEV bool RowLives(int i) const { return warp_row_ + g_ + 8 * i < item_.rows; }

  // Whether this lane's share of the values (a 32nd) has an infinity or a NaN.
  KVS_DEV bool HoldsNonFinite() const {
    const std::uint32_t ones = HalfExponent(kHalf);
    bool bad = false;
    KVS_NO_UNROLL
    for (int i = thread_ % 32; i < kTileRows * kHeadDim / 2; i += 32) {
      const std::uint32_t pair = LoadWord(v_ + i * 4);
      bad |= (pair & ones) == ones || (pair >> 16 & ones) == ones;
    }
    return bad;
  }

  // The same products with each row's unseen values as zeros: 0 * inf is not 0. Row by row of the warp, because the
  // values are an operand that all rows share; a row keeps its own result only. Rare, so its loops are not unrolled and
  // its sums lie in memory: the registers are the common path's.
  KVS_DEV void AddValuesByRow(const std::uint32_t (&p)[kKeySteps][4], const std::uint64_t (&masks)[2]) {
    const int l = thread_ % 32;
    float out[kOutTiles][4];
    std::uint32_t weights[kKeySteps][4];
    KVS_UNROLL
    for (int i = 0; i < kOutTiles * 4; ++i) out[i / 4][i % 4] = out_[i / 4][i % 4];
    KVS_UNROLL
    for (int i = 0; i < kKeySteps * 4; ++i) weights[i / 4][i % 4] = p[i / 4][i % 4];
    KVS_NO_UNROLL
    for (int row = 0; row < 16; ++row) {
      // The mask of this row is held by the lanes with g = row % 8.
      const std::uint64_t mask = lane_.Broadcast(row < 8 ? masks[0] : masks[1], row % 8 * 4) >> (2 * t_);
      KVS_NO_UNROLL
      for (int n = 0; n < kOutTiles; n += 2) {
        float sums[2][4];
        KVS_UNROLL
        for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] = out[n + i / 4][i % 4];
        KVS_NO_UNROLL
        for (int step = 0; step < kKeySteps; ++step) {
          std::uint32_t v[4];
          lane_.LoadMatrix4Transposed(v, Chunk(v_, step * 16 + l % 16, n + l / 16));
          KVS_UNROLL
          for (int i = 0; i < 4; ++i) v[i] = KeepSeen(v[i], mask >> (step * 16 + i % 2 * 8));
          lane_.template Mma<kHalf>(sums[0], weights[step], v[0], v[1]);
          lane_.template Mma<kHalf>(sums[1], weights[step], v[2], v[3]);
        }
        KVS_UNROLL
        for (int i = 0; i < 8; ++i) {
          if (g_ == row % 8 && i % 4 / 2 == row / 8) out[n + i / 4][i % 4] = sums[i / 4][i % 4];
        }
      }
    }
    KVS_UNROLL
    for (int i = 0; i < kOutTiles * 4; ++i) out_[i / 4][i % 4] = out[i / 4][i % 4];
  }
  KVS_DEV static std::uint32_t KeepSeen(std::uint32_t pair, std::uint64_t seen) {
    return ((seen & 1) != 0 ? pair & 0xffffu : 0u) | ((seen & 2) != 0 ? pair & 0xffff0000u : 0u);
  }

  // total <- total (+) part; the arithmetic of FoldPartial in merge_block.h. Each thread's totals are its own, in
  // shared memory to leave registers to the sums.
  KVS_DEV void Fold() {
    float* total = reinterpret_cast<float*>(lane_.shared() + Shared::kTotal) + thread_;
    KVS_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (max_[i] == NoKeySeen()) continue;
      const bool begins = total_max_[i] == NoKeySeen();
      const float m = begins ? max_[i] : lane_.MaxOrNan(total_max_[i], max_[i]);
      const float a = begins ? 0.0f : lane_.Exp2(total_max_[i] - m);
      const float b = begins ? 1.0f : lane_.Exp2(max_[i] - m);
      KVS_UNROLL
      for (int n = 0; n < kOutTiles; ++n) {
        KVS_UNROLL
        for (int c = 2 * i; c < 2 * i + 2; ++c) {
          float& x = total[(n * 4 + c) * kAttentionThreads];
          x = begins ? out_[n][c] : lane_.Fma(out_[n][c], b, x * a);
        }
      }
      total_sum_[i] = begins ? sum_[i] : lane_.Fma(sum_[i], b, total_sum_[i] * a);
      total_max_[i] = m;
    }
  }

  KVS_DEV void StoreFinal() {
    const float* total = reinterpret_cast<const float*>(lane_.shared() + Shared::kTotal) + thread_;
    KVS_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (!RowLives(i)) continue;
      const std::int64_t packed = Packed(warp_row_ + g_ + 8 * i);
      const bool none = total_max_[i] == NoKeySeen();
      const float inverse = none ? 0.0f : 1.0f / total_sum_[i];
      const std::int64_t at = packed / a_.group * a_.out_stride +
                              (static_cast<std::int64_t>(head_) * a_.group + packed % a_.group) * kHeadDim;
      KVS_UNROLL
      for (int n = 0; n < kOutTiles; ++n) {
        float x[2];
        KVS_UNROLL
        for (int c = 0; c < 2; ++c) {
          x[c] = none ? 0.0f : total[(n * 4 + 2 * i + c) * kAttentionThreads] * inverse + 0.0f;
        }
        StorePair(at + n * 8 + 2 * t_, x);
      }
    }
  }
  KVS_DEV void StorePair(std::int64_t at, const float (&x)[2]) const {
    if (a_.out_dtype != DType::kF32) {
      StoreWord(static_cast<std::uint16_t*>(a_.out) + at, lane_.template Pack<kHalf>(x[0], x[1]));
    } else {
      float* out = static_cast<float*>(a_.out) + at;
      out[0] = x[0];
      out[1] = x[1];
    }
  }

  KVS_DEV void StorePartial(const SegmentView& s) const {
    KVS_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (!RowLives(i)) continue;
      const std::int64_t index =
          PartialIndex(s, a_.group, a_.pages.kv_heads, item_.split, head_, Packed(warp_row_ + g_ + 8 * i));
      KVS_UNROLL
      for (int n = 0; n < kOutTiles; ++n) {
        float* to = a_.partial_out + index * kHeadDim + n * 8 + 2 * t_;
        to[0] = out_[n][2 * i];
        to[1] = out_[n][2 * i + 1];
      }
      if (t_ == 0) {
        a_.partial_stats[2 * index] = sum_[i];
        a_.partial_stats[2 * index + 1] = max_[i];
      }
    }
  }

  const AttentionArgs& a_;
  Lane& lane_;
  WorkItem item_;
  int head_, thread_, warp_row_, g_, t_;
  std::byte* q_;
  std::byte* k_;
  std::byte* v_;
  RowRange* seen_;
  float out_[kOutTiles][4];  // of rows warp_row_ + g_ (0, 1) and + 8 (2, 3)
  float sum_[2], max_[2], total_sum_[2], total_max_[2];
};

}  // namespace kvshare::kernels::cuda

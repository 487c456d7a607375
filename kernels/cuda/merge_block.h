// The fold of a row's partial results, left to right over splits and then over segments: one warp for each packed row
// of a kv head, each lane every 32nd output.
#pragma once

#include "kernels/cuda/attention_args.h"

namespace kvshare::kernels::cuda {

inline constexpr int kMergeThreads = 128;

// Sum and reference of a row; FoldFactors says what total and part are multiplied with.
struct FoldState {
  float sum = 0;
  float max = NoKeySeen();
};
struct FoldFactors {
  bool begins;  // total <- part
  float total;
  float part;
};

template <class Lane>
KVS_DEV FoldFactors FoldPartial(Lane& lane, FoldState& total, const FoldState& part) {
  if (total.max == NoKeySeen()) {
    total = part;
    return {true, 0.0f, 1.0f};
  }
  const float m = lane.MaxOrNan(total.max, part.max);
  const FoldFactors f{false, lane.Exp2(total.max - m), lane.Exp2(part.max - m)};
  total.sum = lane.Fma(part.sum, f.part, total.sum * f.total);
  total.max = m;
  return f;
}

// Blocks in x: (packed rows + 3) / 4; kv heads in y.
template <class Lane, int kHeadDim>
KVS_DEV void MergeBlock(const AttentionArgs& a, std::int64_t packed_rows, Lane& lane) {
  constexpr int kEach = kHeadDim / 32;
  const std::int64_t packed = static_cast<std::int64_t>(lane.block_x()) * (kMergeThreads / 32) + lane.thread() / 32;
  if (packed >= packed_rows) return;
  const int l = lane.thread() % 32, head = lane.block_y();
  const std::int64_t token = packed / a.group;
  FoldState total;
  float out[kEach];
  for (int j = 0; j < kEach; ++j) out[j] = 0;
  for (int n = 0; n < a.num_segments; ++n) {
    const SegmentView& s = a.segments[n];
    if (token < s.row_begin || token >= s.row_end) continue;
    const RowRange seen = SeenRows(s, a.positions[token], a.window);
    if (seen.end <= seen.begin) continue;
    for (std::int64_t u = seen.begin / kSplitRows; u * kSplitRows < seen.end; ++u) {
      const std::int64_t index = PartialIndex(s, a.group, a.pages.kv_heads, u, head, packed);
      const FoldState part{a.partial_stats[2 * index], a.partial_stats[2 * index + 1]};
      if (part.max == NoKeySeen()) continue;
      const FoldFactors f = FoldPartial(lane, total, part);
      const float* from = a.partial_out + index * kHeadDim;
      for (int j = 0; j < kEach; ++j) {
        const float x = from[j * 32 + l];
        out[j] = f.begins ? x : lane.Fma(x, f.part, out[j] * f.total);
      }
    }
  }
  const bool none = total.max == NoKeySeen();
  const float inverse = none ? 0.0f : 1.0f / total.sum;
  const std::int64_t at =
      token * a.out_stride + (static_cast<std::int64_t>(head) * a.group + packed % a.group) * kHeadDim;
  for (int j = 0; j < kEach; ++j) {
    const float x = none ? 0.0f : out[j] * inverse + 0.0f;
    const std::int64_t to = at + j * 32 + l;
    if (a.out_dtype == DType::kF32) {
      static_cast<float*>(a.out)[to] = x;
    } else {
      static_cast<std::uint16_t*>(a.out)[to] = static_cast<std::uint16_t>(HalfBits(a.out_dtype, x));
    }
  }
}

}  // namespace kvshare::kernels::cuda

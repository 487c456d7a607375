// KVCOMM's anchors on the device (arXiv 2510.12872; the arithmetic of anchors/anchor_pool.h): how far stored tokens are
// from each anchor, and the anchors' weighted offsets added to them. Each kernel is one block of kRowThreads threads.
//
// Two passes, because a token's weights need its differences over all layers. Either reads every value once, but for
// the tokens' own rows, which are read once for each kAnchorsAtATime anchors (from the second time on out of L2).
#pragma once

#include "kernels/cuda/anchor_args.h"
#include "kernels/cuda/row_ops_block.h"

namespace kvshare::kernels::cuda {

// The 8 channels of a unit: the low run, then the high one.
struct UnitValues {
  float x[8];
};

template <DType kHalf>
KVS_DEV UnitValues Widen(std::uint64_t low, std::uint64_t high) {
  UnitValues v;
  KVS_UNROLL
  for (int i = 0; i < 4; ++i) {
    v.x[i] = FromHalf(kHalf, static_cast<std::uint32_t>(low >> (16 * i)) & 0xffffu);
    v.x[4 + i] = FromHalf(kHalf, static_cast<std::uint32_t>(high >> (16 * i)) & 0xffffu);
  }
  return v;
}
template <DType kHalf>
KVS_DEV void Store4(std::uint16_t* to, const float* x) {
  std::uint64_t word = 0;
  KVS_UNROLL
  for (int i = 0; i < 4; ++i) word |= static_cast<std::uint64_t>(HalfBits(kHalf, x[i])) << (16 * i);
  StoreLong(to, word);
}
// One unit of kAnchorsAtATime anchors as it is coded: loaded all together, so that memory has enough to do. Beyond the
// last anchor the last one again, which nobody looks at.
struct AnchorUnits {
  std::uint32_t low[kAnchorsAtATime], high[kAnchorsAtATime];  // 4 codes
  std::uint16_t low_scale[kAnchorsAtATime], high_scale[kAnchorsAtATime];
};
KVS_DEV AnchorUnits LoadAnchors(const AnchorArgs& a, bool offsets, int first, int layer, int part, std::int64_t token,
                                int head, const ChannelUnit& unit) {
  const int width = a.kv_heads * a.head_dim, low = head * a.head_dim + unit.low, high = head * a.head_dim + unit.high;
  const int scales = (width + kCodedValues - 1) / kCodedValues;
  AnchorUnits units;
  KVS_UNROLL
  for (int n = 0; n < kAnchorsAtATime; ++n) {
    const AnchorView& anchor = a.anchors[first + n < a.count ? first + n : a.count - 1];
    const CodedView values = offsets && anchor.offset.codes != nullptr ? anchor.offset : anchor.base;
    const std::int64_t row = a.AnchorRow(anchor, layer, part, token);
    units.low[n] = LoadWord(values.codes + row * width + low);
    units.high[n] = LoadWord(values.codes + row * width + high);
    units.low_scale[n] = values.scales[row * scales + low / kCodedValues];
    units.high_scale[n] = values.scales[row * scales + high / kCodedValues];
  }
  return units;
}

// weight * scale times each code, as AddQ8 of anchors/q8.h does.
KVS_DEV UnitValues Decode(const AnchorUnits& units, int n, float weight) {
  const float low = weight * FromBf16(units.low_scale[n]), high = weight * FromBf16(units.high_scale[n]);
  UnitValues v;
  KVS_UNROLL
  for (int i = 0; i < 4; ++i) {
    v.x[i] = low * static_cast<float>(static_cast<std::int8_t>(units.low[n] >> (8 * i)));
    v.x[4 + i] = high * static_cast<float>(static_cast<std::int8_t>(units.high[n] >> (8 * i)));
  }
  return v;
}

// Multiplies the pairs of a rotated unit by scale * e^{i angle} (sign 1) or its conjugate (sign -1), as Turn of
// kernels/kv_rows.cc does and with its bits.
KVS_DEV void TurnUnit(const RopeView& rope, std::int64_t position, float sign, float scale, int low, UnitValues& v) {
  KVS_UNROLL
  for (int i = 0; i < 4; ++i) {
    const std::int64_t at = position * rope.half + low + i;
    const float a = v.x[i], b = v.x[4 + i], c = rope.cos[at] * scale, s = sign * rope.sin[at] * scale;
    v.x[i] = a * c - b * s;
    v.x[4 + i] = b * c + a * s;
  }
}

// A unit of a stored token, keys in the canonical frame.
template <DType kHalf>
KVS_DEV UnitValues LoadCanonical(const AnchorArgs& a, std::int64_t token, int layer, int part, int head,
                                 const ChannelUnit& unit) {
  const std::uint16_t* from = a.Head(a.stored[token], layer, part, head);
  UnitValues v = Widen<kHalf>(LoadLong(from + unit.low), LoadLong(from + unit.high));
  if (part == 0 && unit.rotated) {
    const float m = a.rope.cos[0];  // yarn's factor, which the table and the stored key both hold
    TurnUnit(a.rope, a.positions[token], -1.0f, 1.0f / (m * m), unit.low, v);
  }
  return v;
}

// One block of one token's K or V and one group of anchors: sums over all layers, heads and channels. Each thread takes
// every kRowThreads-th unit (layers outermost, then heads, then units), its 8 channels in order; then a tree over the
// warp, then the warps pairwise.
template <class Lane, DType kHalf>
KVS_DEV void AnchorDifferenceBlock(const AnchorArgs& a, Lane& lane) {
  const std::int64_t token = lane.block_x() / 2;
  const int part = lane.block_x() % 2, first = lane.block_y() * kAnchorsAtATime;
  const int head_units = a.head_dim / 8, units = a.kv_heads * head_units;
  float sums[2][kAnchorsAtATime];  // of |difference|, of its square
  KVS_UNROLL
  for (int n = 0; n < kAnchorsAtATime; ++n) sums[0][n] = sums[1][n] = 0;
  KVS_NO_UNROLL
  for (int i = lane.thread(); i < a.layers * units; i += kRowThreads) {
    const int layer = i / units, head = i % units / head_units;
    const ChannelUnit unit = UnitOf(i % head_units, a.rope.half);
    const AnchorUnits anchors = LoadAnchors(a, false, first, layer, part, token, head, unit);
    const UnitValues ours = LoadCanonical<kHalf>(a, token, layer, part, head, unit);
    KVS_UNROLL
    for (int n = 0; n < kAnchorsAtATime; ++n) {
      const UnitValues theirs = Decode(anchors, n, 1.0f);
      KVS_UNROLL
      for (int e = 0; e < 8; ++e) {
        const float difference = ours.x[e] - theirs.x[e];
        sums[0][n] += difference < 0 ? -difference : difference;
        sums[1][n] = lane.Fma(difference, difference, sums[1][n]);
      }
    }
  }
  float* warps = reinterpret_cast<float*>(lane.shared());  // [4 warps][2][kAnchorsAtATime]
  KVS_UNROLL
  for (int k = 0; k < 2; ++k) {
    if (k > part) break;  // keys have no squares
    KVS_UNROLL
    for (int n = 0; n < kAnchorsAtATime; ++n) {
      const float sum = WarpSum(lane, sums[k][n]);
      if (lane.thread() % 32 == 0) warps[(lane.thread() / 32 * 2 + k) * kAnchorsAtATime + n] = sum;
    }
  }
  lane.Sync();
  const int k = lane.thread() / kAnchorsAtATime, n = lane.thread() % kAnchorsAtATime;
  if (k > part || first + n >= a.count) return;
  const float* at = warps + lane.thread();
  constexpr int kWarp = 2 * kAnchorsAtATime;
  const float sum = (at[0] + at[kWarp]) + (at[2 * kWarp] + at[3 * kWarp]);
  if (k == 0) {
    a.differences[(part * a.tokens + token) * a.count + first + n] = sum;
  } else {
    a.squares[token * a.count + first + n] = sum;
  }
}
inline constexpr int kAnchorDifferenceShared = 4 * 2 * kAnchorsAtATime * 4;

// One block an anchor: the root of its squares over all tokens, each thread every kRowThreads-th.
template <class Lane>
KVS_DEV void AnchorDistanceBlock(const AnchorArgs& a, Lane& lane) {
  float sum = 0;
  for (std::int64_t t = lane.thread(); t < a.tokens; t += kRowThreads) sum += a.squares[t * a.count + lane.block_x()];
  sum = WarpSum(lane, sum);
  float* warps = reinterpret_cast<float*>(lane.shared());
  if (lane.thread() % 32 == 0) warps[lane.thread() / 32] = sum;
  lane.Sync();
  if (lane.thread() == 0) a.distances[lane.block_x()] = lane.Sqrt((warps[0] + warps[1]) + (warps[2] + warps[3]));
}

// weights[part][n], in shared memory: the softmax over the anchors that have an offset of their negative mean
// difference from the token; 0 for the others. Sums in the order of the anchors.
template <class Lane>
KVS_DEV void AnchorWeights(const AnchorArgs& a, std::int64_t token, float* weights, Lane& lane) {
  const int part = lane.thread() / kMaxAnchors, n = lane.thread() % kMaxAnchors;
  const float channels = static_cast<float>(a.layers * a.kv_heads * a.head_dim);
  const bool mine = n < a.count && a.anchors[n].offset.codes != nullptr;
  float score = NoKeySeen();
  if (mine) score = -a.differences[(part * a.tokens + token) * a.count + n] / channels;
  float* all = weights + part * kMaxAnchors;
  all[n] = score;
  lane.Sync();
  float top = NoKeySeen();
  for (int i = 0; i < a.count; ++i) top = lane.MaxOrNan(top, all[i]);
  const float exponential = mine ? lane.Exp(score - top) : 0.0f;
  lane.Sync();
  all[n] = exponential;
  lane.Sync();
  float sum = 0;
  for (int i = 0; i < a.count; ++i) sum += all[i];
  lane.Sync();
  all[n] = mine ? exponential / sum : 0.0f;
  lane.Sync();
}
inline constexpr int kAnchorWeightsShared = 2 * kMaxAnchors * 4;

// One block of one token and some layers, K and V: canonical + sum of weight * offset, anchors in order, each product
// rounded by itself; keys turned to where they go. Layer 0 depends on token and position alone and gets no offset. A
// thread reads a unit and writes it, so that a token may go where it stands.
template <class Lane, DType kHalf>
KVS_DEV void ApplyAnchorsBlock(const AnchorArgs& a, Lane& lane) {
  const std::int64_t token = lane.block_x();
  const int begin = lane.block_y() * kLayersAtATime;
  const int end = begin + kLayersAtATime < a.layers ? begin + kLayersAtATime : a.layers;
  float* weights = reinterpret_cast<float*>(lane.shared());
  AnchorWeights(a, token, weights, lane);
  const int head_units = a.head_dim / 8, units = a.kv_heads * head_units;
  KVS_NO_UNROLL
  for (int i = lane.thread(); i < (end - begin) * 2 * units; i += kRowThreads) {
    const int layer = begin + i / (2 * units), part = i / units % 2, head = i % units / head_units;
    const ChannelUnit unit = UnitOf(i % head_units, a.rope.half);
    UnitValues v = LoadCanonical<kHalf>(a, token, layer, part, head, unit);
    KVS_NO_UNROLL
    for (int first = 0; layer > 0 && first < a.count; first += kAnchorsAtATime) {
      const AnchorUnits offsets = LoadAnchors(a, true, first, layer, part, token, head, unit);
      KVS_UNROLL
      for (int n = 0; n < kAnchorsAtATime; ++n) {
        if (first + n >= a.count || a.anchors[first + n].offset.codes == nullptr) continue;
        const float weight = weights[part * kMaxAnchors + first + n];
        const UnitValues offset = Decode(offsets, n, weight);
        KVS_UNROLL
        for (int e = 0; e < 8; ++e) v.x[e] += offset.x[e];
      }
    }
    if (part == 0 && unit.rotated) TurnUnit(a.rope, a.to_positions[token], 1.0f, 1.0f, unit.low, v);
    std::uint16_t* to = a.Head(a.to[token], layer, part, head);
    Store4<kHalf>(to + unit.low, v.x);
    Store4<kHalf>(to + unit.high, v.x + 4);
  }
}

}  // namespace kvshare::kernels::cuda

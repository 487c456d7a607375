// What the CUDA kernels of KVCOMM's anchors are handed, and how the channels of a row are dealt out.
#pragma once

#include "kernels/cuda/mover_args.h"

namespace kvshare::kernels::cuda {

// AnchorKv as the device reads it.
struct CodedView {
  const std::int8_t* codes = nullptr;
  const std::uint16_t* scales = nullptr;
};
struct AnchorView {
  CodedView base;
  CodedView offset;  // null: takes no part in the correction
  std::int64_t tokens = 0;
};
inline constexpr int kCodedValues = 32;  // of one scale

// Anchors whose sums a block keeps in registers at a time: their loads are in flight together.
inline constexpr int kAnchorsAtATime = 8;
inline constexpr int kMaxAnchors = 64;  // weights of K and of V are one thread's each in a block of kRowThreads

// Layers that a block corrects: its token's weights are the same for all, and to compute them takes several barriers.
inline constexpr int kLayersAtATime = 4;

struct AnchorArgs {
  std::byte* pages = nullptr;
  std::int64_t page_bytes = 0;
  std::int64_t slab_bytes = 0;
  int layers = 0;
  int kv_heads = 0;
  int head_dim = 0;
  DType dtype = DType::kBf16;  // of the pages; or kF16
  RopeView rope;
  const SlotView* stored = nullptr;         // [tokens]
  const std::int64_t* positions = nullptr;  // [tokens]
  std::int64_t tokens = 0;
  const AnchorView* anchors = nullptr;
  int count = 0;
  float* differences = nullptr;  // [K, V][tokens][count]
  // Distances alone. Blocks: 2 * tokens in x, groups of kAnchorsAtATime in y; then an anchor each.
  float* squares = nullptr;    // [tokens][count], of V
  float* distances = nullptr;  // [count]
  // Correction alone. Blocks: tokens in x, groups of kLayersAtATime in y.
  const SlotView* to = nullptr;  // [tokens]
  const std::int64_t* to_positions = nullptr;

  KVS_HD std::uint16_t* Head(const SlotView& slot, int layer, int part, int head) const {
    const std::int64_t slab = (std::int64_t{layer} * 2 + part) * kv_heads + head;
    return reinterpret_cast<std::uint16_t*>(pages + slot.page * page_bytes + slab * slab_bytes) +
           static_cast<std::int64_t>(slot.offset) * head_dim;
  }
  // A token's row of one layer among an anchor's rows.
  KVS_HD std::int64_t AnchorRow(const AnchorView& anchor, int layer, int part, std::int64_t token) const {
    return (std::int64_t{layer} * 2 + part) * anchor.tokens + token;
  }
};

// A unit of a head: two runs of 4 channels, of which those of a rotated unit turn together (j with j + half), so that
// one thread holds whole pairs; a run has one scale. head_dim / 8 units make up a head.
struct ChannelUnit {
  int low;  // first channel of either run
  int high;
  bool rotated;
};
KVS_HD ChannelUnit UnitOf(int unit, int half) {
  if (unit < half / 4) return {4 * unit, 4 * unit + half, true};
  const int low = 2 * half + 8 * (unit - half / 4);
  return {low, low + 4, false};
}

}  // namespace kvshare::kernels::cuda

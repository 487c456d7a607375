// LayerHook: what lets a policy look into a forward pass and steer it, without the runtime knowing any policy
// (docs/design/selective-forward.md). Called once a layer, after q, k and v are computed, normalised and stored and
// before attention reads anything.
//
// Where the host does not read the backend's memory (Capabilities::host_memory), q, k, v, the pages and the RoPE table
// are addresses there, and what they hold may only be on its way: a hook enqueues work on them (kernels/device_kv.h),
// or copies by Download, and does not follow them. Indices, positions, slots and segments are the host's everywhere.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "kernels/paged_kv.h"
#include "libkvshare/core/check.h"

namespace kvshare::runtime {

// One layer of a step, as it stands before attention. Views hold until OnLayer returns.
struct LayerRows {
  // [n] each: the rows still in the step, in ascending order of the batch.
  std::span<const std::int64_t> rows;       // index of each in the batch that was given to Forward
  std::span<const std::int64_t> positions;  // absolute
  // Where K and V were stored in this layer, or kNoSlot. A new value holds from the next layer on.
  std::span<kernels::KvSlot> slots;

  // In the backend's memory.
  kernels::MatrixView x;  // [n, hidden] fp32: the residual stream as it enters this layer
  kernels::MatrixView q;  // [n, num_heads * head_dim] fp32, after QK-norm, un-rotated
  kernels::MatrixView k;  // [n, num_kv_heads * head_dim] fp32, after QK-norm, un-rotated: the canonical frame
  kernels::MatrixView v;  // [n, num_kv_heads * head_dim] fp32

  // What the rows see: those of all layers, of which the ones that are SeenIn this one count here. Once changed, they
  // are changed for this layer and all later ones. Row ranges count the n rows above. Spans that the hook puts in
  // (pages, skip, positions) must stay valid until Forward returns.
  std::vector<kernels::KvSegment>* segments = nullptr;

  // Stored rows of any layer may be read and overwritten, `slots` of this layer among them. In the backend's memory, as
  // is the table.
  kernels::KvPages pages;
  kernels::RopeTable rope;
  int num_heads = 0;
  float scale = 0;          // of scores
  std::int64_t window = 0;  // sliding window, 0 = none

  // The attention that this layer would now compute (without its output): what kernels::AttentionMass takes. Requires
  // that all segments are seen in this layer.
  kernels::AttentionParams attention(int layer) const {
    for (const kernels::KvSegment& segment : *segments) KVS_CHECK(kernels::SeenIn(segment, layer));
    return {.q = q,
            .num_heads = num_heads,
            .layer = layer,
            .scale = scale,
            .window = window,
            .rope = rope,
            .positions = positions,
            .segments = *segments,
            .pages = pages,
            .out = {}};
  }
};

class LayerHook {
 public:
  virtual ~LayerHook() = default;

  // Returns the rows that go on, as ascending indices into the n rows; nullopt: all of them. The others take no part in
  // this layer's attention nor in anything after it; their stored K and V stay where they are. Row ranges of segments
  // are in terms of the n rows even when fewer go on. Rows whose logits are wanted must go on; at least one row must,
  // unless no logits are wanted, when an empty list ends the step.
  virtual std::optional<std::vector<std::int64_t>> OnLayer(int layer, const LayerRows& rows) = 0;
};

}  // namespace kvshare::runtime

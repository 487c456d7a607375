// ForwardBatch: one step of work for the model. Rows are tokens: prefill chunks and decode rows of any number of
// sequences, side by side. Because every row's result depends on its own tokens and positions alone
// (docs/ARCHITECTURE.md), what shares a batch is a question of speed only.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/paged_kv.h"
#include "kvshare/types.h"
#include "runtime/layer_gate.h"
#include "runtime/layer_hook.h"

namespace kvshare::runtime {

struct ForwardBatch {
  std::vector<TokenId> ids;             // [T]
  std::vector<std::int64_t> positions;  // [T] absolute, < max_positions
  std::vector<kernels::KvSlot> slots;   // [T] where each row's K and V are written; kNoSlot: nowhere
  // What the rows see, including the rows themselves (their slots lie in the segments' pages).
  std::vector<kernels::KvSegment> segments;
  std::vector<std::int64_t> logit_rows;  // rows whose logits are wanted, ascending

  // Called in every layer before attention; null: none, at no cost. Not owned.
  LayerHook* hook = nullptr;
  // Called before every layer, when stored KV may still be on its way; null: it is all there. Not owned.
  LayerGate* gate = nullptr;
  // >= 0: layers before this one are computed whole, of this one only q, k and v (stored, and shown to the hook), and
  // the step ends; logit_rows must be empty. What a policy needs to see how far stored KV is off. -1: all layers.
  int stop_after_layer = -1;
  // >= 0: the rows go on where a step ended that stopped after this layer: row i with the residual stream and the query
  // of resumed_rows[i], which a hook has copied there (LayerRows::x and q, in the backend's memory). K and V of this
  // layer and of those below are stored by then. The hook is called from the next layer on; `ids` are not looked at.
  int resume_after_layer = -1;
  kernels::MatrixView residual;            // [any, hidden] fp32
  kernels::MatrixView queries;             // [any, num_heads * head_dim] fp32
  std::vector<std::int32_t> resumed_rows;  // [T]
};

}  // namespace kvshare::runtime

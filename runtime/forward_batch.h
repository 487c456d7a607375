// ForwardBatch: one step of work for the model. Rows are tokens: prefill chunks and decode rows of any number of
// sequences, side by side. Because every row's result depends on its own tokens and positions alone (DESIGN.md §4),
// what shares a batch is a question of speed only.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/paged_kv.h"
#include "kvshare/types.h"

namespace kvshare::runtime {

struct ForwardBatch {
  std::vector<TokenId> ids;             // [T]
  std::vector<std::int64_t> positions;  // [T] absolute, < max_positions
  std::vector<kernels::KvSlot> slots;   // [T] where each row's K and V are written
  // What the rows see, including the rows themselves (their slots lie in the segments' pages).
  std::vector<kernels::KvSegment> segments;
  std::vector<std::int64_t> logit_rows;  // rows whose logits are wanted, ascending
};

}  // namespace kvshare::runtime

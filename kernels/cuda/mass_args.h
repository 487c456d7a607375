// What the CUDA kernels of attention mass are handed (kernels/attention_mass.h).
#pragma once

#include "kernels/cuda/attention_args.h"

namespace kvshare::kernels::cuda {

// One split of one segment that somebody asks about, and the items that have looked at it, ascending by their rows.
struct MassColumn {
  int segment = 0;
  int split = 0;
  int item_begin = 0;
  int item_end = 0;
  float* mass = nullptr;  // [length] of the segment
};

struct MassArgs {
  // Of the looking rows alone, in the spread schedule: every item has one segment and one split. partial_stats hold
  // what each split gives a row; `out` and `partial_out` are not used.
  AttentionArgs attention;
  const std::int64_t* q_rows = nullptr;  // [looking rows]: where their queries are
  std::int64_t packed_rows = 0;          // looking rows * group
  int items = 0;
  int asked_items = 0;      // those of segments that somebody asks about; they come first
  float* totals = nullptr;  // [kv heads][packed rows][2]: the row's greatest score, 1 / its sum of weights
  float* shares = nullptr;  // [asked items][kv heads][kSplitRows]: what the item's rows give each page row of its split
  const MassColumn* columns = nullptr;
  int num_columns = 0;
};

}  // namespace kvshare::kernels::cuda

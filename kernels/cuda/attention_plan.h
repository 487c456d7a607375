// Which blocks attention runs, and in which of its two schedules (docs/design/cuda.md). Host arithmetic alone.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/attention_args.h"

namespace kvshare::kernels::cuda {

struct AttentionPlan {
  bool spread = false;
  std::vector<WorkItem> items;        // dearest first
  std::vector<SegmentView> segments;  // without device pointers
  std::int64_t partials = 0;          // rows of partial results; spread only
};

struct PlanLimits {
  // Spread is taken up to this many bytes of partials. 64 MiB is about what 64 agents decode with at 16 K tokens
  // (32 heads of 128, 17 splits: 18 MB), and far less than a prefill would make.
  std::int64_t spread_bytes = 64 << 20;
};

// One layer of a pool's pages, as kernels address them.
PageView ViewOf(const KvPages& pages, int layer);

// Requires what AttentionParams requires; checks it.
AttentionPlan PlanAttention(const AttentionParams& p, const PlanLimits& limits);

}  // namespace kvshare::kernels::cuda

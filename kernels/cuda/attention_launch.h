// The tables of attention as the device reads them.
#pragma once

#include "kernels/cuda/attention_plan.h"
#include "kernels/cuda/device_memory.h"

namespace kvshare::kernels::cuda {

// Copies the tables of `p` and of its plan through `staging`, with room for `more_bytes` that the caller puts behind
// them, and sets what `args` has of them and of `p`. Not set: what a kernel writes.
Status StageAttention(const AttentionParams& p, AttentionPlan* plan, std::size_t more_bytes, Staging& staging,
                      AttentionArgs* args);

}  // namespace kvshare::kernels::cuda

#include "kernels/cuda/attention_launch.h"

#include "libkvshare/core/status_macros.h"

namespace kvshare::kernels::cuda {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;

}  // namespace

Status StageAttention(const AttentionParams& p, AttentionPlan* plan, std::size_t more_bytes, Staging& staging,
                      AttentionArgs* args) {
  std::size_t bytes = more_bytes + StagedBytes(p.positions) +
                      StagedBytes(std::span<const SegmentView>(plan->segments)) +
                      StagedBytes(std::span<const WorkItem>(plan->items));
  for (const KvSegment& s : p.segments) bytes += StagedBytes(s.pages) + StagedBytes(s.skip) + StagedBytes(s.positions);
  KVS_RETURN_IF_ERROR(staging.Begin(bytes));
  for (std::size_t n = 0; n < plan->segments.size(); ++n) {
    const KvSegment& s = p.segments[n];
    KVS_ASSIGN_OR_RETURN(plan->segments[n].pages, staging.Put(s.pages));
    KVS_ASSIGN_OR_RETURN(plan->segments[n].skip, staging.Put(s.skip));
    KVS_ASSIGN_OR_RETURN(plan->segments[n].positions, staging.Put(s.positions));
  }
  KVS_ASSIGN_OR_RETURN(args->positions, staging.Put(p.positions));
  KVS_ASSIGN_OR_RETURN(args->segments, staging.Put(std::span<const SegmentView>(plan->segments)));
  KVS_ASSIGN_OR_RETURN(args->items, staging.Put(std::span<const WorkItem>(plan->items)));
  args->q = p.q.row<float>(0);
  args->q_stride = p.q.stride;
  args->group = p.num_heads / p.pages.layout.num_kv_heads;
  args->q_scale = p.scale * kLog2E;
  args->window = p.window;
  args->rope = {p.rope.cos.data(), p.rope.sin.data(), p.rope.positions, p.rope.half};
  args->num_segments = static_cast<int>(plan->segments.size());
  args->pages = ViewOf(p.pages, p.layer);
  return OkStatus();
}

}  // namespace kvshare::kernels::cuda

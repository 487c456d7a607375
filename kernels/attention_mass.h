// Attention mass: how much of their attention some rows give to each key. What repair policies rank tokens by; the
// forward pass does not need it.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/backend.h"

namespace kvshare::kernels {

// For every key t of segment s, adds to mass[s][t] the sum over the query rows `rows` and all heads of
//   softmax_j(scale * <R(pos_i - shift_s) q[i, h], k_j>)[t]
// over the keys j that row i sees in `p.segments`, by the rule of AttentionParams. A key that no row sees gets nothing,
// so what is added sums up to at most rows.size() * num_heads.
//
// `rows`: indices into p.q and p.positions. `mass`: one span per segment of p.segments, of the segment's length, or
// empty where nobody asks (its keys still take part in the softmax). p.out is not used.
// The pages must lie in memory that the host reads. Runs on the calling thread; scratch of one kv head's scores.
// `isa` is for tests and must be one that this machine has. The scores are those that attention itself computes with
// it. Cost: about 2 * num_heads * head_dim FLOP and num_heads exponentials per row and visible key.
void AttentionMass(const AttentionParams& p, std::span<const std::int64_t> rows, std::span<const std::span<float>> mass,
                   CpuIsa isa = CpuIsa::kAuto);

}  // namespace kvshare::kernels

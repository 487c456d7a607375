// Attention of rows over paged segments on the CPU. The contract is AttentionParams in kernels/backend.h; the plan,
// the order of computation and the proof that it is batch-invariant are in docs/design/attention.md.
#pragma once

#include "kernels/backend.h"

namespace kvshare::kernels {

class ThreadPool;

// Computes p.out for every row. `isa` is a version this machine has, not kAuto.
//
// Requires: head_dim a multiple of 8 and <= 256; every segment's pages cover its length; positions - shift of rows
// that see a key from 0 to twice the RoPE table's last position. Rows that see no key get zeros. V of a key that no row
// may see (beyond a segment's length, or skipped) is never read into a sum, whatever bytes lie there. Blocks until
// done; uses the pool's threads; scratch is kept per thread from call to call. Cost: reads each visible page once per
// tile of rows; 4 * num_heads * head_dim FLOP per row and visible key.
void CpuAttention(const AttentionParams& p, CpuIsa isa, ThreadPool& pool);

}  // namespace kvshare::kernels

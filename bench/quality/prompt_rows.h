// K and V of every token of a prompt, computed alone: what programs that look into KV compare.
#pragma once

#include <span>

#include "anchors/anchor_pool.h"
#include "runtime/model.h"

namespace kvshare::quality {

// [layers][K, V][ids][width] in fp32, K canonical, as they are before they are rounded to the pages' dtype. In one
// step: at most max_batch_rows() tokens. Requires a backend whose memory the host reads.
Result<anchors::KvBlock> PromptRows(runtime::Model& model, std::span<const TokenId> ids);

// Of row `token` of two such blocks in one layer; part 0 is K, 1 is V.
double SquaredDistance(const anchors::KvBlock& a, std::int64_t a_token, const anchors::KvBlock& b, std::int64_t b_token,
                       int layer, int part);

}  // namespace kvshare::quality

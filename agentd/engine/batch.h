// From a step's work to the model's batch: which rows, and which stored keys each of them sees.
#pragma once

#include <cstdint>
#include <span>

#include "agentd/engine/sequence.h"
#include "runtime/forward_batch.h"

namespace kvshare::agentd {

// Rows [begin, begin + count) of one sequence in this step; the last row's logits, if wanted, are row `logits_row`.
struct Work {
  Sequence* sequence = nullptr;
  std::int64_t begin = 0;
  std::int64_t count = 0;
  std::int64_t logits_row = -1;
};

// Fills `batch` with the rows of `work`, in order, and tells each work where its logits will be. The sequences' page
// tables must cover their rows, and stay where they are while the batch is in use.
void BuildBatch(std::span<Work> work, runtime::ForwardBatch* batch);

}  // namespace kvshare::agentd

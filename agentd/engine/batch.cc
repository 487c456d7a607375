#include "agentd/engine/batch.h"

#include <cstddef>

namespace kvshare::agentd {
namespace {

// What the rows [row_begin, row_begin + work.count) of the batch see: the one place where a sequence becomes segments.
//
// One segment from position 0, whoever computed its pages: where splits fall, and so the bits, is the same for all.
void AddSegments(const Work& work, std::int64_t row_begin, runtime::ForwardBatch* batch) {
  kernels::KvSegment segment;
  segment.length = work.begin + work.count;
  const auto pages = static_cast<std::size_t>((segment.length + kPageTokens - 1) / kPageTokens);
  segment.pages = work.sequence->kv.pages().first(pages);
  segment.row_begin = row_begin;
  segment.row_end = row_begin + work.count;
  batch->segments.push_back(segment);
}

void AddRows(const Work& work, runtime::ForwardBatch* batch) {
  const Sequence& sequence = *work.sequence;
  const auto pages = sequence.kv.pages();
  for (std::int64_t t = work.begin; t < work.begin + work.count; ++t) {
    batch->ids.push_back(sequence.tokens[static_cast<std::size_t>(t)]);
    batch->positions.push_back(t);
    batch->slots.push_back(
        {.page = pages[static_cast<std::size_t>(t / kPageTokens)], .offset = static_cast<int>(t % kPageTokens)});
  }
}

}  // namespace

void BuildBatch(std::span<Work> work, runtime::ForwardBatch* batch) {
  batch->ids.clear();
  batch->positions.clear();
  batch->slots.clear();
  batch->segments.clear();
  batch->logit_rows.clear();
  for (Work& w : work) {
    const auto row_begin = static_cast<std::int64_t>(batch->ids.size());
    if (MovedPrompt* moved = w.sequence->moved.prompt.get(); moved != nullptr) {
      moved->AddRow(w.sequence->tokens.back(), batch);
    } else {
      AddRows(w, batch);
      AddSegments(w, row_begin, batch);
    }
    const bool to_the_end = w.begin + w.count == static_cast<std::int64_t>(w.sequence->tokens.size());
    if (!to_the_end || w.sequence->request.max_tokens == 0) continue;
    w.logits_row = static_cast<std::int64_t>(batch->logit_rows.size());
    batch->logit_rows.push_back(row_begin + w.count - 1);
  }
}

}  // namespace kvshare::agentd

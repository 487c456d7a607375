#include "agentd/repair/probe.h"

#include <algorithm>

namespace kvshare::agentd {

MovedPrompt::Probe::Probe(const MovedPrompt* prompt, TokenScores* scores, std::int64_t looking_from, int begin, int end,
                          bool deviations)
    : prompt_(prompt), scores_(scores), looking_from_(looking_from), begin_(begin), end_(end), deviations_(deviations) {
  std::int64_t tokens = 0;
  for (const MovedChunk& chunk : prompt_->chunks_) {
    first_token_.push_back(tokens);
    tokens += chunk.length;
  }
}

std::optional<std::vector<std::int64_t>> MovedPrompt::Probe::OnLayer(int layer, const runtime::LayerRows& rows) {
  if (deviations_ && layer == begin_) Measure(layer, rows);
  if (begin_ <= layer && layer < end_) AddMass(layer, rows);
  return std::nullopt;
}

void MovedPrompt::Probe::AddMass(int layer, const runtime::LayerRows& rows) {
  std::vector<std::int64_t> looking;
  for (std::size_t i = 0; i < rows.positions.size(); ++i) {
    if (rows.positions[i] >= looking_from_) looking.push_back(static_cast<std::int64_t>(i));
  }
  if (looking.empty()) return;
  // The chunks' segments are those with the chunks' pages; the others only take part in the softmax.
  std::vector<std::int64_t> first_token;
  for (const kernels::KvSegment& segment : *rows.segments) {
    const std::int64_t c = segment.positions.empty() ? prompt_->ChunkOf(segment.start) : -1;
    first_token.push_back(c < 0 ? -1 : first_token_[static_cast<std::size_t>(c)]);
  }
  scores_->AddMass(rows.attention(layer), looking, first_token);
}

// The rows of a chunk stand side by side in a step.
void MovedPrompt::Probe::Measure(int layer, const runtime::LayerRows& rows) {
  const auto end = rows.positions.end();
  for (std::size_t c = 0; c < first_token_.size(); ++c) {
    const MovedChunk& chunk = prompt_->chunks_[c];
    const auto first = std::lower_bound(rows.positions.begin(), end, chunk.start);
    const auto last = std::lower_bound(first, end, chunk.start + chunk.length);
    if (first == last) continue;
    std::vector<kernels::KvSlot> stored;
    for (auto position = first; position != last; ++position) stored.push_back(prompt_->StoredSlotOf(*position));
    kernels::MatrixView fresh = rows.v;
    fresh.data = rows.v.row<float>(first - rows.positions.begin());
    fresh.rows = last - first;
    scores_->Measure(fresh, rows.pages, layer, stored, first_token_[c] + *first - chunk.start);
  }
}

}  // namespace kvshare::agentd

#include "agentd/repair/probe.h"

#include "kernels/attention_mass.h"

namespace kvshare::agentd {

using kernels::kPageTokens;

MovedPrompt::Probe::Probe(const MovedPrompt* prompt, std::int64_t looking_from, int begin, int end, bool deviations)
    : prompt_(prompt),
      looking_from_(looking_from),
      begin_(begin),
      end_(end),
      deviations_(deviations),
      mass_(prompt->tokens_.size()),
      deviation_(prompt->tokens_.size()) {}

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
  std::vector<std::span<float>> mass(rows.segments->size());
  for (std::size_t s = 0; s < mass.size(); ++s) {
    const kernels::KvSegment& segment = (*rows.segments)[s];
    if (!segment.positions.empty() || prompt_->ChunkOf(segment.start) < 0) continue;
    mass[s] =
        std::span(mass_).subspan(static_cast<std::size_t>(segment.start), static_cast<std::size_t>(segment.length));
  }
  kernels::AttentionMass(rows.attention(layer), looking, mass);
}

void MovedPrompt::Probe::Measure(int layer, const runtime::LayerRows& rows) {
  std::vector<kernels::KvSlot> stored(rows.positions.size(), kernels::kNoSlot);
  for (std::size_t i = 0; i < stored.size(); ++i) {
    const std::int64_t c = prompt_->ChunkOf(rows.positions[i]);
    if (c < 0) continue;
    const MovedChunk& chunk = prompt_->chunks_[static_cast<std::size_t>(c)];
    const std::int64_t row = chunk.first + rows.positions[i] - chunk.start;
    stored[i] = {chunk.pages[static_cast<std::size_t>(row / kPageTokens)], static_cast<int>(row % kPageTokens)};
  }
  for (std::size_t i = 0; i < stored.size(); ++i) {
    if (stored[i] == kernels::kNoSlot) continue;
    kernels::MatrixView one = rows.v;
    one.data = rows.v.row<float>(static_cast<std::int64_t>(i));
    one.rows = 1;
    kernels::RowDeviation deviation;
    kernels::ValueDeviation(one, rows.pages, layer, std::span(&stored[i], 1), std::span(&deviation, 1));
    deviation_[static_cast<std::size_t>(rows.positions[i])] = deviation.squares;
  }
}

}  // namespace kvshare::agentd

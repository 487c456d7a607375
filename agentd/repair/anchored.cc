// KVCOMM's way through a prompt (arXiv 2510.12872): chunks corrected by anchors, or the whole prompt computed and
// anchors learnt from it. As published it is all or nothing; here nearly all is enough.
#include <algorithm>
#include <iterator>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "agentd/repair/moved_prompt.h"
#include "kernels/kv_rows.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {
namespace {

using kernels::kPageTokens;
using kernels::KvPart;
using kernels::KvSlot;

// Of the tokens that were found. Below it all is computed and taught, so that more can be corrected the next time. Not
// all, as published: a new content is longer than the second longest of three as often as not.
constexpr double kLeastCorrected = 0.75;

class RopeProbe final : public runtime::LayerHook {
 public:
  std::optional<std::vector<std::int64_t>> OnLayer(int, const runtime::LayerRows& rows) override {
    rope = rows.rope;
    return std::nullopt;
  }
  kernels::RopeTable rope;
};

// Canonical K and V of tokens whose KV was stored at position(t) in slot(t).
template <typename SlotAt, typename PositionAt>
anchors::KvRows Rows(const kernels::KvPages& pages, const kernels::RopeTable& rope, std::int64_t tokens, SlotAt slot,
                     PositionAt position) {
  const kernels::KvLayout layout = pages.layout;
  const auto read = [pages, rope, slot, position](int layer, int part, std::int64_t t, std::span<float> row) {
    kernels::LoadRow(pages, layer, part == 0 ? KvPart::kKey : KvPart::kValue, slot(t), row);
    if (part == 0) kernels::CanonicalKey(rope, position(t), pages.layout.head_dim, row);
  };
  return {layout.num_layers, tokens, std::int64_t{layout.num_kv_heads} * layout.head_dim, read};
}

}  // namespace

// The table is the model's and shown to hooks alone: one row, as far as q, k and v of the first layer, fetches it.
Result<kernels::RopeTable> MovedPrompt::Rope() {
  RopeProbe probe;
  KVS_RETURN_IF_ERROR(Compute(std::span(fresh_.positions).first(1), &probe, 0, nullptr, nullptr));
  return probe.rope;
}

anchors::KvRows MovedPrompt::StoredRows(const MovedChunk& chunk, const kernels::RopeTable& rope) const {
  const auto slot = [&chunk](std::int64_t t) {
    const std::int64_t row = chunk.first + t;
    return KvSlot{chunk.pages[static_cast<std::size_t>(row / kPageTokens)], static_cast<int>(row % kPageTokens)};
  };
  return Rows(pages_, rope, chunk.length, slot, [&chunk](std::int64_t t) { return chunk.base + t; });
}

anchors::KvRows MovedPrompt::ComputedRows(const MovedChunk& chunk, const kernels::RopeTable& rope) const {
  KVS_CHECK(plain_);
  return Rows(
      pages_, rope, chunk.length, [this, &chunk](std::int64_t t) { return SlotOf(chunk.start + t); },
      [&chunk](std::int64_t t) { return chunk.start + t; });
}

void MovedPrompt::WriteCorrected(const MovedChunk& chunk, const anchors::KvBlock& block,
                                 const kernels::RopeTable& rope) {
  std::vector<float> key(static_cast<std::size_t>(block.width));
  for (int layer = 0; layer < block.layers; ++layer) {
    for (std::int64_t t = 0; t < block.tokens; ++t) {
      const std::int64_t position = chunk.start + t;
      const auto canonical = block.row(layer, 0, t);
      key.assign(canonical.begin(), canonical.end());
      kernels::StoredKey(rope, position, pages_.layout.head_dim, key);
      kernels::StoreRow(pages_, layer, KvPart::kKey, SlotOf(position), key);
      kernels::StoreRow(pages_, layer, KvPart::kValue, SlotOf(position), block.row(layer, 1, t));
    }
  }
}

// What was computed is registered.
void MovedPrompt::Teach(std::span<const kernels::PageIndex> pages) {
  KVS_CHECK(plain_ && lesson_.has_value());
  const kernels::RopeTable rope = *std::exchange(lesson_, std::nullopt);
  plain_pages_.assign(pages.begin(), pages.end());
  for (const MovedChunk& chunk : chunks_) {
    anchors_->Register(chunk.placeholder, agent_, chunk.content, StoredRows(chunk, rope), ComputedRows(chunk, rope));
  }
}

// Computed and not corrected: a lesson, unless it is too much to be kept.
Status MovedPrompt::PrefillToTeach(const kernels::RopeTable& rope, float* logits) {
  KVS_RETURN_IF_ERROR(PrefillPlain("no_anchor", logits));
  const kernels::KvLayout& layout = pages_.layout;
  const std::int64_t width = std::int64_t{layout.num_kv_heads} * layout.head_dim;
  if (anchors_->HasRoomFor(layout.num_layers, MovedTokens(), width)) lesson_ = rope;
  return OkStatus();
}

// Of every chunk as many tokens as its anchors reach, unless they do not resemble it, are corrected; the others, if
// they are few, are computed. Where a chunk has no anchors it gets some.
Status MovedPrompt::PrefillWithAnchors(float* logits) {
  KVS_ASSIGN_OR_RETURN(const kernels::RopeTable rope, Rope());
  std::vector<std::int64_t> reach;
  for (const MovedChunk& chunk : chunks_) {
    reach.push_back(std::min(chunk.length, anchors_->Reach(chunk.placeholder, agent_)));
    if (reach.back() == 0) return PrefillToTeach(rope, logits);
  }
  const auto enough = [&] {
    const auto corrected = std::accumulate(reach.begin(), reach.end(), std::int64_t{0});
    return static_cast<double>(corrected) >= kLeastCorrected * static_cast<double>(MovedTokens());
  };
  std::vector<anchors::KvBlock> stored(chunks_.size());
  for (std::size_t c = 0; c < chunks_.size() && enough(); ++c) {
    if (reach[c] == 0) continue;
    anchors::KvRows rows = StoredRows(chunks_[c], rope);
    rows.tokens = reach[c];
    stored[c] = rows.ToBlock();
    if (!anchors_->Shareable(chunks_[c].placeholder, stored[c])) reach[c] = 0;
  }
  if (!enough()) return PrefillToTeach(rope, logits);
  Select(MovedPositions());
  std::vector<std::int64_t> computed;
  for (std::size_t c = 0; c < chunks_.size(); ++c) {
    for (std::int64_t t = reach[c]; t < chunks_[c].length; ++t) computed.push_back(chunks_[c].start + t);
    if (reach[c] == 0) continue;
    anchors_->Correct(chunks_[c].placeholder, agent_, &stored[c]);
    WriteCorrected(chunks_[c], stored[c], rope);
  }
  counts_.recomputed = static_cast<std::int64_t>(computed.size());
  counts_.moved = MovedTokens() - counts_.recomputed;
  Charge(computed, model_->config().num_layers);
  std::vector<std::int64_t> rows = RowsOfTheLead();
  std::merge(fresh_.positions.begin(), fresh_.positions.end(), computed.begin(), computed.end(),
             std::back_inserter(rows));
  return Compute(rows, nullptr, -1, logits, nullptr);
}

}  // namespace kvshare::agentd

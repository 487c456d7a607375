// KVCOMM's way through a prompt (arXiv 2510.12872): every chunk corrected by anchors, or the whole prompt computed and
// anchors learnt from it. All or nothing, as published.
#include <algorithm>
#include <span>
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
    for (std::int64_t t = 0; t < chunk.length; ++t) {
      const std::int64_t position = chunk.start + t;
      const auto canonical = block.row(layer, 0, t);
      key.assign(canonical.begin(), canonical.end());
      kernels::StoredKey(rope, position, pages_.layout.head_dim, key);
      kernels::StoreRow(pages_, layer, KvPart::kKey, SlotOf(position), key);
      kernels::StoreRow(pages_, layer, KvPart::kValue, SlotOf(position), block.row(layer, 1, t));
    }
  }
}

// What was computed is registered, unless it is too much to be kept.
void MovedPrompt::Teach(const kernels::RopeTable& rope) {
  const kernels::KvLayout& layout = pages_.layout;
  const std::int64_t width = std::int64_t{layout.num_kv_heads} * layout.head_dim;
  if (!anchors_->HasRoomFor(layout.num_layers, MovedTokens(), width)) return;
  for (const MovedChunk& chunk : chunks_) {
    anchors_->Register(chunk.placeholder, agent_, chunk.content, StoredRows(chunk, rope), ComputedRows(chunk, rope));
  }
}

Status MovedPrompt::PrefillWithAnchors(float* logits) {
  KVS_ASSIGN_OR_RETURN(const kernels::RopeTable rope, Rope());
  bool shareable = std::all_of(chunks_.begin(), chunks_.end(), [this](const MovedChunk& chunk) {
    return anchors_->MayServe(chunk.placeholder, agent_, chunk.length);
  });
  std::vector<anchors::KvBlock> stored;
  for (std::size_t c = 0; shareable && c < chunks_.size(); ++c) {
    stored.push_back(StoredRows(chunks_[c], rope).ToBlock());
    shareable = anchors_->Shareable(chunks_[c].placeholder, stored[c]);
  }
  if (!shareable) {
    KVS_RETURN_IF_ERROR(PrefillPlain("no_anchor", logits));
    Teach(rope);
    return OkStatus();
  }
  Select(MovedPositions());
  for (std::size_t c = 0; c < chunks_.size(); ++c) {
    anchors_->Correct(chunks_[c].placeholder, agent_, &stored[c]);
    WriteCorrected(chunks_[c], stored[c], rope);
  }
  counts_.moved = MovedTokens();  // corrected, none computed
  counts_.recomputed = 0;
  std::vector<std::int64_t> rows = RowsOfTheLead();
  rows.insert(rows.end(), fresh_.positions.begin(), fresh_.positions.end());
  return Compute(rows, nullptr, -1, logits, nullptr);
}

}  // namespace kvshare::agentd

// KVCOMM's way through a prompt (arXiv 2510.12872): chunks corrected by anchors, or the whole prompt computed and
// anchors learnt from it. As published it is all or nothing; here nearly all is enough.
#include <algorithm>
#include <iterator>
#include <memory>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "agentd/repair/chunk_correction.h"
#include "agentd/repair/moved_prompt.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {
namespace {

using kernels::kPageTokens;

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

// As it is stored.
KvRun RunOf(const MovedChunk& chunk, std::int64_t tokens) {
  return {.pages = chunk.pages, .first = chunk.first, .position = chunk.base, .tokens = tokens};
}

}  // namespace

// The table is the model's and shown to hooks alone: one row, as far as q, k and v of the first layer, fetches it.
Result<kernels::RopeTable> MovedPrompt::Rope() {
  RopeProbe probe;
  KVS_RETURN_IF_ERROR(Compute(std::span(fresh_.positions).first(1), &probe, {.stop_after = 0}, nullptr, nullptr));
  return probe.rope;
}

// What was computed is registered. A device that fails meanwhile says so at the next step; nobody waits for this.
void MovedPrompt::Teach(std::span<const kernels::PageIndex> pages) {
  KVS_CHECK(plain_ && lesson_.has_value());
  const kernels::RopeTable rope = *std::exchange(lesson_, std::nullopt);
  plain_pages_.assign(pages.begin(), pages.end());
  for (const MovedChunk& chunk : chunks_) {
    const KvRun computed{.pages = std::span(plain_pages_).subspan(static_cast<std::size_t>(chunk.start / kPageTokens)),
                         .first = static_cast<int>(chunk.start % kPageTokens),
                         .position = chunk.start,
                         .tokens = chunk.length};
    const Status taught = TeachChunk(model_->backend(), pages_, rope, RunOf(chunk, chunk.length), computed,
                                     chunk.content, anchors_, chunk.placeholder, agent_);
    if (!taught.ok()) return;
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
  std::vector<std::unique_ptr<ChunkCorrection>> corrections(chunks_.size());
  for (std::size_t c = 0; c < chunks_.size() && enough(); ++c) {
    if (reach[c] == 0) continue;
    corrections[c] = NewChunkCorrection(model_->backend(), device_anchors_, pages_, rope, RunOf(chunks_[c], reach[c]),
                                        anchors_, chunks_[c].placeholder, agent_);
    const Result<bool> shareable = corrections[c]->Shareable();
    // A device without room for the anchors is no worse than a chunk without them.
    if (!shareable.ok() && shareable.status().code() != StatusCode::kResourceExhausted) return shareable.status();
    if (!shareable.ok() || !*shareable) reach[c] = 0;
  }
  if (!enough()) return PrefillToTeach(rope, logits);
  Select(MovedPositions());
  std::vector<std::int64_t> computed;
  for (std::size_t c = 0; c < chunks_.size(); ++c) {
    const MovedChunk& chunk = chunks_[c];
    for (std::int64_t t = reach[c]; t < chunk.length; ++t) computed.push_back(chunk.start + t);
    if (reach[c] == 0) continue;
    std::vector<kernels::KvSlot> to;
    for (std::int64_t t = 0; t < reach[c]; ++t) to.push_back(SlotOf(chunk.start + t));
    KVS_RETURN_IF_ERROR(corrections[c]->Write(to, chunk.start));
    corrections[c].reset();
  }
  counts_.recomputed = static_cast<std::int64_t>(computed.size());
  counts_.moved = MovedTokens() - counts_.recomputed;
  Charge(computed, model_->config().num_layers);
  std::vector<std::int64_t> rows = RowsOfTheLead();
  std::merge(fresh_.positions.begin(), fresh_.positions.end(), computed.begin(), computed.end(),
             std::back_inserter(rows));
  return Compute(rows, nullptr, {}, logits, nullptr);
}

}  // namespace kvshare::agentd

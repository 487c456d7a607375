// CacheBlend's gradual filtering (arXiv 2405.16444 §4.3; docs/design/repair.md): the selected tokens go from layer to
// layer, and at each of the first few those whose V is nearest to what is stored are given up.
#include <algorithm>
#include <iterator>
#include <numeric>
#include <utility>

#include "agentd/repair/moved_prompt.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {

// Of a pass over `rows` that stops after `layer`: how far V of those that are selected is from what is stored there,
// and what all of them go on with.
class MovedPrompt::Sieve final : public runtime::LayerHook {
 public:
  // Both ascending; `selected` is part of `rows`, row i of which goes to row i of what `layers` resumes with. All must
  // outlive it.
  Sieve(const MovedPrompt* prompt, TokenScores* scores, std::span<const std::int64_t> rows,
        std::span<const std::int64_t> selected, const Layers& layers)
      : prompt_(prompt), scores_(scores), rows_(rows), selected_(selected), layers_(layers) {}

  std::optional<std::vector<std::int64_t>> OnLayer(int layer, const runtime::LayerRows& rows) override {
    if (layer != layers_.stop_after) return std::nullopt;
    Measure(rows);
    Keep(rows.positions.front(), rows.x, layers_.residual);
    Keep(rows.positions.front(), rows.q, layers_.queries);
    return std::nullopt;
  }

 private:
  // Steps come in order, so what this one writes over has been read: in the pass before no row stood at a lower index.
  void Keep(std::int64_t first_position, const kernels::MatrixView& from, kernels::MatrixView to) {
    to.data = to.row<float>(std::lower_bound(rows_.begin(), rows_.end(), first_position) - rows_.begin());
    to.rows = from.rows;
    std::vector<std::int32_t> all(static_cast<std::size_t>(from.rows));
    std::iota(all.begin(), all.end(), 0);
    prompt_->model_->backend().Embed({.ids = all, .table = from, .out = to});  // which copies rows
  }

  void Measure(const runtime::LayerRows& rows) {
    const auto end = rows.positions.end();
    for (auto first = rows.positions.begin(); first != end;) {
      // As many as stand side by side in the step and among the selected.
      const auto token = std::lower_bound(selected_.begin(), selected_.end(), *first);
      const auto last = std::mismatch(first, end, token, selected_.end()).first;
      if (first == last) {
        ++first;
        continue;
      }
      std::vector<kernels::KvSlot> stored;
      std::transform(first, last, std::back_inserter(stored),
                     [this](std::int64_t position) { return prompt_->StoredSlotOf(position); });
      kernels::MatrixView fresh = rows.v;
      fresh.data = rows.v.row<float>(first - rows.positions.begin());
      fresh.rows = last - first;
      scores_->Measure(fresh, rows.pages, layers_.stop_after, stored, token - selected_.begin());
      first = last;
    }
  }

  const MovedPrompt* const prompt_;
  TokenScores* const scores_;
  const std::span<const std::int64_t> rows_;
  const std::span<const std::int64_t> selected_;
  const Layers& layers_;
};

// Of the moved tokens of CacheBlend and DHD. A pass ends when q, k and v are there of the first layer that some of its
// tokens do not take part in.
std::vector<MovedPrompt::Stage> MovedPrompt::Stages() const {
  const int layers = model_->config().num_layers, check = CheckLayer();
  std::vector<double> filter = options_.mode == ReuseMode::kCacheBlend ? options_.filter : std::vector<double>();
  if (filter.empty()) filter = {1};
  const std::size_t drops = std::min(filter.size() - 1, static_cast<std::size_t>(layers - 1 - check));
  filter.erase(filter.begin(), filter.end() - static_cast<std::ptrdiff_t>(drops) - 1);
  std::vector<Stage> stages;
  for (std::size_t i = 0; i <= drops; ++i) {
    const int leave = check + static_cast<int>(i) + 1;  // the layer at which some leave
    const double share = std::min(filter[i] * Ratio(), 1.0);
    stages.push_back({.first_layer = i == 0 ? 0 : leave,
                      .end_layer = i == drops ? layers : leave + 1,
                      .tokens = static_cast<std::int64_t>(share * static_cast<double>(MovedTokens()))});
  }
  return stages;
}

void MovedPrompt::KeepSelected(std::span<const std::int64_t> positions, int layer) {
  KVS_CHECK(layer > bands_.back().first_layer);
  const auto kept = static_cast<std::int64_t>(positions.size());
  counts_.recomputed = kept;
  counts_.moved = MovedTokens() - kept;
  Band band{.first_layer = layer, .skips = {}, .dropped = {}};
  for (const MovedChunk& chunk : chunks_) band.skips.emplace_back(chunk.pages.size());
  for (const std::int64_t position : positions) SkipStored(position, &band);
  const std::vector<std::int64_t>& all = selected_.positions;
  band.dropped.resize((all.size() + kernels::kPageTokens - 1) / kernels::kPageTokens);
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (std::binary_search(positions.begin(), positions.end(), all[i])) continue;
    band.dropped[i / kernels::kPageTokens] |= std::uint64_t{1} << (i % kernels::kPageTokens);
  }
  if (band.skips != bands_.back().skips) bands_.push_back(std::move(band));
}

// Requires that what the check layer chose is selected. Fresh rows take part in every pass, because those that are
// selected after them see them, and the other way round.
Status MovedPrompt::PrefillGradually(float* logits) {
  const std::vector<Stage> stages = Stages();
  std::vector<std::int64_t> selected = selected_.positions;
  const auto with_fresh = [&] {
    std::vector<std::int64_t> rows = RowsOfTheLead();
    std::merge(fresh_.positions.begin(), fresh_.positions.end(), selected.begin(), selected.end(),
               std::back_inserter(rows));
    return rows;
  };
  std::vector<std::int64_t> rows = with_fresh();
  const runtime::ModelConfig& config = model_->config();
  const std::int64_t count = static_cast<std::int64_t>(rows.size()), hidden = config.hidden_size;
  const std::int64_t width = std::int64_t{config.num_heads} * config.head_dim;
  KVS_ASSIGN_OR_RETURN(const auto memory,
                       model_->backend().Allocate(static_cast<std::size_t>(count * (hidden + width)) * sizeof(float)));
  auto* const values = reinterpret_cast<float*>(memory->data());
  Layers layers{.residual = {values, kernels::DType::kF32, count, hidden, hidden},
                .queries = {values + count * hidden, kernels::DType::kF32, count, width, width}};
  std::vector<std::int32_t> resumed_rows;
  for (std::size_t i = 0; i + 1 < stages.size() && !selected.empty(); ++i) {
    const int layer = stages[i].end_layer - 1;
    layers.stop_after = layer;
    layers.resumed_rows = resumed_rows;
    const auto tokens = static_cast<std::int64_t>(selected.size());
    KVS_ASSIGN_OR_RETURN(const auto scores, NewTokenScores(model_->backend(), tokens, RankBy::kDeviation));
    Sieve sieve(this, scores.get(), rows, selected, layers);
    KVS_RETURN_IF_ERROR(Compute(rows, &sieve, layers, nullptr, nullptr));
    Charge(selected, stages[i].end_layer - stages[i].first_layer);
    KVS_ASSIGN_OR_RETURN(const std::vector<std::int64_t> kept, scores->Choose(stages[i + 1].tokens));
    std::vector<std::int64_t> positions;
    for (const std::int64_t token : kept) positions.push_back(selected[static_cast<std::size_t>(token)]);
    selected = std::move(positions);
    KeepSelected(selected, layer);
    layers.resume_after = layer;
    const std::vector<std::int64_t> before = std::exchange(rows, with_fresh());
    resumed_rows.clear();
    for (const std::int64_t row : rows) {
      resumed_rows.push_back(
          static_cast<std::int32_t>(std::lower_bound(before.begin(), before.end(), row) - before.begin()));
    }
  }
  layers.stop_after = -1;
  layers.resumed_rows = resumed_rows;
  Charge(selected, stages.back().end_layer - stages.back().first_layer);
  return Compute(rows, nullptr, layers, logits, nullptr);
}

}  // namespace kvshare::agentd

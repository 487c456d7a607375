#include "agentd/repair/moved_prompt.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "agentd/repair/probe.h"
#include "anchors/confidence.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"
#include "runtime/forward_batch.h"
#include "runtime/sampler.h"

namespace kvshare::agentd {

using kernels::kPageTokens;
using kernels::KvSegment;
using kernels::KvSlot;
using kernels::PageIndex;

namespace {

// Rows whose attention says what the answer will look at: the end of the prompt, at most so many.
constexpr std::int64_t kSuffixRows = 64;
// CacheBlend's check layer: the first one whose V depends on other tokens.
constexpr int kCheckLayer = 1;
// EPIC recomputes the first tokens of every chunk, at most so many (LegoLink-32 is the paper's largest).
constexpr std::int64_t kEpicTokens = 16;
constexpr double kBlendRatio = 0.15;  // CacheBlend's default
// Of a prompt whose chunks are one thread, and of others (docs/design/repair.md, "Company").
constexpr double kThreadRatio = 0.05;
constexpr double kAutoRatio = 0.20;

std::int64_t PagesFor(std::int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

}  // namespace

KvSlot MovedPrompt::Run::Slot(std::int64_t position) const {
  const auto found = std::lower_bound(positions.begin(), positions.end(), position);
  KVS_CHECK(found != positions.end() && *found == position);
  const std::int64_t index = found - positions.begin();
  return {pages[static_cast<std::size_t>(index / kPageTokens)], static_cast<int>(index % kPageTokens)};
}

MovedPrompt::MovedPrompt(runtime::Model* model, const kernels::KvPages& pages, std::vector<TokenId> prompt,
                         Prefix prefix, std::vector<MovedChunk> chunks, const RepairOptions& options,
                         anchors::AnchorPool* anchors, std::string agent, DeviceAnchors* device_anchors)
    : model_(model),
      pages_(pages),
      tokens_(std::move(prompt)),
      prompt_tokens_(static_cast<std::int64_t>(tokens_.size())),
      prefix_(std::move(prefix)),
      chunks_(std::move(chunks)),
      options_(options),
      anchors_(anchors),
      device_anchors_(device_anchors),
      agent_(std::move(agent)),
      rows_per_step_(model->max_batch_rows()) {
  KVS_CHECK(options_.mode != ReuseMode::kOff && options_.mode != ReuseMode::kExact);
  KVS_CHECK(options_.mode != ReuseMode::kKvcomm || anchors_ != nullptr);
  KVS_CHECK(PagesFor(prefix_.tokens) == static_cast<std::int64_t>(prefix_.pages.size()));
  KVS_CHECK(options_.filter.empty() || options_.filter.back() == 1);
  KVS_CHECK(std::is_sorted(options_.filter.rbegin(), options_.filter.rend()));
  bands_.emplace_back();
  std::int64_t end = prefix_.tokens;
  for (const MovedChunk& chunk : chunks_) {
    KVS_CHECK(chunk.start >= end && chunk.length >= 1 && chunk.base >= 0);
    KVS_CHECK(chunk.first + chunk.length <= static_cast<std::int64_t>(chunk.pages.size()) * kPageTokens);
    end = chunk.start + chunk.length;
    bands_.front().skips.emplace_back(chunk.pages.size());
  }
  KVS_CHECK(end < prompt_tokens_);
  counts_.chunk_pairs.resize(chunks_.size());
}

MovedPrompt::~MovedPrompt() = default;

std::int64_t MovedPrompt::MovedTokens() const {
  std::int64_t tokens = 0;
  for (const MovedChunk& chunk : chunks_) tokens += chunk.length;
  return tokens;
}

double MovedPrompt::Ratio() const {
  if (options_.recompute_ratio >= 0) return std::min(options_.recompute_ratio, 1.0);
  if (options_.mode == ReuseMode::kAuto) return OneThread() ? kThreadRatio : kAutoRatio;
  return options_.mode == ReuseMode::kCacheBlend ? std::max(kBlendRatio, ShareWhileLoading()) : kBlendRatio;
}

// Of the moved tokens, so many that RowsToCompute, were they chosen at once, is rows_while_loading, or a row less than
// computing all takes.
double MovedPrompt::ShareWhileLoading() const {
  const auto moved = static_cast<double>(MovedTokens());
  const auto all = static_cast<double>(prompt_tokens_ - prefix_.tokens);
  const double rows = std::min(static_cast<double>(options_.rows_while_loading), all - 1);
  const double choosing = all * (CheckLayer() + 1) / model_->config().num_layers;
  const double left = rows - choosing - (all - moved);
  return left <= 0 || moved == 0 ? 0 : left / moved;
}

int MovedPrompt::CheckLayer() const { return std::min(kCheckLayer, model_->config().num_layers - 1); }

bool MovedPrompt::OneThread() const {
  return std::all_of(chunks_.begin(), chunks_.end(), [](const MovedChunk& chunk) { return chunk.in_company; });
}

bool MovedPrompt::RunsOnBackend() const {
  const bool looks_at_rows = options_.mode != ReuseMode::kRotate && options_.mode != ReuseMode::kEpic;
  kernels::Backend& backend = model_->backend();
  if (!looks_at_rows || backend.capabilities().host_memory) return true;
  return backend.device_kv() != nullptr && (options_.mode != ReuseMode::kKvcomm || device_anchors_ != nullptr);
}

std::int64_t MovedPrompt::SelectedAtMost() const {
  if (options_.mode == ReuseMode::kRotate) return 0;
  if (options_.mode == ReuseMode::kKvcomm) return MovedTokens();
  if (options_.mode == ReuseMode::kEpic && options_.recompute_ratio < 0) {
    return static_cast<std::int64_t>(chunks_.size()) * kEpicTokens;
  }
  if (Ratio() == 0) return 0;
  if (options_.mode == ReuseMode::kCacheBlend || options_.mode == ReuseMode::kDhd) return Stages().front().tokens;
  return static_cast<std::int64_t>(std::ceil(Ratio() * static_cast<double>(MovedTokens()))) +
         static_cast<std::int64_t>(chunks_.size());
}

std::int64_t MovedPrompt::RowsToCompute() const {
  const std::int64_t fresh = prompt_tokens_ - prefix_.tokens - MovedTokens();
  switch (options_.mode) {
    case ReuseMode::kRotate:
    case ReuseMode::kKvcomm: return fresh;
    case ReuseMode::kCacheBlend:
    case ReuseMode::kDhd: {
      std::int64_t pairs = (fresh + MovedTokens()) * (CheckLayer() + 1);
      for (const Stage& stage : Stages()) pairs += (fresh + stage.tokens) * (stage.end_layer - stage.first_layer);
      const std::int64_t layers = model_->config().num_layers;
      return (pairs + layers - 1) / layers;
    }
    case ReuseMode::kAuto: return fresh + (Ratio() == 0 ? 0 : SelectedAtMost() + (prompt_tokens_ - SuffixBegin()));
    default: return fresh + SelectedAtMost();
  }
}

std::int64_t MovedPrompt::PagesNeeded(std::int64_t new_tokens) const {
  return std::max(PagesToBegin(new_tokens), PagesFor(prompt_tokens_ + new_tokens - prefix_.full_tokens()));
}

std::int64_t MovedPrompt::PagesToBegin(std::int64_t new_tokens) const {
  const std::int64_t lead = PagesFor(lead_tokens() - prefix_.full_tokens());
  const std::int64_t fresh = prompt_tokens_ - lead_tokens() - MovedTokens();
  const std::int64_t moved = lead + PagesFor(fresh + new_tokens) + PagesFor(SelectedAtMost());
  // These may find in Prefill that all has to be computed.
  const bool may_be_plain = chunks_.empty() || Ratio() >= 1 || options_.mode == ReuseMode::kKvcomm;
  return may_be_plain ? std::max(moved, PagesFor(prompt_tokens_ + new_tokens - prefix_.full_tokens())) : moved;
}

void MovedPrompt::GivePages(std::vector<PageIndex> private_pages, std::int64_t new_tokens) {
  KVS_CHECK(plain_pages_.empty() && static_cast<std::int64_t>(private_pages.size()) >= PagesToBegin(new_tokens));
  const std::int64_t full = prefix_.full_tokens() / kPageTokens;
  plain_pages_.assign(prefix_.pages.begin(), prefix_.pages.begin() + full);
  plain_pages_.insert(plain_pages_.end(), private_pages.begin(), private_pages.end());
  const auto lead_end = plain_pages_.begin() + PagesFor(lead_tokens());
  lead_pages_.assign(plain_pages_.begin(), lead_end);
  if (const auto rows = static_cast<int>(prefix_.tokens % kPageTokens); rows > 0) {
    const auto page = static_cast<std::size_t>(full);
    model_->backend().CopyPageRows(pages_, prefix_.pages[page], plain_pages_[page], rows);
  }
  if (chunks_.empty()) return;
  fresh_.positions = FreshPositions();
  const auto fresh_end = lead_end + PagesFor(static_cast<std::int64_t>(fresh_.positions.size()) + new_tokens);
  fresh_.pages.assign(lead_end, fresh_end);
  selected_.pages.assign(fresh_end, plain_pages_.end());
}

void MovedPrompt::GiveMorePages(std::span<const PageIndex> private_pages) {
  plain_pages_.insert(plain_pages_.end(), private_pages.begin(), private_pages.end());
}

std::vector<std::int64_t> MovedPrompt::RowsOfTheLead() const {
  std::vector<std::int64_t> positions;
  for (std::int64_t at = prefix_.tokens; at < lead_tokens(); ++at) positions.push_back(at);
  return positions;
}

std::vector<std::int64_t> MovedPrompt::FreshPositions() const {
  std::vector<std::int64_t> positions;
  std::int64_t at = lead_tokens();
  for (const MovedChunk& chunk : chunks_) {
    for (; at < chunk.start; ++at) positions.push_back(at);
    at = chunk.start + chunk.length;
  }
  for (; at < prompt_tokens_; ++at) positions.push_back(at);
  return positions;
}

std::vector<std::int64_t> MovedPrompt::MovedPositions() const {
  std::vector<std::int64_t> positions;
  for (const MovedChunk& chunk : chunks_) {
    for (std::int64_t t = 0; t < chunk.length; ++t) positions.push_back(chunk.start + t);
  }
  return positions;
}

std::int64_t MovedPrompt::SuffixBegin() const {
  const std::int64_t after_chunks = chunks_.empty() ? prefix_.tokens : chunks_.back().start + chunks_.back().length;
  return std::max(after_chunks, prompt_tokens_ - kSuffixRows);
}

std::int64_t MovedPrompt::ChunkOf(std::int64_t position) const {
  const auto after = std::upper_bound(chunks_.begin(), chunks_.end(), position,
                                      [](std::int64_t p, const MovedChunk& chunk) { return p < chunk.start; });
  if (after == chunks_.begin()) return -1;
  const auto chunk = std::prev(after);
  return position < chunk->start + chunk->length ? chunk - chunks_.begin() : -1;
}

KvSlot MovedPrompt::StoredSlotOf(std::int64_t position) const {
  const MovedChunk& chunk = chunks_[static_cast<std::size_t>(ChunkOf(position))];
  const std::int64_t row = chunk.first + position - chunk.start;
  return {chunk.pages[static_cast<std::size_t>(row / kPageTokens)], static_cast<int>(row % kPageTokens)};
}

KvSlot MovedPrompt::SlotOf(std::int64_t position) const {
  if (plain_) {
    return {plain_pages_[static_cast<std::size_t>(position / kPageTokens)], static_cast<int>(position % kPageTokens)};
  }
  if (position < lead_tokens()) {
    return {lead_pages_[static_cast<std::size_t>(position / kPageTokens)], static_cast<int>(position % kPageTokens)};
  }
  if (ChunkOf(position) < 0) return fresh_.Slot(position);
  if (std::binary_search(selected_.positions.begin(), selected_.positions.end(), position)) {
    return selected_.Slot(position);
  }
  return kernels::kNoSlot;  // computed to be looked at, not to be kept
}

void MovedPrompt::AddSegments(std::span<const std::int64_t> positions, std::int64_t row_begin,
                              std::vector<KvSegment>* out) const {
  // Only rows that can see the segment's first key look at it: before it, a shifted position may not even exist.
  const auto add = [&](KvSegment segment) {
    const std::int64_t first = segment.positions.empty() ? segment.start : segment.positions.front();
    const auto seeing = std::lower_bound(positions.begin(), positions.end(), first) - positions.begin();
    segment.row_begin = row_begin + seeing;
    segment.row_end = row_begin + static_cast<std::int64_t>(positions.size());
    if (segment.row_begin < segment.row_end) out->push_back(segment);
  };
  if (plain_) {
    add({.pages = std::span(plain_pages_).first(static_cast<std::size_t>(PagesFor(tokens()))), .length = tokens()});
    return;
  }
  const auto add_in = [&](std::size_t band, KvSegment segment) {
    segment.first_layer = bands_[band].first_layer;
    if (band + 1 < bands_.size()) segment.end_layer = bands_[band + 1].first_layer;
    add(segment);
  };
  const auto add_run = [&](std::size_t band, const Run& run, std::span<const std::uint64_t> skip) {
    if (run.positions.empty()) return;
    const auto length = static_cast<std::int64_t>(run.positions.size());
    add_in(band, {.pages = std::span(run.pages).first(static_cast<std::size_t>(PagesFor(length))),
                  .length = length,
                  .skip = skip,
                  .positions = run.positions});
  };
  for (std::size_t b = 0; b < bands_.size(); ++b) {
    if (lead_tokens() > 0) add_in(b, {.pages = lead_pages_, .length = lead_tokens()});
    for (std::size_t c = 0; c < chunks_.size(); ++c) {
      const MovedChunk& chunk = chunks_[c];
      add_in(b, {.pages = chunk.pages,
                 .start = chunk.start,
                 .length = chunk.length,
                 .shift = chunk.start - chunk.base,
                 .skip = bands_[b].skips[c],
                 .first = chunk.first});
    }
    add_run(b, fresh_, {});
    add_run(b, selected_, bands_[b].dropped);
  }
}

Status MovedPrompt::Compute(std::span<const std::int64_t> positions, runtime::LayerHook* hook, const Layers& layers,
                            float* last_logits, float* all_logits) {
  const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
  for (std::size_t begin = 0; begin < positions.size();) {
    if (go_on_ && !go_on_()) return Cancelled("somebody else's turn");
    const std::size_t count = std::min(positions.size() - begin, static_cast<std::size_t>(rows_per_step_));
    const auto step = positions.subspan(begin, count);
    runtime::ForwardBatch batch;
    for (const std::int64_t position : step) {
      batch.ids.push_back(tokens_[static_cast<std::size_t>(position)]);
      batch.positions.push_back(position);
      batch.slots.push_back(SlotOf(position));
    }
    AddSegments(step, 0, &batch.segments);
    batch.hook = hook;
    batch.gate = plain_ ? nullptr : gate_;
    batch.stop_after_layer = layers.stop_after;
    batch.resume_after_layer = layers.resume_after;
    if (layers.resume_after >= 0) {
      const auto rows = layers.resumed_rows.subspan(begin, count);
      batch.residual = layers.residual;
      batch.queries = layers.queries;
      batch.resumed_rows.assign(rows.begin(), rows.end());
    }
    begin += count;
    float* logits = nullptr;
    if (all_logits != nullptr) {
      for (std::size_t i = 0; i < count; ++i) batch.logit_rows.push_back(static_cast<std::int64_t>(i));
      logits = all_logits;
      all_logits += count * vocab;
    } else if (last_logits != nullptr && begin == positions.size()) {
      batch.logit_rows.push_back(static_cast<std::int64_t>(count) - 1);
      logits = last_logits;
    }
    KVS_RETURN_IF_ERROR(model_->Forward(batch, pages_, logits));
    if (batch.gate != nullptr && batch.gate->lost()) return DataLoss("stored KV could not be read");
  }
  return OkStatus();
}

void MovedPrompt::Charge(std::span<const std::int64_t> positions, std::int64_t layers) {
  for (const std::int64_t position : positions) {
    const std::int64_t chunk = ChunkOf(position);
    if (chunk < 0) continue;
    counts_.chunk_pairs[static_cast<std::size_t>(chunk)] += layers;
    counts_.computed_pairs += layers;
  }
}

void MovedPrompt::SkipStored(std::int64_t position, Band* band) const {
  const auto c = static_cast<std::size_t>(ChunkOf(position));
  const std::int64_t row = chunks_[c].first + position - chunks_[c].start;
  band->skips[c][static_cast<std::size_t>(row / kPageTokens)] |= std::uint64_t{1} << (row % kPageTokens);
}

void MovedPrompt::Select(std::vector<std::int64_t> positions) {
  bands_.resize(1);
  for (const std::int64_t position : positions) SkipStored(position, &bands_.front());
  selected_.positions = std::move(positions);
  KVS_CHECK(PagesFor(static_cast<std::int64_t>(selected_.positions.size())) <=
            static_cast<std::int64_t>(selected_.pages.size()));
  const auto selected = static_cast<std::int64_t>(selected_.positions.size());
  counts_.moved = MovedTokens() - selected;
  counts_.recomputed = selected;
}

void MovedPrompt::MoveChunk(std::size_t chunk, std::vector<PageIndex> pages) {
  KVS_CHECK(pages.size() == chunks_[chunk].pages.size());
  chunks_[chunk].pages = std::move(pages);
}

void MovedPrompt::Interruptible(std::int64_t rows, std::function<bool()> go_on) {
  rows_per_step_ = std::min(rows, model_->max_batch_rows());
  go_on_ = std::move(go_on);
}

Status MovedPrompt::Prefill(float* logits) {
  KVS_RETURN_IF_ERROR(PrefillByMode(logits));
  lead_computed_ = true;
  return OkStatus();
}

Status MovedPrompt::PrefillByMode(float* logits) {
  counts_.moved = MovedTokens();
  if (chunks_.empty()) return PrefillPlain("never_stored", logits);
  if (Ratio() >= 1 && options_.mode != ReuseMode::kRotate && options_.mode != ReuseMode::kKvcomm) {
    return PrefillPlain("recompute_ratio", logits);
  }
  std::vector<std::int64_t> selected;
  switch (options_.mode) {
    case ReuseMode::kAuto: return PrefillAuto(logits);
    case ReuseMode::kKvcomm: return PrefillWithAnchors(logits);
    case ReuseMode::kCacheBlend:
    case ReuseMode::kDhd: {
      const std::vector<Stage> stages = Stages();
      const bool attention_weighted = options_.mode == ReuseMode::kDhd;
      KVS_ASSIGN_OR_RETURN(selected, ChooseByDeviation(stages.front().tokens, attention_weighted));
      if (stages.size() == 1) break;
      Select(std::move(selected));
      return PrefillGradually(logits);
    }
    case ReuseMode::kEpic:
      for (const MovedChunk& chunk : chunks_) {
        const auto by_ratio = static_cast<std::int64_t>(std::ceil(Ratio() * static_cast<double>(chunk.length)));
        const std::int64_t first = options_.recompute_ratio < 0 ? kEpicTokens : by_ratio;
        for (std::int64_t t = 0; t < std::min(first, chunk.length); ++t) selected.push_back(chunk.start + t);
      }
      break;
    default: break;  // kRotate: as stored
  }
  Select(std::move(selected));
  return PrefillSelected(logits);
}

// Fresh and selected rows, through all layers.
Status MovedPrompt::PrefillSelected(float* logits) {
  std::vector<std::int64_t> rows = RowsOfTheLead();
  std::merge(fresh_.positions.begin(), fresh_.positions.end(), selected_.positions.begin(), selected_.positions.end(),
             std::back_inserter(rows));
  Charge(rows, model_->config().num_layers);
  return Compute(rows, nullptr, {}, logits, nullptr);
}

// Of the moved tokens, the `count` of the greatest rank.
Result<std::vector<std::int64_t>> MovedPrompt::Choose(TokenScores& scores, std::int64_t count) const {
  KVS_ASSIGN_OR_RETURN(std::vector<std::int64_t> chosen, scores.Choose(count));
  const std::vector<std::int64_t> moved = MovedPositions();
  for (std::int64_t& token : chosen) token = moved[static_cast<std::size_t>(token)];
  return chosen;
}

// CacheBlend's choice at the check layer (arXiv 2405.16444 §4.3): the `count` tokens whose V, computed in this prompt,
// is furthest from what is stored. `attention_weighted`: times the attention that the end of the prompt pays them
// (KVShare's DHD, arXiv 2503.16525).
Result<std::vector<std::int64_t>> MovedPrompt::ChooseByDeviation(std::int64_t count, bool attention_weighted) {
  std::vector<std::int64_t> rows(static_cast<std::size_t>(prompt_tokens_ - prefix_.tokens));
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = prefix_.tokens + static_cast<std::int64_t>(i);
  const int check = CheckLayer();
  const RankBy rank = attention_weighted ? RankBy::kDeviationTimesMass : RankBy::kDeviation;
  KVS_ASSIGN_OR_RETURN(const auto scores, NewTokenScores(model_->backend(), MovedTokens(), rank));
  Probe probe(this, scores.get(), attention_weighted ? SuffixBegin() : prompt_tokens_, check, check + 1, true);
  KVS_RETURN_IF_ERROR(Compute(rows, &probe, {.stop_after = check}, nullptr, nullptr));
  Charge(MovedPositions(), check + 1);
  return Choose(*scores, count);
}

// Two passes. The first computes the fresh rows over the chunks as stored and sees what the prompt's end attends to in
// the upper half of the layers; the second recomputes those tokens, and then the end again.
Status MovedPrompt::PrefillAuto(float* logits) {
  if (Ratio() == 0) return PrefillSelected(logits);
  const int layers = model_->config().num_layers;
  KVS_ASSIGN_OR_RETURN(const auto scores, NewTokenScores(model_->backend(), MovedTokens(), RankBy::kMass));
  Probe probe(this, scores.get(), SuffixBegin(), layers / 2, layers, false);
  std::vector<std::int64_t> rows = RowsOfTheLead();
  rows.insert(rows.end(), fresh_.positions.begin(), fresh_.positions.end());
  KVS_RETURN_IF_ERROR(Compute(rows, &probe, {}, nullptr, nullptr));
  const auto count = static_cast<std::int64_t>(std::ceil(Ratio() * static_cast<double>(MovedTokens())));
  KVS_ASSIGN_OR_RETURN(std::vector<std::int64_t> selected, Choose(*scores, count));
  Select(std::move(selected));
  rows = selected_.positions;
  Charge(rows, layers);
  for (std::int64_t p = SuffixBegin(); p < prompt_tokens_; ++p) rows.push_back(p);
  return Compute(rows, nullptr, {}, logits, nullptr);
}

Status MovedPrompt::PrefillPlain(std::string_view reason, float* logits) {
  counts_.exact = true;
  counts_.reason = reason;
  counts_.recomputed = MovedTokens();
  counts_.moved = 0;
  return Recompute(logits);
}

bool MovedPrompt::Doubtful(std::span<const float> logits) {
  if (plain_) return false;
  if (!runtime::CheckLogits(logits).ok()) return true;
  if (options_.mode != ReuseMode::kAuto || tokens() >= prompt_tokens_ + kGuardedTokens) return false;
  const double margin = anchors::Margin(logits);
  least_margin_ = std::min(least_margin_, margin);
  return margin < (OneThread() ? options_.min_margin : options_.min_margin_elsewhere);
}

Status MovedPrompt::Recompute(float* logits, std::string_view reason) {
  if (!counts_.exact) {
    counts_.exact = true;
    counts_.reason = reason;
    counts_.recomputed = MovedTokens();
    counts_.moved = 0;
  }
  plain_ = true;
  std::vector<std::int64_t> rows;
  for (std::int64_t p = lead_computed_ ? lead_tokens() : prefix_.tokens; p < tokens(); ++p) rows.push_back(p);
  Charge(rows, model_->config().num_layers);
  return Compute(rows, nullptr, {}, logits, nullptr);
}

void MovedPrompt::Push(TokenId id) {
  if (!plain_) fresh_.positions.push_back(tokens());
  tokens_.push_back(id);
  KVS_CHECK(plain_ || PagesFor(static_cast<std::int64_t>(fresh_.positions.size())) <=
                          static_cast<std::int64_t>(fresh_.pages.size()));
  KVS_CHECK(!plain_ || PagesFor(tokens()) <= static_cast<std::int64_t>(plain_pages_.size()));
}

Status MovedPrompt::Append(std::span<const TokenId> ids, float* logits) {
  std::vector<std::int64_t> rows;
  for (const TokenId id : ids) {
    rows.push_back(tokens());
    Push(id);
  }
  return Compute(rows, nullptr, {}, nullptr, logits);
}

void MovedPrompt::AddRow(TokenId id, runtime::ForwardBatch* batch) {
  const std::int64_t position = tokens();
  Push(id);
  const auto row = static_cast<std::int64_t>(batch->ids.size());
  batch->ids.push_back(id);
  batch->positions.push_back(position);
  batch->slots.push_back(SlotOf(position));
  AddSegments(std::span(&position, 1), row, &batch->segments);
}

std::vector<MovedPrompt::FreshRows> MovedPrompt::fresh() const {
  std::vector<FreshRows> runs;
  if (plain_) return runs;
  const std::vector<std::int64_t>& positions = fresh_.positions;
  for (std::size_t begin = 0, end = 0; begin < positions.size(); begin = end) {
    while (end < positions.size() && positions[end] == positions[begin] + static_cast<std::int64_t>(end - begin)) ++end;
    const auto pages = fresh_.pages.begin();
    const auto first_page = static_cast<std::ptrdiff_t>(begin / kPageTokens);
    const auto end_page = static_cast<std::ptrdiff_t>((end + kPageTokens - 1) / kPageTokens);
    runs.push_back({.start = positions[begin],
                    .length = static_cast<std::int64_t>(end - begin),
                    .pages = {pages + first_page, pages + end_page},
                    .first = static_cast<int>(begin % kPageTokens)});
  }
  return runs;
}

void MovedPrompt::KeepAppended(std::int64_t count) {
  const std::int64_t drop = tokens() - prompt_tokens_ - count;
  KVS_CHECK(drop >= 0 && count >= 0);
  tokens_.resize(tokens_.size() - static_cast<std::size_t>(drop));
  if (plain_) return;
  while (!fresh_.positions.empty() && fresh_.positions.back() >= tokens()) fresh_.positions.pop_back();
}

}  // namespace kvshare::agentd

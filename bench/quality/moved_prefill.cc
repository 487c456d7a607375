#include "bench/quality/moved_prefill.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <numeric>
#include <utility>

#include "agentd/repair/company.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::quality {
namespace {

using kernels::kPageTokens;
using kernels::PageIndex;

constexpr std::int64_t kEdgeTokens = 2;
constexpr std::int64_t kMinChunkTokens = 32;
// Of kAmid's message, besides its header. With more it would be seen by its length alone.
constexpr std::int64_t kOtherMessageTokens = 16;

// Of a prompt's private runs (the lead, fresh rows, selected rows), those whose last page may be full in part.
constexpr std::int64_t kPartlyFilled = 3;

std::int64_t PagesFor(std::int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

// What every stored run begins with: the token that every prompt of the model begins with.
TokenId SinkOf(const runtime::Model& model, const Case& c) {
  return model.config().bos_id >= 0 ? model.config().bos_id : c.prompt.front();
}

}  // namespace

MovedPrefill::MovedPrefill(runtime::Model* model, std::unique_ptr<kernels::Buffer> memory, PageIndex num_pages,
                           std::int64_t max_tokens, const Policy& policy)
    : model_(model),
      role_marks_(agentd::RoleMarksOf(*model)),
      memory_(std::move(memory)),
      policy_(policy),
      max_tokens_(max_tokens),
      free_(num_pages) {
  std::iota(free_.rbegin(), free_.rend(), PageIndex{0});
}

Result<std::unique_ptr<MovedPrefill>> MovedPrefill::New(runtime::Model* model, const PrefillLimits& limits,
                                                        const Policy& policy) {
  // PagesAtMost of the longest case, and room for what earlier ones of its session stored. Stored chunks that
  // each round up to whole pages take twice their size at most, and so does a prompt behind another's beginning.
  const std::int64_t pages = 4 * PagesFor(limits.max_tokens) + kPartlyFilled;
  KVS_ASSIGN_OR_RETURN(auto memory,
                       model->backend().Allocate(static_cast<std::size_t>(pages) * model->kv_layout().page_bytes()));
  return std::unique_ptr<MovedPrefill>(
      new MovedPrefill(model, std::move(memory), static_cast<PageIndex>(pages), limits.max_tokens, policy));
}

kernels::KvPages MovedPrefill::Pages() const {
  const auto pages = static_cast<PageIndex>(memory_->size() / model_->kv_layout().page_bytes());
  return {.base = memory_->data(), .num_pages = pages, .layout = model_->kv_layout()};
}

std::vector<PageIndex> MovedPrefill::Take(std::int64_t count) {
  KVS_CHECK(count <= static_cast<std::int64_t>(free_.size()));
  std::vector<PageIndex> pages(free_.end() - count, free_.end());
  free_.resize(free_.size() - static_cast<std::size_t>(count));
  return pages;
}

Result<std::vector<PageIndex>> MovedPrefill::Encode(std::span<const TokenId> ids) {
  const std::vector<PageIndex> pages = Take(PagesFor(static_cast<std::int64_t>(ids.size())));
  for (std::size_t done = 0; done < ids.size();) {
    const std::size_t rows = std::min(ids.size() - done, static_cast<std::size_t>(model_->max_batch_rows()));
    runtime::ForwardBatch batch;
    for (std::size_t p = done; p < done + rows; ++p) {
      batch.ids.push_back(ids[p]);
      batch.positions.push_back(static_cast<std::int64_t>(p));
      batch.slots.push_back({pages[p / kPageTokens], static_cast<int>(p % kPageTokens)});
    }
    done += rows;
    batch.segments.push_back(
        {.pages = pages, .length = static_cast<std::int64_t>(done), .row_end = static_cast<std::int64_t>(rows)});
    KVS_RETURN_IF_ERROR(model_->Forward(batch, Pages(), nullptr));
  }
  return pages;
}

// Another agent's first words; where none is known, the sink that every prompt begins with.
std::vector<TokenId> MovedPrefill::BeginningFor(const Case& c) const {
  for (const auto& [agent, beginning] : beginnings_) {
    if (agent != c.agent && !beginning.empty()) return beginning;
  }
  return {SinkOf(*model_, c)};
}

StoredIn MovedPrefill::Company() const {
  return policy_.stored_in.value_or(policy_.mode == ReuseMode::kAuto ? StoredIn::kThread : StoredIn::kAlone);
}

std::size_t MovedPrefill::FirstStored() const { return Company() == StoredIn::kBehind ? 1 : 0; }

std::int64_t MovedPrefill::PagesAtMost(const Case& c) const {
  std::int64_t stored = 0;
  if (Company() == StoredIn::kAlone) {
    for (const Chunk& chunk : c.chunks) stored += PagesFor(1 + chunk.end - chunk.begin);
  } else {
    std::int64_t tokens = static_cast<std::int64_t>(BeginningFor(c).size() + c.prompt.size());
    if (const std::size_t half = c.chunks.size() / 2; Company() == StoredIn::kAmid && half > 0) {
      tokens += kOtherMessageTokens + c.chunks[half].begin - c.chunks[half - 1].end;
    }
    stored = PagesFor(tokens);
  }
  return stored + PagesFor(max_tokens_) + kPartlyFilled;
}

Result<MovedPrefill::Stored> MovedPrefill::Find(std::size_t i, std::int64_t begin) {
  const std::vector<Chunk>& chunks = case_.chunks;
  std::vector<TokenId> tokens = {SinkOf(*model_, case_)};
  std::int64_t offset = 0;
  const auto add = [&](std::int64_t from, std::int64_t to) {
    tokens.insert(tokens.end(), case_.prompt.begin() + from, case_.prompt.begin() + to);
  };
  const auto add_chunk = [&](std::size_t c) {
    if (c == i) offset = static_cast<std::int64_t>(tokens.size()) + begin - chunks[c].begin;
    add(chunks[c].begin, chunks[c].end);
  };
  if (Company() == StoredIn::kAlone) {
    add_chunk(i);
  } else {
    tokens = BeginningFor(case_);
    for (std::size_t n = FirstStored(); n < chunks.size(); ++n) {
      const std::size_t c = Company() == StoredIn::kReversed ? chunks.size() - 1 - n : n;
      // What stands between two messages stands before each but the first.
      const std::size_t second = std::max<std::size_t>(c, 1);
      if (n > FirstStored()) add(chunks[second - 1].end, chunks[second].begin);
      if (Company() == StoredIn::kAmid && n > 0 && n == chunks.size() / 2) {
        tokens.insert(tokens.end(), other_message_.begin(), other_message_.end());
        add(chunks[second - 1].end, chunks[second].begin);
      }
      add_chunk(c);
    }
  }
  auto found = stored_.find(tokens);
  if (found == stored_.end()) {
    KVS_ASSIGN_OR_RETURN(auto pages, Encode(tokens));
    found = stored_.emplace(std::move(tokens), std::move(pages)).first;
  }
  return Stored{found->first, found->second, offset};
}

void MovedPrefill::AddStray(std::size_t i, std::int64_t tokens) {
  strays_[i].cached_tokens += tokens;
  strays_[i].computed_pairs += tokens * model_->config().num_layers;
}

// As the daemon does.
void MovedPrefill::SetStraysAside() {
  std::vector<agentd::ChunkCompany> company;
  for (std::size_t i = 0; i < moved_.size(); ++i) {
    company.push_back({moved_[i].length, moved_[i].in_company, saw_other_[i]});
  }
  const std::vector<std::size_t> strays = agentd::Strays(company);
  for (auto i = strays.rbegin(); i != strays.rend(); ++i) {
    AddStray(chunk_of_[*i], moved_[*i].length);
    moved_.erase(moved_.begin() + static_cast<std::ptrdiff_t>(*i));
    chunk_of_.erase(chunk_of_.begin() + static_cast<std::ptrdiff_t>(*i));
  }
}

Result<PrefillOutcome> MovedPrefill::Prefill(const Case& c) {
  if (static_cast<std::int64_t>(c.prompt.size()) >= max_tokens_) {
    return ResourceExhausted("the prompt has " + std::to_string(c.prompt.size()) + " tokens, and there is room for " +
                             std::to_string(max_tokens_ - 1));
  }
  free_.insert(free_.end(), used_.begin(), used_.end());
  used_.clear();
  // A long session stores more than there is room for; what an earlier case of it stored is computed again where
  // needed.
  const bool full = static_cast<std::int64_t>(free_.size()) < PagesAtMost(c);
  if (c.session != session_ || full) {
    for (const auto& [tokens, pages] : stored_) free_.insert(free_.end(), pages.begin(), pages.end());
    stored_.clear();
    if (c.session != session_ && !case_.chunks.empty()) {
      const Chunk& other = case_.chunks.front();
      const std::int64_t end = std::min(other.end, other.begin + kOtherMessageTokens);
      other_message_.assign(case_.prompt.begin() + other.begin, case_.prompt.begin() + end);
    }
    session_ = c.session;
  }
  if (prompt_ != nullptr && !prompt_->chunks().empty() && policy_.mode == ReuseMode::kAuto) {
    GuardOf().Answered(std::min(least_margin_, prompt_->least_margin()));
  }
  escalated_ = false;
  least_margin_ = std::numeric_limits<double>::infinity();
  case_ = c;
  if (c.chunks.size() > FirstStored()) {
    const auto end = c.prompt.begin() + c.chunks[FirstStored()].begin;
    const auto known = beginnings_.try_emplace(c.agent, c.prompt.begin(), end);
    if (Company() == StoredIn::kBehind) known.first->second.assign(c.prompt.begin(), end);
  }
  moved_.clear();
  chunk_of_.clear();
  saw_other_.clear();
  strays_.assign(c.chunks.size(), {});
  agentd::PromptCompany company(case_.prompt, role_marks_);
  for (std::size_t i = FirstStored(); i < c.chunks.size(); ++i) {
    const Chunk& chunk = c.chunks[i];
    const std::int64_t begin = chunk.begin + kEdgeTokens;
    const std::int64_t end = std::min<std::int64_t>(chunk.end - kEdgeTokens, c.suffix_begin);
    if (end - begin < kMinChunkTokens) continue;
    KVS_ASSIGN_OR_RETURN(const Stored stored, Find(i, begin));
    const std::int64_t first_page = stored.offset / kPageTokens;
    agentd::MovedChunk moved{.start = begin,
                             .length = end - begin,
                             .pages = {stored.pages.begin() + first_page, stored.pages.end()},
                             .first = static_cast<int>(stored.offset % kPageTokens),
                             .base = stored.offset,
                             .in_company = company.InCompany(begin, stored.tokens, stored.offset),
                             .placeholder = chunk.slot,
                             .content = chunk.id};
    if (policy_.mode == ReuseMode::kAuto && !moved.in_company) {
      const std::int64_t tail = company.Tail(begin, end, kMinChunkTokens);
      AddStray(i, tail);
      moved.length -= tail;
      if (moved.length == 0) continue;
    }
    moved.pages.resize(static_cast<std::size_t>(PagesFor(moved.first + moved.length)));
    saw_other_.push_back(company.SawOther(begin, begin + moved.length, stored.tokens, stored.offset));
    moved_.push_back(std::move(moved));
    chunk_of_.push_back(i);
  }
  if (policy_.mode == ReuseMode::kAuto) SetStraysAside();
  peak_.assign(c.chunks.size(), {});
  PrefillOutcome outcome;
  KVS_ASSIGN_OR_RETURN(outcome.logits, Compute());
  first_ = outcome.logits;
  outcome.chunks = Costs();
  if (prompt_->counts().exact) {
    for (const std::size_t i : chunk_of_) outcome.escalated.push_back(c.chunks[i].id);
  }
  return outcome;
}

// The prompt of case_, and once more exactly where the guard does not trust it.
Result<std::vector<float>> MovedPrefill::Compute() {
  agentd::RepairOptions repair;
  repair.mode = policy_.mode;
  repair.min_margin = thread_.margin();
  repair.min_margin_elsewhere = elsewhere_.margin();
  if (policy_.budget.has_value()) repair.recompute_ratio = *policy_.budget;
  if (policy_.gradual) repair.filter.assign(std::begin(agentd::kGradualFilter), std::end(agentd::kGradualFilter));
  free_.insert(free_.end(), used_.begin(), used_.end());
  const std::int64_t new_tokens = max_tokens_ - static_cast<std::int64_t>(case_.prompt.size());
  prompt_ = std::make_unique<agentd::MovedPrompt>(model_, Pages(), case_.prompt, agentd::MovedPrompt::Prefix{}, moved_,
                                                  repair, &anchors_, case_.agent);
  used_ = Take(prompt_->PagesNeeded(new_tokens));
  prompt_->GivePages(used_, new_tokens);
  std::vector<float> logits(static_cast<std::size_t>(model_->config().vocab_size));
  KVS_RETURN_IF_ERROR(prompt_->Prefill(logits.data()));
  if (prompt_->HasLesson()) prompt_->Teach(used_);
  if (prompt_->Doubtful(logits)) KVS_RETURN_IF_ERROR(SendBack(logits));
  escalated_by_prefill_ = prompt_->counts().exact;
  return logits;
}

// As the daemon does, the guard learns from it; once from each answer.
Status MovedPrefill::SendBack(std::span<float> logits) {
  const std::vector<float> doubtful(logits.begin(), logits.end());
  KVS_RETURN_IF_ERROR(prompt_->Recompute(logits.data()));
  if (!escalated_) GuardOf().Audited(anchors::Margin(doubtful), anchors::KlDivergence(logits, doubtful));
  return OkStatus();
}

Status MovedPrefill::Extend(std::span<const TokenId> ids, float* logits) {
  const auto vocab = static_cast<std::size_t>(model_->config().vocab_size);
  const std::int64_t appended = prompt_->tokens() - static_cast<std::int64_t>(case_.prompt.size());
  KVS_RETURN_IF_ERROR(prompt_->Append(ids, logits));
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (!prompt_->Doubtful({logits + i * vocab, vocab})) continue;
    // As it would have gone token by token: this one is asked again, and the rest follows it.
    prompt_->KeepAppended(appended + static_cast<std::int64_t>(i) + 1);
    KVS_RETURN_IF_ERROR(SendBack({logits + i * vocab, vocab}));
    if (i + 1 == ids.size()) return OkStatus();
    return prompt_->Append(ids.subspan(i + 1), logits + (i + 1) * vocab);
  }
  return OkStatus();
}

// One audit of each answer, as in the daemon: what was sent back has given its own.
void MovedPrefill::Healed(std::span<const float> exact) {
  if (policy_.mode != ReuseMode::kAuto || moved_.empty() || escalated_ || prompt_->counts().exact) return;
  GuardOf().Audited(anchors::Margin(first_), anchors::KlDivergence(exact, first_));
}

// Where an appended token made the guard compute everything, the state after Prefill is gone and is made again.
void MovedPrefill::Rewind() {
  if (prompt_->counts().exact == escalated_by_prefill_) {
    prompt_->KeepAppended(0);
    return;
  }
  peak_ = Costs();
  escalated_ = true;
  least_margin_ = std::min(least_margin_, prompt_->least_margin());
  const Result<std::vector<float>> again = Compute();
  KVS_CHECK(again.ok());  // the very computation that succeeded before
}

std::vector<ChunkCost> MovedPrefill::CostsOf(const agentd::RepairCounts& counts) const {
  std::vector<ChunkCost> costs = strays_;
  for (std::size_t i = 0; i < moved_.size(); ++i) {
    costs[chunk_of_[i]].cached_tokens += moved_[i].length;
    costs[chunk_of_[i]].computed_pairs += counts.chunk_pairs[i];
  }
  return costs;
}

// One answer pays for one escalation, however often the judge has it written again.
std::vector<ChunkCost> MovedPrefill::Costs() const {
  std::vector<ChunkCost> costs = CostsOf(prompt_->counts());
  for (std::size_t i = 0; i < costs.size(); ++i) {
    costs[i].computed_pairs = std::max(costs[i].computed_pairs, peak_[i].computed_pairs);
  }
  return costs;
}

}  // namespace kvshare::quality

// Engine: chunks that lie on disk (docs/design/cold-chunks.md). A request waits until they are in memory, once, and is
// planned with what has come; or until computing it takes as long as the rest of them needs, and is computed meanwhile.
#include <algorithm>
#include <utility>

#include "agentd/engine/engine.h"

namespace kvshare::agentd {

// What the session computed before a restart.
void Engine::RecallSession(const std::string& session) {
  for (const SessionRecall::Run& run : recall_.Take(session, SessionBookLimits{}.runs_per_session)) {
    moved_.Record(session, run.tokens, run.source);
  }
}

// The plan for a request whose turn it is. With `loads`: they pay, and are to be begun; then it is planned again.
Engine::MovedPlan Engine::PlanWithLoads(const EngineRequest& request, const StoredPrefix& stored) {
  if (cold_ == nullptr) return PlanMoved(request, stored, Disk::kUnread, MissKind::kEvicted);
  if (const auto loads = chunk_loads_.find(request.id); loads != chunk_loads_.end()) {
    return PlanMoved(request, stored, Disk::kUnread, loads->second.lost.value_or(MissKind::kEvicted));
  }
  MovedPlan all = PlanMoved(request, stored, Disk::kAsMemory, MissKind::kEvicted);
  if (all.loads.empty()) return all;
  std::size_t pages = 0;
  for (const ChunkLoad& load : all.loads) pages += load.pages;
  if (options_.always_load || costs_.ShouldLoad(all.saved, cold_->EstimateLoadSeconds(pages))) return all;
  // Of the prefix alone it may pay; and without it there are still the chunks that are in memory.
  StoredPrefix usable = stored;
  if (!PrefixPays(stored)) usable = planner_.FindInMemory(std::span(request.prompt).first(request.prompt.size() - 1));
  MovedPlan rest = PlanMoved(request, usable, Disk::kUnread, MissKind::kLoadSlower);
  if (!rest.plan.has_value()) rest.plan = planner_.Plan(request.prompt, request.reuse, usable);
  if (usable.tokens() < stored.tokens()) {
    MarkFresh({.length = stored.tokens(), .miss = MissKind::kLoadSlower}, &*rest.plan);
  }
  for (const PlanSpan& span : all.plan->spans) {
    if (span.fate != Fate::kMoved || span.tier != Tier::kCold) continue;
    MarkFresh({.start = span.start, .length = span.length, .miss = MissKind::kLoadSlower}, &*rest.plan);
  }
  return rest;
}

void Engine::BeginChunkLoads(const EngineRequest& request, MovedPlan all) {
  // KVCOMM compares a chunk's KV in all layers with its anchors' before it computes anything. A device has no parts.
  const bool may_overlap = request.reuse != ReuseMode::kKvcomm && arena_->in_place();
  chunk_loads_[request.id] = {.under_way = static_cast<int>(all.loads.size()),
                              .rows = all.work.prompt->RowsToCompute(),
                              .may_overlap = may_overlap};
  for (ChunkLoad& load : all.loads) {
    const auto done = [this, id = request.id](const Status&, std::optional<MissKind> lost) {
      const auto loads = chunk_loads_.find(id);
      if (loads == chunk_loads_.end()) return;  // the request is gone
      --loads->second.under_way;
      if (lost.has_value()) loads->second.lost = lost;
    };
    Fetch({.tokens = std::move(load.tokens), .done = done, .request = may_overlap ? request.id : 0});
  }
}

bool Engine::IsLoadingChunks(std::uint64_t request_id) const {
  const auto loads = chunk_loads_.find(request_id);
  return loads != chunk_loads_.end() && loads->second.under_way > 0;
}

// Until all that is under way is read; nothing where some of it is not being read for this request, or has hardly
// begun.
std::optional<double> Engine::SecondsOfChunkLoads(std::uint64_t request_id) const {
  int reads = 0;
  double most = 0;
  for (const auto& [id, promotion] : promotions_) {
    if (promotion->request != request_id) continue;
    const std::optional<double> left = SecondsLeft(*promotion);
    if (!left.has_value()) return std::nullopt;
    most = std::max(most, *left);
    ++reads;
  }
  return reads == chunk_loads_.at(request_id).under_way ? std::optional(most) : std::nullopt;
}

// Whether CacheBlend's loading controller may choose the share: not where one was asked for, nor where others would
// wait for what is computed beyond it.
bool Engine::MayBlendMore(const EngineRequest& request) const {
  return request.reuse == ReuseMode::kCacheBlend && !options_.moved.blend_recompute.has_value() && running_.empty() &&
         waiting_.size() == 1;
}

std::int64_t Engine::RowsWhileLoading(const EngineRequest& request) const {
  const std::optional<double> left = SecondsOfChunkLoads(request.id);
  if (!MayBlendMore(request) || !left.has_value() || costs_.seconds_per_token() == 0) return 0;
  return static_cast<std::int64_t>(*left / costs_.seconds_per_token());
}

// Whether a prompt may be computed while its chunks come: when that takes at least as long as what is still to be read,
// so that the engine does not wait (and everybody else with it). Its own prefix must be there.
bool Engine::MayComputeOverLoads(const EngineRequest& request, const StoredPrefix& stored) const {
  const ChunkLoads& loads = chunk_loads_.at(request.id);
  if (!loads.may_overlap || !stored.cold.pages.empty()) return false;
  const std::optional<double> left = SecondsOfChunkLoads(request.id);
  if (!left.has_value()) return false;
  const std::int64_t plain = static_cast<std::int64_t>(request.prompt.size()) - stored.tokens();
  const std::int64_t rows = MayBlendMore(request) ? plain : loads.rows;
  return *left <= costs_.seconds_per_token() * static_cast<double>(rows);
}

// True when something has changed: it is admitted, or waits for all of its loads from now on.
bool Engine::TryAdmitOverLoads(std::size_t i, std::span<const Prospect> prospects, const StoredPrefix& stored,
                               std::int64_t* row_budget) {
  if (*row_budget == 0) return false;
  const EngineRequest& request = waiting_.at(i);
  ChunkLoads& loads = chunk_loads_.at(request.id);
  MovedPlan moved = PlanMoved(request, stored, Disk::kOnTheWay, loads.lost.value_or(MissKind::kEvicted));
  const auto has_place = [](const MovedChunk& chunk) {
    return std::find(chunk.pages.begin(), chunk.pages.end(), kNoPage) == chunk.pages.end();
  };
  const MovedPrompt* const prompt = moved.work.prompt.get();
  const bool whole = prompt != nullptr && std::all_of(prompt->chunks().begin(), prompt->chunks().end(), has_place);
  if (!whole || !TryAdmitMoved(i, prospects, moved, row_budget)) loads.may_overlap = false;
  return true;
}

std::vector<PageIndex> Engine::PagesOnTheWay(std::uint64_t request_id, std::span<const TokenId> run,
                                             const StoredPrefix& stored) const {
  const std::int64_t begin = stored.host.full_tokens();
  const auto wanted = run.first(static_cast<std::size_t>(stored.tokens()));
  for (const auto& [id, promotion] : promotions_) {
    if (promotion->request != request_id || promotion->start > begin) continue;
    if (promotion->start + promotion->run.tokens() < stored.tokens()) continue;
    if (!std::equal(wanted.begin(), wanted.end(), promotion->tokens.begin())) continue;
    const auto pages = promotion->kv.pages().subspan(static_cast<std::size_t>(begin / kPageTokens));
    const auto places = pages.first(stored.cold.pages.size());
    return {places.begin(), places.end()};
  }
  return {};
}

// What the sequence's prompt is computed over may still be on its way.
void Engine::GateChunkLoads(Sequence& sequence) {
  gate_.Clear();
  for (const auto& [id, promotion] : promotions_) {
    if (promotion->request == sequence.request.id) gate_.Add(promotion->progress);
  }
  sequence.moved.prompt->Await(gate_.empty() ? nullptr : &gate_);
}

// It has been computed: what has come is stored, like any load. Returns why some of it has not, if so.
std::optional<MissKind> Engine::EndChunkLoads(Sequence& sequence) {
  sequence.moved.prompt->Await(nullptr);
  if (!chunk_loads_.contains(sequence.request.id)) return std::nullopt;
  std::vector<std::uint64_t> ids;
  for (const auto& [id, promotion] : promotions_) {
    if (promotion->request == sequence.request.id) ids.push_back(id);
  }
  // Nobody else's load takes the room before what has come is leased.
  std::vector<Wish> others = std::exchange(fetches_, {});
  for (const std::uint64_t id : ids) EndPromotion(id);
  std::optional<MissKind> lost = chunk_loads_.extract(sequence.request.id).mapped().lost;
  if (!moved_.Settle(sequence.moved) && !lost.has_value()) lost = MissKind::kPoolFull;
  fetches_ = std::move(others);
  RetryFetches();
  return lost;
}

}  // namespace kvshare::agentd

// Engine: chunks that lie on disk (docs/design/cold-chunks.md). A request waits until they are in memory, once; then it
// is planned with what has come.
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

void Engine::BeginChunkLoads(const EngineRequest& request, std::vector<ChunkLoad> loads) {
  chunk_loads_[request.id] = {.under_way = static_cast<int>(loads.size())};
  for (ChunkLoad& load : loads) {
    Fetch(std::move(load.tokens), [this, id = request.id](const Status&, std::optional<MissKind> lost) {
      const auto waiting = chunk_loads_.find(id);
      if (waiting == chunk_loads_.end()) return;  // the request is gone
      --waiting->second.under_way;
      if (lost.has_value()) waiting->second.lost = lost;
    });
  }
}

bool Engine::IsLoadingChunks(std::uint64_t request_id) const {
  const auto loads = chunk_loads_.find(request_id);
  return loads != chunk_loads_.end() && loads->second.under_way > 0;
}

}  // namespace kvshare::agentd

#include "agentd/engine/stats_book.h"

namespace kvshare::agentd {
namespace {

constexpr AgentId kOtherAgentsId = 0;

}  // namespace

StatsBook::StatsBook() : names_{std::string(kOtherAgents)}, agent_totals_(1) {}

AgentId StatsBook::Intern(std::string_view agent) {
  const std::string name(agent.empty() ? std::string_view("default") : agent);
  const std::lock_guard lock(mutex_);
  const auto known = ids_.find(name);
  if (known != ids_.end()) return known->second;
  if (names_.size() > kMaxAgents) return kOtherAgentsId;
  const auto id = static_cast<AgentId>(names_.size());
  names_.push_back(name);
  agent_totals_.emplace_back();
  ids_.emplace(name, id);
  return id;
}

std::string StatsBook::AgentName(AgentId agent) const {
  const std::lock_guard lock(mutex_);
  return names_[agent];
}

void StatsBook::Add(ReuseTotals& totals, const GenerateReply& reply) {
  ++totals.requests;
  totals.prompt_tokens += reply.prompt_tokens;
  totals.prefix_tokens += reply.reuse.prefix_tokens;
  totals.moved_tokens += reply.reuse.moved_tokens;
  totals.recomputed_tokens += reply.reuse.recomputed_tokens;
  totals.fresh_tokens += reply.reuse.fresh_tokens;
  totals.generated_tokens += static_cast<std::int64_t>(reply.ids.size());
}

void StatsBook::Completed(AgentId agent, const GenerateReply& reply) {
  const std::lock_guard lock(mutex_);
  Add(stats_.totals, reply);
  Add(agent_totals_[agent], reply);
  for (const MissReason& miss : reply.reuse.miss_reasons) stats_.miss_reasons[miss.reason] += miss.tokens;
}

void StatsBook::Failed() {
  const std::lock_guard lock(mutex_);
  ++stats_.requests_failed;
}

void StatsBook::SetLoad(std::int64_t running, std::int64_t waiting, const PoolStats& pool) {
  const std::lock_guard lock(mutex_);
  stats_.requests_running = running;
  stats_.requests_waiting = waiting;
  stats_.pool = pool;
}

Stats StatsBook::Snapshot() const {
  const std::lock_guard lock(mutex_);
  Stats stats = stats_;
  for (std::size_t i = 0; i < names_.size(); ++i) {
    // An agent is listed once a request of its ended well.
    if (agent_totals_[i].requests > 0) stats.agents.emplace(names_[i], agent_totals_[i]);
  }
  return stats;
}

}  // namespace kvshare::agentd

#include "agentd/engine/stats_book.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>

namespace kvshare::agentd {
namespace {

constexpr AgentId kOtherAgentsId = 0;

constexpr std::size_t kMaxDepths = 8;   // deeper ones are counted with these
constexpr double kAuditFailure = 0.05;  // nats

void Count(double kl, AuditTotals* audits) {
  ++audits->audits;
  audits->failures += !(kl <= kAuditFailure);
  if (std::isfinite(kl)) audits->kl_sum += kl;  // a sum that is no number would stay so
}

Histogram Buckets(std::initializer_list<double> bounds) {
  Histogram histogram;
  histogram.bounds = bounds;
  histogram.counts.resize(bounds.size() + 1);
  return histogram;
}

// From a hit on a small model to a long prompt on a slow machine.
Histogram RequestSeconds() {
  return Buckets({0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250});
}

Histogram TokenSeconds() { return Buckets({0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5}); }

void Observe(Histogram& histogram, double milliseconds) {
  const double seconds = milliseconds / 1000;
  const auto bucket = std::lower_bound(histogram.bounds.begin(), histogram.bounds.end(), seconds);
  ++histogram.counts[static_cast<std::size_t>(bucket - histogram.bounds.begin())];
  histogram.sum += seconds;
}

}  // namespace

StatsBook::StatsBook() : names_{std::string(kOtherAgents)}, agent_totals_(1) {
  stats_.ttft_seconds = stats_.queue_seconds = stats_.prefill_seconds = RequestSeconds();
  stats_.inter_token_seconds = TokenSeconds();
}

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
  stats_.approximate.answers += reply.reuse.moved_tokens > 0;
  Observe(stats_.ttft_seconds, reply.timings.ttft_ms);
  Observe(stats_.queue_seconds, reply.timings.queue_ms);
  Observe(stats_.prefill_seconds, reply.timings.prompt_ms);
  if (reply.ids.size() > 1) {
    Observe(stats_.inter_token_seconds, reply.timings.predicted_ms / static_cast<double>(reply.ids.size() - 1));
  }
  for (const MissReason& miss : reply.reuse.miss_reasons) stats_.miss_reasons[miss.reason] += miss.tokens;
}

void StatsBook::Failed() {
  const std::lock_guard lock(mutex_);
  ++stats_.requests_failed;
}

void StatsBook::SentBack() {
  const std::lock_guard lock(mutex_);
  ++stats_.approximate.sent_back;
}

void StatsBook::Healed() {
  const std::lock_guard lock(mutex_);
  ++stats_.approximate.healed;
}

void StatsBook::Audited(int depth, bool later, double kl) {
  const std::size_t place = std::min(static_cast<std::size_t>(std::max(depth, 1)), kMaxDepths) - 1;
  const std::lock_guard lock(mutex_);
  std::vector<AuditTotals>& audits = later ? stats_.approximate.later_audits : stats_.approximate.audits;
  if (audits.size() <= place) audits.resize(place + 1);
  Count(kl, &audits[place]);
}

void StatsBook::ShadowAudited(double kl) {
  const std::lock_guard lock(mutex_);
  Count(kl, &stats_.approximate.shadow_audits);
}

void StatsBook::SetLoad(const Load& load) {
  const std::lock_guard lock(mutex_);
  stats_.requests_running = load.running;
  stats_.requests_waiting = load.waiting;
  stats_.pool = load.pool;
  stats_.pinned_bytes = load.pinned_bytes;
  stats_.client_leases = load.client_leases;
  stats_.approximate.kept_bytes = load.kept_bytes;
  stats_.approximate.guard_margin = load.guard_margin;
  stats_.approximate.guard_margin_elsewhere = load.guard_margin_elsewhere;
  stats_.approximate.moved_row = load.moved_row;
}

Stats StatsBook::Snapshot() const {
  const std::lock_guard lock(mutex_);
  Stats stats = stats_;
  stats.uptime_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  for (std::size_t i = 0; i < names_.size(); ++i) {
    // An agent is listed once a request of its ended well.
    if (agent_totals_[i].requests > 0) stats.agents.emplace(names_[i], agent_totals_[i]);
  }
  return stats;
}

}  // namespace kvshare::agentd

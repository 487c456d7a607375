#include "tools/kvctl/stat_json.h"

#include <algorithm>
#include <cstdio>
#include <numeric>

#include "libkvshare/core/json_text.h"

namespace kvshare::kvctl {
namespace {

using Json = nlohmann::ordered_json;

}  // namespace

Json TotalsJson(const ReuseTotals& totals) {
  return {{"requests", totals.requests},
          {"prompt_tokens", totals.prompt_tokens},
          {"prefix_tokens", totals.prefix_tokens},
          {"moved_tokens", totals.moved_tokens},
          {"recomputed_tokens", totals.recomputed_tokens},
          {"fresh_tokens", totals.fresh_tokens},
          {"generated_tokens", totals.generated_tokens}};
}

Json PoolJson(const Stats& stats) {
  return {{"capacity_bytes", stats.pool.capacity_bytes},
          {"used_bytes", stats.pool.used_bytes},
          {"pages", stats.pool.pages},
          {"leases", stats.pool.leases},
          {"evictions", stats.pool.evictions},
          {"pinned_bytes", stats.pinned_bytes},
          {"client_leases", stats.client_leases}};
}

Json ColdJson(const ColdStats& cold) {
  return {{"entries", cold.entries},
          {"bytes", cold.bytes},
          {"hits", cold.hits},
          {"misses", cold.misses},
          {"integrity_errors", cold.integrity_errors},
          {"capacity_bytes", cold.capacity_bytes},
          {"stores", cold.stores},
          {"dropped", cold.dropped},
          {"evictions", cold.evictions},
          {"read_bytes", cold.read_bytes},
          {"written_bytes", cold.written_bytes},
          {"state", cold.state}};
}

Json AuditJson(const AuditTotals& audit) {
  return {{"audits", audit.audits}, {"failures", audit.failures}, {"kl_sum", audit.kl_sum}};
}

Json AuditsJson(std::span<const AuditTotals> audits) {
  Json json = Json::array();
  for (const AuditTotals& audit : audits) json.push_back(AuditJson(audit));
  return json;
}

Json ApproximateJson(const ApproximateStats& a) {
  return {{"answers", a.answers},
          {"sent_back", a.sent_back},
          {"healed", a.healed},
          {"kept_bytes", a.kept_bytes},
          {"guard_margin", a.guard_margin},
          {"guard_margin_elsewhere", a.guard_margin_elsewhere},
          {"moved_row", a.moved_row},
          {"audits", AuditsJson(a.audits)},
          {"later_audits", AuditsJson(a.later_audits)},
          {"shadow_audits", AuditJson(a.shadow_audits)}};
}

Json AnchorsJson(const AnchorStats& a) {
  Json misses = Json::object();
  for (const auto& [reason, times] : a.misses) misses[reason] = times;
  return {{"bytes", a.bytes},           {"disk_bytes", a.disk_bytes}, {"disk_capacity_bytes", a.disk_capacity_bytes},
          {"saved", a.saved},           {"loaded", a.loaded},         {"dropped", a.dropped},
          {"misses", std::move(misses)}};
}

Json AgentsJson(const Stats& stats) {
  Json agents = Json::object();
  for (const auto& [agent, totals] : stats.agents) agents[agent] = TotalsJson(totals);
  return agents;
}

Json MissJson(const Stats& stats) {
  Json misses = Json::object();
  for (const auto& [reason, tokens] : stats.miss_reasons) misses[reason] = tokens;
  return misses;
}

std::int64_t CountOf(const Histogram& histogram) {
  return std::accumulate(histogram.counts.begin(), histogram.counts.end(), std::int64_t{0});
}

double Quantile(const Histogram& histogram, double share) {
  const auto count = static_cast<double>(CountOf(histogram));
  if (count == 0 || histogram.bounds.empty()) return 0;
  double below = 0;
  const std::size_t finite = std::min(histogram.bounds.size(), histogram.counts.size());
  for (std::size_t i = 0; i < finite; ++i) {
    const auto here = static_cast<double>(histogram.counts[i]);
    const double lower = i == 0 ? 0 : histogram.bounds[i - 1];
    if (here > 0 && below + here >= share * count) {
      return lower + (histogram.bounds[i] - lower) * std::max(0.0, share * count - below) / here;
    }
    below += here;
  }
  return histogram.bounds.back();
}

Json LatencyJson(const Histogram& histogram) {
  const std::int64_t count = CountOf(histogram);
  return {{"count", count},
          {"mean", count == 0 ? 0 : histogram.sum * 1000 / static_cast<double>(count)},
          {"p50", Quantile(histogram, 0.5) * 1000},
          {"p95", Quantile(histogram, 0.95) * 1000},
          {"p99", Quantile(histogram, 0.99) * 1000}};
}

Json StatJson(const Stats& stats) {
  Json json = TotalsJson(stats.totals);
  json["requests_running"] = stats.requests_running;
  json["requests_waiting"] = stats.requests_waiting;
  json["requests_failed"] = stats.requests_failed;
  json["uptime_s"] = stats.uptime_s;
  json["pool"] = PoolJson(stats);
  json["cold"] = ColdJson(stats.cold);
  json["approximate"] = ApproximateJson(stats.approximate);
  json["anchors"] = AnchorsJson(stats.anchors);
  json["ttft_ms"] = LatencyJson(stats.ttft_seconds);
  json["queue_ms"] = LatencyJson(stats.queue_seconds);
  json["prefill_ms"] = LatencyJson(stats.prefill_seconds);
  json["inter_token_ms"] = LatencyJson(stats.inter_token_seconds);
  json["miss_reasons"] = MissJson(stats);
  json["agents"] = AgentsJson(stats);
  return json;
}

Json ServerJson(const ServerInfo& info) {
  return {{"version", info.version},
          {"model", info.model},
          {"space", info.space},
          {"dtype", info.dtype},
          {"device", info.device},
          {"isa", info.isa},
          {"reuse", ReuseModeName(info.reuse)},
          {"max_context_tokens", info.max_context_tokens},
          {"vocab_size", info.vocab_size}};
}

double Percent(std::int64_t part, std::int64_t whole) {
  return whole == 0 ? 0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
}

void PrintJson(const Json& json) {
  std::puts(JsonText(json).c_str());
  std::fflush(stdout);
}

}  // namespace kvshare::kvctl

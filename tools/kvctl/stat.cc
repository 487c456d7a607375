// kvctl stat, info: a daemon's totals, once or line by line.
#include <cstdio>
#include <string>
#include <vector>

#include "tools/kvctl/commands.h"
#include "tools/kvctl/stat_json.h"
#include "tools/kvctl/target.h"
#include "tools/kvctl/ticker.h"

namespace kvshare::kvctl {
namespace {

using Json = nlohmann::ordered_json;

constexpr double kMiB = 1 << 20;

std::string MiB(std::int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f MiB", static_cast<double>(bytes) / kMiB);
  return text;
}

void PrintStatText(const Stats& stats) {
  const ReuseTotals& t = stats.totals;
  std::printf("requests   %lld done, %lld running, %lld waiting, %lld failed\n", static_cast<long long>(t.requests),
              static_cast<long long>(stats.requests_running), static_cast<long long>(stats.requests_waiting),
              static_cast<long long>(stats.requests_failed));
  std::printf("prompt     %lld tokens, %lld reused (%.1f %%)\n", static_cast<long long>(t.prompt_tokens),
              static_cast<long long>(t.prefix_tokens + t.moved_tokens),
              Percent(t.prefix_tokens + t.moved_tokens, t.prompt_tokens));
  std::printf("generated  %lld tokens\n", static_cast<long long>(t.generated_tokens));
  std::printf("first tok. %.1f ms at the median, %.1f ms at p95\n", Quantile(stats.ttft_seconds, 0.5) * 1000,
              Quantile(stats.ttft_seconds, 0.95) * 1000);
  std::printf("pool       %s of %s, %lld pages, %lld in use, %lld evicted\n", MiB(stats.pool.used_bytes).c_str(),
              MiB(stats.pool.capacity_bytes).c_str(), static_cast<long long>(stats.pool.pages),
              static_cast<long long>(stats.pool.leases), static_cast<long long>(stats.pool.evictions));
  if (!stats.cold.state.empty()) {
    std::printf("cold       %s of %s, %lld pages, %lld loaded, %lld missed, %lld damaged; %s\n",
                MiB(stats.cold.bytes).c_str(), MiB(stats.cold.capacity_bytes).c_str(),
                static_cast<long long>(stats.cold.entries), static_cast<long long>(stats.cold.hits),
                static_cast<long long>(stats.cold.misses), static_cast<long long>(stats.cold.integrity_errors),
                stats.cold.state.c_str());
  }
  const ApproximateStats& a = stats.approximate;
  if (a.answers + a.sent_back > 0) {
    AuditTotals all;
    for (const auto* audits : {&a.audits, &a.later_audits}) {
      for (const AuditTotals& audit : *audits) {
        all.audits += audit.audits;
        all.failures += audit.failures;
        all.kl_sum += audit.kl_sum;
      }
    }
    std::printf(
        "approx.    %lld answers, %lld sent back, %lld computed since; of %lld tokens compared with exact %lld were "
        "more than 0.05 nats away, %.2g at the mean; %s kept\n",
        static_cast<long long>(a.answers), static_cast<long long>(a.sent_back), static_cast<long long>(a.healed),
        static_cast<long long>(all.audits), static_cast<long long>(all.failures),
        all.audits > 0 ? all.kl_sum / static_cast<double>(all.audits) : 0.0, MiB(a.kept_bytes).c_str());
  }
  if (const AuditTotals& shadow = a.shadow_audits; shadow.audits > 0) {
    std::printf(
        "           %lld exact answers compared with what chunks would have given: %lld more than 0.05 nats away, "
        "%.2g at the mean\n",
        static_cast<long long>(shadow.audits), static_cast<long long>(shadow.failures),
        shadow.kl_sum / static_cast<double>(shadow.audits));
  }
  if (const AnchorStats& n = stats.anchors; n.bytes + n.disk_bytes > 0) {
    std::printf("anchors    %s in memory, %s on disk, %lld saved, %lld read back", MiB(n.bytes).c_str(),
                MiB(n.disk_bytes).c_str(), static_cast<long long>(n.saved), static_cast<long long>(n.loaded));
    for (const auto& [reason, times] : n.misses) {
      if (times > 0) std::printf(", %lld refused: %s", static_cast<long long>(times), reason.c_str());
    }
    std::printf("\n");
  }
  for (const auto& [reason, tokens] : stats.miss_reasons) {
    std::printf("missed     %lld tokens: %s\n", static_cast<long long>(tokens), reason.c_str());
  }
  for (const auto& [agent, totals] : stats.agents) {
    std::printf("agent      %-24s %6lld requests, %8lld prompt tokens, %5.1f %% reused\n", agent.c_str(),
                static_cast<long long>(totals.requests), static_cast<long long>(totals.prompt_tokens),
                Percent(totals.prefix_tokens + totals.moved_tokens, totals.prompt_tokens));
  }
}

void PrintRateHeader() {
  std::printf("%8s %9s %7s %9s %7s %7s %6s %9s\n", "req/s", "prompt/s", "reused", "output/s", "running", "waiting",
              "pool", "ttft p50");
}

// What happened since `before`, in one line.
void PrintRates(const Stats& before, const Stats& now, double seconds) {
  const auto rate = [seconds](std::int64_t from, std::int64_t to) { return static_cast<double>(to - from) / seconds; };
  const ReuseTotals& a = before.totals;
  const ReuseTotals& b = now.totals;
  Histogram ttft = now.ttft_seconds;
  if (before.ttft_seconds.counts.size() == ttft.counts.size()) {
    for (std::size_t i = 0; i < ttft.counts.size(); ++i) ttft.counts[i] -= before.ttft_seconds.counts[i];
  }
  const std::int64_t reused = b.prefix_tokens + b.moved_tokens - a.prefix_tokens - a.moved_tokens;
  std::printf("%8.1f %9.0f %6.1f%% %9.1f %7lld %7lld %5.1f%% %6.1f ms\n", rate(a.requests, b.requests),
              rate(a.prompt_tokens, b.prompt_tokens), Percent(reused, b.prompt_tokens - a.prompt_tokens),
              rate(a.generated_tokens, b.generated_tokens), static_cast<long long>(now.requests_running),
              static_cast<long long>(now.requests_waiting), Percent(now.pool.used_bytes, now.pool.capacity_bytes),
              Quantile(ttft, 0.5) * 1000);
  std::fflush(stdout);
}

Json InfoJson(const ServerInfo& info, const Stats& stats) {
  Json reuse = TotalsJson(stats.totals);
  reuse["mode"] = ReuseModeName(info.reuse);
  reuse["miss_reasons"] = MissJson(stats);
  const Json server = {{"version", info.version},
                       {"uptime_s", stats.uptime_s},
                       {"requests_running", stats.requests_running},
                       {"requests_waiting", stats.requests_waiting},
                       {"requests_failed", stats.requests_failed},
                       {"ttft_ms", LatencyJson(stats.ttft_seconds)},
                       {"queue_ms", LatencyJson(stats.queue_seconds)}};
  Json model = ServerJson(info);
  model.erase("version");
  model.erase("reuse");
  return {{"server", server},        {"model", model},
          {"pool", PoolJson(stats)}, {"cold", ColdJson(stats.cold)},
          {"reuse", reuse},          {"agents", AgentsJson(stats)}};
}

// Sections as Redis has them: "# pool", then name:value lines, nested names joined by dots.
void PrintFlat(const std::string& prefix, const Json& json) {
  for (const auto& [key, value] : json.items()) {
    if (value.is_object()) {
      PrintFlat(prefix + key + ".", value);
    } else {
      std::printf("%s%s:%s\n", prefix.c_str(), key.c_str(),
                  value.is_string() ? value.get<std::string>().c_str() : value.dump().c_str());
    }
  }
}

}  // namespace

int RunStat(const DaemonOptions& options) {
  Failure failure;
  const auto target = Target::Open(TargetOf(options.source), &failure);
  if (!target) return Fail(failure);
  auto stats = target->client().GetStats();
  if (!stats.ok()) return Fail(stats.status());
  if (options.interval_s == 0) {
    if (options.format == OutputFormat::kJson) {
      PrintJson(StatJson(*stats));
    } else {
      PrintStatText(*stats);
    }
    return kOk;
  }
  if (options.format == OutputFormat::kText) PrintRateHeader();
  Ticker ticker(options.interval_s, options.count);
  while (ticker.Wait()) {
    auto now = target->client().GetStats();
    if (!now.ok()) return Fail(now.status());
    if (options.format == OutputFormat::kJson) {
      PrintJson(StatJson(*now));
    } else {
      PrintRates(*stats, *now, ticker.elapsed_s());
    }
    stats = std::move(now);
  }
  return ticker.interrupted() ? kInterrupted : kOk;
}

int RunInfo(const DaemonOptions& options) {
  Failure failure;
  const auto target = Target::Open(TargetOf(options.source), &failure);
  if (!target) return Fail(failure);
  const auto stats = target->client().GetStats();
  if (!stats.ok()) return Fail(stats.status());
  Json info = InfoJson(target->info(), *stats);
  if (!options.topic.empty()) info = Json{{options.topic, info.at(options.topic)}};
  if (options.format == OutputFormat::kJson) {
    PrintJson(info);
    return kOk;
  }
  for (const auto& [section, values] : info.items()) {
    std::printf("%s# %s\n", section == info.begin().key() ? "" : "\n", section.c_str());
    PrintFlat("", values);
  }
  return kOk;
}

}  // namespace kvshare::kvctl

// kvctl top: who asks for what at this moment, agent by agent. On a terminal it refreshes in place; elsewhere it prints
// once, over one interval.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "tools/kvctl/commands.h"
#include "tools/kvctl/stat_json.h"
#include "tools/kvctl/target.h"
#include "tools/kvctl/ticker.h"

namespace kvshare::kvctl {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::size_t kMaxRows = 40;

struct Row {
  std::string agent;
  ReuseTotals now;
  double requests_per_s = 0;
  double prompt_per_s = 0;
};

std::vector<Row> Rows(const Stats& before, const Stats& now, double seconds) {
  std::vector<Row> rows;
  for (const auto& [agent, totals] : now.agents) {
    const auto known = before.agents.find(agent);
    const ReuseTotals old = known == before.agents.end() ? ReuseTotals() : known->second;
    rows.push_back({agent, totals, static_cast<double>(totals.requests - old.requests) / seconds,
                    static_cast<double>(totals.prompt_tokens - old.prompt_tokens) / seconds});
  }
  std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) {
    return std::pair(a.prompt_per_s, a.now.prompt_tokens) > std::pair(b.prompt_per_s, b.now.prompt_tokens);
  });
  return rows;
}

Json RowsJson(const std::vector<Row>& rows) {
  Json json = Json::array();
  for (const Row& row : rows) {
    Json entry = {{"agent", row.agent}};
    entry.update(TotalsJson(row.now));
    entry["requests_per_s"] = row.requests_per_s;
    entry["prompt_tokens_per_s"] = row.prompt_per_s;
    json.push_back(std::move(entry));
  }
  return {{"agents", std::move(json)}};
}

void Print(const ServerInfo& info, const Stats& stats, const std::vector<Row>& rows) {
  std::printf("%s, up %.0f s: %lld running, %lld waiting; pool %.1f %% of %.2f GiB; %.1f %% of the prompts reused\n",
              info.model.c_str(), stats.uptime_s, static_cast<long long>(stats.requests_running),
              static_cast<long long>(stats.requests_waiting), Percent(stats.pool.used_bytes, stats.pool.capacity_bytes),
              static_cast<double>(stats.pool.capacity_bytes) / (1 << 30),
              Percent(stats.totals.prefix_tokens + stats.totals.moved_tokens, stats.totals.prompt_tokens));
  std::printf("%-24s %8s %9s %10s %10s %7s %9s\n", "agent", "req/s", "prompt/s", "requests", "prompt", "reused",
              "output");
  for (std::size_t i = 0; i < rows.size() && i < kMaxRows; ++i) {
    const ReuseTotals& t = rows[i].now;
    std::printf("%-24.24s %8.1f %9.0f %10lld %10lld %6.1f%% %9lld\n", rows[i].agent.c_str(), rows[i].requests_per_s,
                rows[i].prompt_per_s, static_cast<long long>(t.requests), static_cast<long long>(t.prompt_tokens),
                Percent(t.prefix_tokens + t.moved_tokens, t.prompt_tokens), static_cast<long long>(t.generated_tokens));
  }
  if (rows.size() > kMaxRows) std::printf("and %zu more\n", rows.size() - kMaxRows);
}

}  // namespace

int RunTop(const DaemonOptions& options) {
  Failure failure;
  const auto target = Target::Open(TargetOf(options.source), &failure);
  if (!target) return Fail(failure);
  auto before = target->client().GetStats();
  if (!before.ok()) return Fail(before.status());
  const bool screen = options.format == OutputFormat::kText && isatty(STDOUT_FILENO) == 1;
  Ticker ticker(options.interval_s, options.count > 0 ? options.count : screen ? 0 : 1);
  while (ticker.Wait()) {
    auto now = target->client().GetStats();
    if (!now.ok()) return Fail(now.status());
    const std::vector<Row> rows = Rows(*before, *now, ticker.elapsed_s());
    if (options.format == OutputFormat::kJson) {
      PrintJson(RowsJson(rows));
    } else {
      if (screen) std::fputs("\033[H\033[2J", stdout);
      Print(target->info(), *now, rows);
      std::fflush(stdout);
    }
    before = std::move(now);
  }
  return ticker.interrupted() ? kInterrupted : kOk;
}

}  // namespace kvshare::kvctl

// The report as one page: style, numbers and plots inline, nothing loaded, nothing run.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "tools/trace/plots.h"
#include "tools/trace/report.h"

namespace kvshare::trace {
namespace {

constexpr std::size_t kAgentsShown = 40;

constexpr const char* kHead = R"(<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>kvshare replay</title><style>
:root{--ink:#1c2733;--soft:#56626f;--line:#dfe5eb;--paper:#fff;--back:#f5f7f9;
--s0:#8493a3;--s1:#2464d0;--s2:#0b8a6a;--s3:#b4661f;--s4:#7d48c4;--s5:#bd3c5c;--s6:#5b7a12;--s7:#0f7f95}
@media(prefers-color-scheme:dark){:root{--ink:#e6ebf0;--soft:#9eabb8;--line:#2c3742;--paper:#18212a;--back:#10171e;
--s0:#8b9aab;--s1:#6aa1ff;--s2:#3cc9a0;--s3:#e39a55;--s4:#b58bf0;--s5:#f07b98;--s6:#a7cc4e;--s7:#4fc3da}}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:960px;margin:0 auto;padding:32px 20px}
h1{font-size:26px;margin:0 0 4px;overflow-wrap:anywhere}h2{font-size:17px;margin:32px 0 10px}
p{margin:4px 0;color:var(--soft)}
.card{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:16px 20px}
table{border-collapse:collapse;width:100%}
th,td{padding:6px 8px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:500}tr:last-child td{border:0}
svg{display:block;width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:var(--soft)}
.keys span{margin-right:16px;white-space:nowrap}
.keys i,td i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
code{font-size:13px}.scroll{overflow-x:auto}
.big{display:flex;gap:16px;flex-wrap:wrap;margin:18px 0}.big div{flex:1 1 180px;color:var(--soft)}
.big b{display:block;font-size:28px;color:var(--ink)}
</style></head><body><main>
)";

std::string Percent(double share) { return Fixed(100 * share, 1) + " %"; }

double Share(std::int64_t part, std::int64_t whole) {
  return whole == 0 ? 0 : static_cast<double>(part) / static_cast<double>(whole);
}

std::string Headline(const Report& report) {
  const ModeReport& before = report.modes.front();
  const ModeReport& after = report.modes.back();
  std::string html = "<div class=\"big\"><div class=\"card\"><b>" + Percent(after.tokens.hit_rate()) +
                     "</b>of prompt tokens reused (" + EscapeHtml(after.mode) + ")</div>";
  if (report.modes.size() > 1 && after.ttft_ms.mean > 0) {
    html += "<div class=\"card\"><b>" + Fixed(before.ttft_ms.mean / after.ttft_ms.mean, 1) +
            "&times;</b>as fast to the first token, on average</div><div class=\"card\"><b>" +
            (before.outputs_sha256 == after.outputs_sha256 ? "identical" : "different") +
            "</b>answers, compared token for token</div>";
  }
  return html + "</div>\n";
}

std::string ModeTable(const Report& report) {
  std::string html =
      "<div class=\"card scroll\"><table><tr><th>mode</th><th>prompt tokens</th><th>reused</th><th>computed</th>"
      "<th>TTFT mean</th><th>p50</th><th>p95</th><th>p99</th><th>replay</th><th>answers (sha256)</th></tr>\n";
  for (std::size_t m = 0; m < report.modes.size(); ++m) {
    const ModeReport& mode = report.modes[m];
    html += "<tr><td><i style=\"background:" + std::string(SeriesColour(m)) + "\"></i>" + EscapeHtml(mode.mode) +
            "</td><td>" + std::to_string(mode.tokens.prompt) + "</td><td>" + Percent(mode.tokens.hit_rate()) +
            "</td><td>" + std::to_string(mode.tokens.fresh + mode.tokens.recomputed) + "</td>";
    for (const double ms : {mode.ttft_ms.mean, mode.ttft_ms.p50, mode.ttft_ms.p95, mode.ttft_ms.p99}) {
      html += "<td>" + Fixed(ms, 1) + " ms</td>";
    }
    html += "<td>" + Fixed(mode.wall_s, 1) + " s</td><td><code>" + EscapeHtml(mode.outputs_sha256.substr(0, 12)) +
            "</code></td></tr>\n";
  }
  return html + "</table></div>\n";
}

std::string CeilingTable(const CeilingReport& c) {
  std::string html =
      "<h2>What an exact prefix cache could reuse of these prompts</h2><div class=\"card scroll\"><table>"
      "<tr><th>pool</th><th>policy</th><th>prompt tokens</th><th>share</th></tr>\n";
  const std::string pool =
      std::to_string(c.pool_pages) + " pages (" + Fixed(static_cast<double>(c.pool_bytes) / (1 << 20), 0) + " MiB)";
  const auto row = [&](const std::string& name, const char* policy, std::int64_t tokens) {
    html += "<tr><td>" + name + "</td><td>" + policy + "</td><td>" + std::to_string(tokens) + "</td><td>" +
            Percent(Share(tokens, c.prompt_tokens)) + "</td></tr>\n";
  };
  row("unlimited, " + std::to_string(c.unique_pages) + " pages", "keeps everything", c.unlimited_tokens);
  row(pool, "Belady: knows what comes", c.belady_tokens);
  row(pool, "least recently used", c.lru_tokens);
  return html + "</table></div>\n";
}

// Each mode's tokens by what became of them.
std::string KindsPlot(const Report& report) {
  const std::vector<std::pair<const char*, std::string>> kinds = {{"var(--s1)", "exact prefix, own"},
                                                                  {"var(--s7)", "exact prefix, another agent's"},
                                                                  {"var(--s2)", "moved"},
                                                                  {"var(--s3)", "recomputed"},
                                                                  {"var(--s0)", "fresh"}};
  std::vector<Bar> bars;
  for (const ModeReport& mode : report.modes) {
    const TokenCounts& t = mode.tokens;
    Bar bar{.name = mode.mode, .note = Percent(t.hit_rate()) + " reused"};
    const std::int64_t values[] = {t.prefix - mode.cross_agent_tokens, mode.cross_agent_tokens, t.moved, t.recomputed,
                                   t.fresh};
    for (std::size_t k = 0; k < kinds.size(); ++k) {
      bar.parts.push_back({static_cast<double>(values[k]), kinds[k].first,
                           mode.mode + ", " + kinds[k].second + ": " + std::to_string(values[k]) + " tokens (" +
                               Percent(Share(values[k], t.prompt)) + ")"});
    }
    bars.push_back(std::move(bar));
  }
  return "<h2>Prompt tokens by kind</h2><div class=\"card\">" + DrawKey(kinds) +
         DrawBars("Prompt tokens by kind, one bar per mode", bars) + "</div>\n";
}

std::vector<std::pair<const char*, std::string>> ModeKey(const Report& report) {
  std::vector<std::pair<const char*, std::string>> key;
  for (std::size_t m = 0; m < report.modes.size(); ++m) key.emplace_back(SeriesColour(m), report.modes[m].mode);
  return key;
}

std::string TtftPlot(const Report& report) {
  LinePlot plot{.label = "Share of requests whose first token came within a time",
                .x_title = "time to first token, ms (logarithmic)",
                .log_x = true};
  for (std::size_t m = 0; m < report.modes.size(); ++m) {
    const std::vector<double>& quantiles = report.modes[m].ttft_ms_quantiles;
    if (quantiles.size() < 2) return "";
    Line line{.name = report.modes[m].mode, .colour = SeriesColour(m)};
    for (std::size_t q = 0; q < quantiles.size(); ++q) {
      line.points.emplace_back(quantiles[q], static_cast<double>(q) / static_cast<double>(quantiles.size() - 1));
    }
    plot.lines.push_back(std::move(line));
  }
  return "<h2>Time to first token: share of requests that waited no longer</h2><div class=\"card\">" +
         DrawKey(ModeKey(report)) + DrawLines(plot) + "</div>\n";
}

std::string OverTimePlot(const Report& report) {
  LinePlot plot{.label = "Reused share of prompt tokens as the replay goes on", .x_title = "requests"};
  auto key = ModeKey(report);
  for (std::size_t m = 0; m < report.modes.size(); ++m) {
    Line line{.name = report.modes[m].mode, .colour = SeriesColour(m)};
    std::int64_t requests = 0;
    for (const Window& window : report.modes[m].windows) {
      requests += window.requests;
      line.points.emplace_back(static_cast<double>(requests), Share(window.reused_tokens, window.prompt_tokens));
    }
    if (line.points.size() < 2) return "";
    plot.x_max = std::max(plot.x_max, static_cast<double>(requests));
    plot.lines.push_back(std::move(line));
  }
  if (report.ceilings) {
    const CeilingReport& c = *report.ceilings;
    const auto level = [&](const char* name, const char* colour, std::int64_t tokens) {
      const double y = Share(tokens, c.prompt_tokens);
      plot.lines.push_back({.name = name, .points = {{0, y}, {plot.x_max, y}}, .colour = colour, .dashed = true});
      key.emplace_back(colour, std::string(name) + " over all, " + Percent(y));
    };
    level("Belady", "var(--s4)", c.belady_tokens);
    level("least recently used", "var(--s3)", c.lru_tokens);
  }
  return "<h2>Hit rate over time</h2><div class=\"card\">" + DrawKey(key) + DrawLines(plot) + "</div>\n";
}

std::string AgentPlot(const Report& report) {
  const ModeReport& mode = report.modes.back();
  if (mode.agents.empty()) return "";
  std::vector<Bar> bars;
  for (std::size_t a = 0; a < std::min(mode.agents.size(), kAgentsShown); ++a) {
    const AgentReport& agent = mode.agents[a];
    const double share = agent.tokens.hit_rate();
    std::string name = agent.agent.substr(0, 28);
    // Not in the middle of a character.
    while (name.size() < agent.agent.size() && !name.empty() &&
           (static_cast<unsigned char>(agent.agent[name.size()]) & 0xc0) == 0x80) {
      name.pop_back();
    }
    bars.push_back({.name = name,
                    .parts = {{share, SeriesColour(report.modes.size() - 1),
                               agent.agent + ": " + std::to_string(agent.tokens.reused()) + " of " +
                                   std::to_string(agent.tokens.prompt) + " tokens"},
                              {1 - share, "var(--line)", agent.agent + ": computed"}},
                    .note = Percent(share)});
  }
  std::string html = "<h2>Reused share of each agent's prompt tokens, mode " + EscapeHtml(mode.mode) +
                     "</h2><div class=\"card\">" + DrawBars("Reused share per agent", bars, 1);
  if (mode.agents.size() > kAgentsShown) {
    html += "<p>... and " + std::to_string(mode.agents.size() - kAgentsShown) + " more agents</p>";
  }
  return html + "</div>\n";
}

}  // namespace

std::string ReportHtml(const Report& report) {
  if (report.modes.empty()) return "";
  std::string html = kHead;
  html += "<h1>" + EscapeHtml(report.trace) + "</h1><p>" + std::to_string(report.requests) + " requests of " +
          std::to_string(report.modes.front().agents.size()) + " agents on " + EscapeHtml(report.model) + " (" +
          EscapeHtml(report.dtype) + ", " + EscapeHtml(report.isa) + ")</p>\n";
  html += Headline(report) + ModeTable(report) + KindsPlot(report) + TtftPlot(report) + OverTimePlot(report);
  if (report.ceilings) html += CeilingTable(*report.ceilings);
  html += AgentPlot(report);
  if (report.modes.front().truncated_requests > 0) {
    html += "<p>" + std::to_string(report.modes.front().truncated_requests) +
            " prompts were longer than the model's window and were cut at their front.</p>\n";
  }
  return html + "</main></body></html>\n";
}

}  // namespace kvshare::trace

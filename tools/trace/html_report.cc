#include <algorithm>
#include <array>
#include <cstdio>
#include <span>

#include "tools/trace/report.h"

namespace kvshare::trace {
namespace {

constexpr std::array<const char*, 6> kColours = {"#9aa5b1", "#2f6fdb", "#12a37f", "#c2783a", "#8e5bd0", "#c94f6d"};

constexpr const char* kHead = R"(<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>kvshare replay</title><style>
:root{--ink:#1c2733;--soft:#5b6875;--line:#e3e8ee;--paper:#fff;--back:#f5f7f9}
@media(prefers-color-scheme:dark){:root{--ink:#e6ebf0;--soft:#9aa5b1;--line:#2c3742;--paper:#18212a;--back:#10171e}}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:960px;margin:0 auto;padding:32px 20px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:17px;margin:32px 0 10px}
p{margin:4px 0;color:var(--soft)}
.card{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:16px 20px}
table{border-collapse:collapse;width:100%}th,td{padding:6px 8px;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:500}tr:last-child td{border:0}
svg{display:block;width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
.key{display:inline-block;width:11px;height:11px;border-radius:3px;margin:0 6px 0 14px}code{font-size:13px}
.scroll{overflow-x:auto}.big{display:flex;gap:16px;flex-wrap:wrap;margin:18px 0}.big div{flex:1 1 180px}
.big b{display:block;font-size:28px;color:var(--ink)}
</style></head><body><main>
)";

std::string Escape(const std::string& text) {
  std::string out;
  for (char c : text) {
    switch (c) {
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '&': out += "&amp;"; break;
      case '"': out += "&quot;"; break;
      default: out += c;
    }
  }
  return out;
}

std::string Fixed(double value, int digits) {
  std::array<char, 64> text;
  std::snprintf(text.data(), text.size(), "%.*f", digits, value);
  return text.data();
}

double Share(const ModeTotals& totals) {
  const std::int64_t reused = totals.prefix_tokens + totals.moved_tokens;
  return totals.prompt_tokens == 0 ? 0 : static_cast<double>(reused) / static_cast<double>(totals.prompt_tokens);
}

std::string Name(const ModeResult& mode) { return std::string(ReuseModeName(mode.mode)); }

std::string Bar(double x, double y, double width, double height, const char* colour, const std::string& title) {
  return "<rect x=\"" + Fixed(x, 2) + "\" y=\"" + Fixed(y, 2) + "\" width=\"" + Fixed(width, 2) + "\" height=\"" +
         Fixed(height, 2) + "\" rx=\"1.5\" fill=\"" + colour + "\"><title>" + Escape(title) + "</title></rect>\n";
}

std::string Label(double x, double y, const char* anchor, const std::string& text) {
  return "<text x=\"" + Fixed(x, 1) + "\" y=\"" + Fixed(y, 1) + "\" text-anchor=\"" + anchor + "\">" + Escape(text) +
         "</text>\n";
}

// One group of bars per request, a bar per mode. Beyond 400 requests neighbours are averaged, so that bars stay
// visible.
std::string TtftChart(const Replay& replay) {
  constexpr double kWidth = 900, kHeight = 240, kLeft = 52, kBottom = 22, kTop = 10;
  const std::size_t n = replay.prompts.size();
  const std::size_t per_group = (n + 399) / 400;
  const std::size_t groups = (n + per_group - 1) / per_group;
  double highest = 1;
  for (const ModeResult& mode : replay.modes) {
    for (const RequestResult& request : mode.requests) highest = std::max(highest, request.ttft_ms);
  }
  const double scale = (kHeight - kBottom - kTop) / highest;
  const double step = (kWidth - kLeft) / static_cast<double>(groups);
  const double bar = step * 0.8 / static_cast<double>(replay.modes.size());
  std::string svg = "<svg viewBox=\"0 0 900 240\" role=\"img\" aria-label=\"Time to first token of each request\">\n";
  for (int line = 0; line <= 4; ++line) {
    const double y = kHeight - kBottom - (kHeight - kBottom - kTop) * line / 4;
    svg +=
        "<line x1=\"52\" x2=\"900\" y1=\"" + Fixed(y, 1) + "\" y2=\"" + Fixed(y, 1) + "\" stroke=\"var(--line)\"/>\n";
    svg += Label(kLeft - 6, y + 4, "end", Fixed(highest * line / 4, 0) + " ms");
  }
  for (std::size_t g = 0; g < groups; ++g) {
    for (std::size_t m = 0; m < replay.modes.size(); ++m) {
      const std::size_t begin = g * per_group;
      const std::size_t end = std::min(n, begin + per_group);
      double sum = 0;
      for (std::size_t r = begin; r < end; ++r) sum += replay.modes[m].requests[r].ttft_ms;
      const double ms = sum / static_cast<double>(end - begin);
      const RequestResult& first = replay.modes[m].requests[begin];
      const TraceRequest& recorded = replay.trace.requests[replay.prompts[begin].request];
      const std::string title = recorded.id + " (" + recorded.agent + "), " + Name(replay.modes[m]) + ": " +
                                Fixed(ms, 1) + " ms, " +
                                std::to_string(first.reuse.prefix_tokens + first.reuse.moved_tokens) + " of " +
                                std::to_string(replay.prompts[begin].ids.size()) + " tokens reused";
      svg += Bar(kLeft + step * (static_cast<double>(g) + 0.1) + bar * static_cast<double>(m),
                 kHeight - kBottom - ms * scale, bar, ms * scale, kColours[m % kColours.size()], title);
    }
  }
  svg += Label(kLeft, kHeight - 5, "start", "request 1");
  svg += Label(kWidth, kHeight - 5, "end", "request " + std::to_string(n));
  return svg + "</svg>\n";
}

// Reused share of each agent's prompt tokens in the last mode.
std::string AgentChart(const Replay& replay) {
  const std::vector<std::string> all = Agents(replay);
  const std::span<const std::string> agents(all.data(), std::min<std::size_t>(all.size(), 40));
  const std::size_t m = replay.modes.size() - 1;
  const double height = 26 * static_cast<double>(agents.size()) + 4;
  std::string svg =
      "<svg viewBox=\"0 0 900 " + Fixed(height, 0) + "\" role=\"img\" aria-label=\"Reused share per agent\">\n";
  double y = 4;
  for (const std::string& agent : agents) {
    const ModeTotals totals = Totals(replay, replay.modes[m], &agent);
    const std::string percent = Fixed(100 * Share(totals), 1) + " %";
    svg += Label(170, y + 14, "end", agent.empty() ? "default" : agent.substr(0, 28));
    svg += Bar(180, y, 640, 18, "var(--line)", agent);
    svg += Bar(180, y, 640 * Share(totals), 18, kColours[m % kColours.size()],
               agent + ": " + percent + " of " + std::to_string(totals.prompt_tokens) + " tokens");
    svg += Label(828, y + 14, "start", percent);
    y += 26;
  }
  return svg + "</svg>\n";
}

std::string Table(const Replay& replay, const std::vector<ModeTotals>& totals) {
  std::string html =
      "<div class=\"card scroll\"><table><tr><th>mode</th><th>prompt "
      "tokens</th><th>reused</th><th>computed</th><th>TTFT mean</th>"
      "<th>p50</th><th>p95</th><th>p99</th><th>replay</th><th>answers (sha256)</th></tr>\n";
  for (std::size_t m = 0; m < totals.size(); ++m) {
    const ModeTotals& t = totals[m];
    html +=
        "<tr><td><span class=\"key\" style=\"margin-left:0;background:" + std::string(kColours[m % kColours.size()]) +
        "\"></span>" + Name(replay.modes[m]) + "</td><td>" + std::to_string(t.prompt_tokens) + "</td><td>" +
        Fixed(100 * Share(t), 1) + " %</td><td>" + std::to_string(t.fresh_tokens + t.recomputed_tokens) + "</td>";
    for (double ms : {t.ttft_ms.mean, t.ttft_ms.p50, t.ttft_ms.p95, t.ttft_ms.p99})
      html += "<td>" + Fixed(ms, 1) + " ms</td>";
    html += "<td>" + Fixed(replay.modes[m].wall_s, 1) + " s</td><td><code>" + t.outputs_sha256.substr(0, 12) +
            "</code></td></tr>\n";
  }
  return html + "</table></div>\n";
}

}  // namespace

std::string ReportHtml(const Replay& replay) {
  std::vector<ModeTotals> totals;
  for (const ModeResult& mode : replay.modes) totals.push_back(Totals(replay, mode));
  const ModeTotals& before = totals.front();
  const ModeTotals& after = totals.back();
  std::string html = kHead;
  html += "<h1>" + Escape(replay.trace_name) + "</h1><p>" + std::to_string(replay.prompts.size()) + " requests of " +
          std::to_string(Agents(replay).size()) + " agents on " + Escape(replay.model) + " (" + Escape(replay.dtype) +
          ", " + Escape(replay.isa) + ")</p>\n";
  html += "<div class=\"big\"><div class=\"card\"><b>" + Fixed(100 * Share(after), 1) +
          " %</b>of prompt tokens reused</div>";
  if (totals.size() > 1 && after.ttft_ms.mean > 0) {
    html += "<div class=\"card\"><b>" + Fixed(before.ttft_ms.mean / after.ttft_ms.mean, 1) +
            "&times;</b>faster to the first token, on average</div><div class=\"card\"><b>" +
            (before.outputs_sha256 == after.outputs_sha256 ? "identical" : "different") +
            "</b>answers, compared token for token</div>";
  }
  html += "</div>\n" + Table(replay, totals);
  html += "<h2>Time to first token, request by request</h2><div class=\"card\"><p>";
  for (std::size_t m = 0; m < totals.size(); ++m) {
    html += "<span class=\"key\" style=\"background:" + std::string(kColours[m % kColours.size()]) + "\"></span>" +
            Name(replay.modes[m]);
  }
  html += "</p>" + TtftChart(replay) + "</div>\n";
  html += "<h2>Reused share of each agent's prompt tokens, mode " + Name(replay.modes.back()) +
          "</h2><div class=\"card\">" + AgentChart(replay) + "</div>\n";
  if (before.truncated_requests > 0) {
    html += "<p>" + std::to_string(before.truncated_requests) +
            " prompts were longer than the model's window and were cut at their front.</p>\n";
  }
  return html + "</main></body></html>\n";
}

}  // namespace kvshare::trace

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <set>

#include "bench/quality/report.h"

namespace kvshare::quality {
namespace {

constexpr std::array<const char*, 8> kColours = {"#7a8794", "#2f6fdb", "#12a37f", "#c2783a",
                                                 "#8e5bd0", "#c94f6d", "#3a9bb5", "#a08a1f"};

constexpr const char* kHead = R"(<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>kvshare quality</title><style>
:root{--ink:#1c2733;--soft:#5b6875;--line:#e3e8ee;--paper:#fff;--back:#f5f7f9}
@media(prefers-color-scheme:dark){:root{--ink:#e6ebf0;--soft:#9aa5b1;--line:#2c3742;--paper:#18212a;--back:#10171e}}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:960px;margin:0 auto;padding:32px 20px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:17px;margin:32px 0 10px}p{margin:4px 0;color:var(--soft)}
.card{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:16px 20px;overflow-x:auto}
table{border-collapse:collapse;width:100%}th,td{padding:6px 8px;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:500}tr:last-child td{border:0}
svg{display:block;width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
.key{display:inline-block;width:11px;height:11px;border-radius:3px;margin:0 6px 0 0}
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

std::string Number(const char* format, double value) {
  std::array<char, 64> text;
  std::snprintf(text.data(), text.size(), format, value);
  return text.data();
}
std::string Fixed(double value) { return Number("%.1f", value); }

std::string Label(double x, double y, const char* anchor, const std::string& text) {
  return "<text x=\"" + Fixed(x) + "\" y=\"" + Fixed(y) + "\" text-anchor=\"" + anchor + "\">" + Escape(text) +
         "</text>\n";
}

std::string GridLine(double x1, double y1, double x2, double y2) {
  return "<line x1=\"" + Fixed(x1) + "\" y1=\"" + Fixed(y1) + "\" x2=\"" + Fixed(x2) + "\" y2=\"" + Fixed(y2) +
         "\" stroke=\"var(--line)\"/>\n";
}

std::string Open(double height, const char* label) {
  return "<svg viewBox=\"0 0 900 " + Fixed(height) + "\" role=\"img\" aria-label=\"" + label + "\">\n";
}

std::string Name(const PolicySummary& policy) { return std::string(ReuseModeName(policy.policy.mode)); }
const char* Colour(std::size_t policy) { return kColours[policy % kColours.size()]; }
std::string Key(std::size_t policy) {
  return "<span class=\"key\" style=\"background:" + std::string(Colour(policy)) + "\"></span>";
}

std::string Table(const QualityReport& report) {
  std::string html =
      "<div class=\"card\"><table><tr><th>policy</th><th>charged budget</th><th>KL mean</th><th>p95</th><th>max</th>"
      "<th>noise floors</th><th>top-1</th><th>same reply</th><th>prefill</th></tr>\n";
  for (std::size_t i = 0; i < report.policies.size(); ++i) {
    const PolicySummary& p = report.policies[i];
    const Spread kl = SpreadOf(p.all.kl);
    const double same = p.all.n == 0 ? 0 : static_cast<double>(p.all.identical) / static_cast<double>(p.all.n);
    html += "<tr><td>" + Key(i) + Name(p) + "</td><td>" + Number("%.3f", p.charged_budget) + "</td><td>" +
            Number("%.2e", kl.mean) + "</td><td>" + Number("%.2e", kl.p95) + "</td><td>" + Number("%.2e", kl.max) +
            "</td><td>" + (p.all.floors.empty() ? "" : Number("%.3g", QuotientOfSums(TermsOf(p.all.floors)))) +
            "</td><td>" + Number("%.4f", p.top1) + "</td><td>" + Number("%.3f", same) + "</td><td>" +
            Fixed(p.prefill_ms) + " ms</td></tr>\n";
  }
  return html + "</table></div>\n";
}

// KL (logarithmic) over charged budget, a dot per policy.
std::string Frontier(const QualityReport& report) {
  constexpr double kHeight = 300, kLeft = 60, kRight = 880, kTop = 12, kBottom = 262, kLowest = 1e-7;
  double highest = 1e-2;
  double widest = 1;
  for (const PolicySummary& p : report.policies) {
    highest = std::max(highest, Mean(p.all.kl));
    widest = std::max(widest, p.charged_budget);
  }
  const double decades = std::log10(highest / kLowest);
  const auto at_y = [&](double kl) {
    return kBottom - (kBottom - kTop) * std::log10(std::max(kl, kLowest) / kLowest) / decades;
  };
  const auto at_x = [&](double budget) { return kLeft + (kRight - kLeft) * budget / widest; };
  std::string svg = Open(kHeight, "KL against charged budget");
  for (double kl = kLowest; kl <= highest * 1.0001; kl *= 10) {
    svg += GridLine(kLeft, at_y(kl), kRight, at_y(kl)) + Label(kLeft - 6, at_y(kl) + 4, "end", Number("%.0e", kl));
  }
  for (int i = 0; i <= 10; ++i) {
    svg += Label(at_x(widest * i / 10), kBottom + 16, "middle", Number("%.2f", widest * i / 10));
  }
  svg += Label((kLeft + kRight) / 2, kHeight - 4, "middle", "charged budget: share of reusable KV that was computed");
  const double floor = Mean(report.floor.Tokens());
  if (floor > 0) {
    svg += "<line x1=\"60\" x2=\"880\" y1=\"" + Fixed(at_y(floor)) + "\" y2=\"" + Fixed(at_y(floor)) +
           "\" stroke=\"var(--soft)\" stroke-dasharray=\"4 4\"/>\n" +
           Label(kRight, at_y(floor) - 4, "end", "noise floor");
  }
  for (std::size_t i = 0; i < report.policies.size(); ++i) {
    const PolicySummary& p = report.policies[i];
    const double kl = Mean(p.all.kl);
    svg += "<circle cx=\"" + Fixed(at_x(p.charged_budget)) + "\" cy=\"" + Fixed(at_y(kl)) + "\" r=\"6\" fill=\"" +
           Colour(i) + "\"><title>" + Name(p) + ": KL " + Number("%.2e", kl) + " at budget " +
           Number("%.3f", p.charged_budget) + "</title></circle>\n" +
           Label(at_x(p.charged_budget) + (p.charged_budget > 0.9 * widest ? -10 : 10), at_y(kl) + 4,
                 p.charged_budget > 0.9 * widest ? "end" : "start", Name(p));
  }
  return svg + "</svg>\n";
}

using Groups = std::map<std::string, Group> PolicySummary::*;

std::set<std::string> NamesOf(const QualityReport& report, Groups groups) {
  std::set<std::string> names;
  for (const PolicySummary& p : report.policies) {
    for (const auto& [name, group] : p.*groups) names.insert(name);
  }
  return names;
}

// One block per kind, a bar per policy; a tick marks exact's accuracy, a line the interval of the difference.
std::string Accuracy(const QualityReport& report) {
  constexpr double kLeft = 190, kWide = 560;
  std::string body;
  double y = 8;
  for (const std::string& kind : NamesOf(report, &PolicySummary::tasks)) {
    bool titled = false;
    for (std::size_t i = 0; i < report.policies.size(); ++i) {
      const auto found = report.policies[i].tasks.find(kind);
      if (found == report.policies[i].tasks.end() || found->second.answered == 0) continue;
      const Group& g = found->second;
      if (!titled) body += Label(8, y + 11, "start", kind.substr(0, 24) + " (" + std::to_string(g.answered) + ")");
      titled = true;
      const Interval ci = IntervalOf(g.differences);
      const double exact = g.Share(g.exact_right);
      body += Label(kLeft - 8, y + 11, "end", Name(report.policies[i]));
      body += "<rect x=\"" + Fixed(kLeft) + "\" y=\"" + Fixed(y) + "\" width=\"" + Fixed(kWide * g.Share(g.right)) +
              "\" height=\"13\" rx=\"2\" fill=\"" + Colour(i) + "\"/>\n";
      body += "<line x1=\"" + Fixed(kLeft + kWide * exact) + "\" x2=\"" + Fixed(kLeft + kWide * exact) + "\" y1=\"" +
              Fixed(y - 2) + "\" y2=\"" + Fixed(y + 15) + "\" stroke=\"var(--ink)\" stroke-width=\"2\"/>\n";
      body += Label(
          kLeft + kWide + 10, y + 11, "start",
          Number("%.3f", g.Share(g.right)) + "  [" + Number("%+.3f", ci.low) + ", " + Number("%+.3f", ci.high) + "]");
      y += 17;
    }
    if (titled) y += 8;
  }
  return Open(y + 4, "Accuracy by kind of question") + body + "</svg>\n";
}

// Mean KL of each group: a row per group, a column per policy.
std::string KlTable(const QualityReport& report, const char* what, Groups groups) {
  std::string html = "<div class=\"card\"><table><tr><th>" + std::string(what) + "</th>";
  for (std::size_t i = 0; i < report.policies.size(); ++i) {
    html += "<th>" + Key(i) + Name(report.policies[i]) + "</th>";
  }
  html += "</tr>\n";
  for (const std::string& name : NamesOf(report, groups)) {
    html += "<tr><td>" + Escape(name) + "</td>";
    for (const PolicySummary& p : report.policies) {
      const auto found = (p.*groups).find(name);
      html += found == (p.*groups).end()
                  ? "<td></td>"
                  : "<td>" + Number("%.2e", Mean(found->second.kl)) + " (" + std::to_string(found->second.n) +
                        ")<br><small>" + FloorsText(found->second) + "</small></td>";
    }
    html += "</tr>\n";
  }
  return html + "</table></div>\n";
}

}  // namespace

std::string ReportHtml(const QualityReport& report) {
  std::string html = kHead;
  html += "<h1>Answers under reuse</h1><p>" + Escape(report.model) + " (" + Escape(report.dtype) + "), " +
          Escape(report.source) + ": " + std::to_string(report.samples) + " samples, " +
          std::to_string(report.questions) + " questions, " + std::to_string(report.reply_tokens) +
          " tokens compared with exact prefill (" + Fixed(report.exact_prefill_ms) +
          " ms with the prefix it shares between questions).</p>\n";
  if (report.floor.Cases() > 0) {
    html += "<p>Noise floor, exact prefill against itself in " + Escape(report.floor.against) + ": KL " +
            Number("%.2e", Mean(report.floor.Tokens())) + " per token.</p>\n";
  }
  html += "<h2>Policies</h2>" + Table(report);
  html += "<h2>Quality against what is computed</h2><div class=\"card\">" + Frontier(report) + "</div>\n";
  html +=
      "<h2>Accuracy by kind</h2><div class=\"card\"><p>Bars: the policy; tick: exact prefill on the same questions; "
      "in brackets the 95 % interval of the difference.</p>" +
      Accuracy(report) + "</div>\n";
  html += "<h2>KL per token (questions), and in noise floors of the same questions with its 95 % interval</h2>" +
          KlTable(report, "kind", &PolicySummary::tasks);
  html += KlTable(report, "the answer's chunk is the prompt's", &PolicySummary::slots);
  html += KlTable(report, "question of the conversation", &PolicySummary::turns);
  html += KlTable(report, "the answer's chunk was", &PolicySummary::reuse);
  html += KlTable(report, "the answer needs", &PolicySummary::spread);
  html += KlTable(report, "reader", &PolicySummary::reader);
  return html + "</main></body></html>\n";
}

}  // namespace kvshare::quality

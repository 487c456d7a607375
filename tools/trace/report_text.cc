// The report as text tables, and as one CSV row per mode.
#include <algorithm>
#include <array>
#include <cstdio>

#include "tools/trace/csv.h"
#include "tools/trace/report.h"

namespace kvshare::trace {
namespace {

constexpr std::size_t kAgentsShown = 20;
constexpr std::size_t kSteps = 10;  // of the hit rate over time

std::string Grouped(std::int64_t value) {
  std::string digits = std::to_string(value);
  for (std::size_t at = digits.size(); at > 3; at -= 3) digits.insert(at - 3, ",");
  return digits;
}

template <typename... Args>
std::string Format(const char* format, Args... args) {
  std::array<char, 512> line;
  std::snprintf(line.data(), line.size(), format, args...);
  return line.data();
}

std::string WithShare(std::int64_t part, std::int64_t whole) {
  const double percent = whole == 0 ? 0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
  return Format("%s (%.1f %%)", Grouped(part).c_str(), percent);
}

// Cut to `width` characters (not bytes), so that columns stay columns.
std::string Fit(std::string text, std::size_t width) {
  std::size_t characters = 0;
  for (std::size_t at = 0; at < text.size(); ++at) {
    if ((static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) continue;
    if (characters++ == width) {
      text.resize(at);
      break;
    }
  }
  return text + std::string(width - std::min(width, characters), ' ');
}

class Table {
 public:
  explicit Table(const Report& report) : report_(report) {}

  template <typename Cell>
  void Row(const char* title, const Cell& cell) {
    text_ += Format("  %-28s", title);
    for (const ModeReport& mode : report_.modes) text_ += Format("%20s", std::string(cell(mode)).c_str());
    text_ += '\n';
  }
  const std::string& text() const { return text_; }

 private:
  const Report& report_;
  std::string text_;
};

std::string ModeTable(const Report& report) {
  Table table(report);
  const auto share = [](std::int64_t TokenCounts::*part) {
    return [part](const ModeReport& mode) { return WithShare(mode.tokens.*part, mode.tokens.prompt); };
  };
  const auto any = [&](std::int64_t TokenCounts::*part) {
    return std::any_of(report.modes.begin(), report.modes.end(),
                       [&](const ModeReport& mode) { return mode.tokens.*part > 0; });
  };
  table.Row("reuse mode", [](const ModeReport& mode) { return mode.mode; });
  table.Row("prompt tokens reused",
            [](const ModeReport& mode) { return WithShare(mode.tokens.reused(), mode.tokens.prompt); });
  if (any(&TokenCounts::moved)) {
    table.Row("  exact prefix", share(&TokenCounts::prefix));
    table.Row("  moved", share(&TokenCounts::moved));
  }
  if (any(&TokenCounts::prefix)) {
    table.Row("  first from another agent",
              [](const ModeReport& mode) { return WithShare(mode.cross_agent_tokens, mode.tokens.prompt); });
  }
  table.Row("prompt tokens computed",
            [](const ModeReport& mode) { return Grouped(mode.tokens.recomputed + mode.tokens.fresh); });
  if (any(&TokenCounts::recomputed)) table.Row("  of chunks that were found", share(&TokenCounts::recomputed));
  const auto ms = [&](const char* title, double Summary::*member) {
    table.Row(title, [&](const ModeReport& mode) { return Format("%.1f ms", mode.ttft_ms.*member); });
  };
  ms("time to first token, mean", &Summary::mean);
  ms("                     p50", &Summary::p50);
  ms("                     p95", &Summary::p95);
  ms("                     p99", &Summary::p99);
  table.Row("whole replay", [](const ModeReport& mode) { return Format("%.1f s", mode.wall_s); });
  return table.text();
}

std::string Comparisons(const Report& report) {
  std::string text;
  const ModeReport& base = report.modes.front();
  for (std::size_t m = 1; m < report.modes.size(); ++m) {
    const ModeReport& mode = report.modes[m];
    const double times = mode.ttft_ms.mean > 0 ? base.ttft_ms.mean / mode.ttft_ms.mean : 0.0;
    const bool same = mode.outputs_sha256 == base.outputs_sha256;
    text += Format(
        "  %s against %s: first token %.1f times as fast; answers %s\n", mode.mode.c_str(), base.mode.c_str(), times,
        same ? ("identical, token for token (sha256 " + base.outputs_sha256.substr(0, 12) + ")").c_str() : "differ");
  }
  if (base.truncated_requests > 0) {
    text += Format("  %s prompts were longer than the model's window and were cut at their front\n",
                   Grouped(base.truncated_requests).c_str());
  }
  return text;
}

std::string CeilingTable(const CeilingReport& c) {
  std::string text = Format("\n  %-50s%20s\n", "what an exact prefix cache could reuse of these", "prompt tokens");
  const auto row = [&](const std::string& title, std::int64_t tokens) {
    text += Format("  %-50s%20s\n", title.c_str(), WithShare(tokens, c.prompt_tokens).c_str());
  };
  const std::string pool =
      Grouped(c.pool_pages) + " pages, " + Format("%.0f MiB", static_cast<double>(c.pool_bytes) / (1 << 20));
  row("unlimited pool (" + Grouped(c.unique_pages) + " pages)", c.unlimited_tokens);
  row("this pool (" + pool + "), clairvoyant", c.belady_tokens);
  row("this pool, least recently used", c.lru_tokens);
  return text;
}

std::string OverTime(const Report& report) {
  std::string text;
  for (const ModeReport& mode : report.modes) {
    if (mode.windows.size() < 2 || mode.tokens.reused() == 0) continue;
    if (text.empty()) text = "\n  hit rate over time, % of prompt tokens, from the first requests to the last\n";
    text += "  " + Fit(mode.mode, 12);
    const std::size_t steps = std::min(kSteps, mode.windows.size());
    for (std::size_t s = 0; s < steps; ++s) {
      std::int64_t prompt = 0, reused = 0;
      for (std::size_t w = s * mode.windows.size() / steps; w < (s + 1) * mode.windows.size() / steps; ++w) {
        prompt += mode.windows[w].prompt_tokens;
        reused += mode.windows[w].reused_tokens;
      }
      text += Format("%6.1f", prompt == 0 ? 0.0 : 100.0 * static_cast<double>(reused) / static_cast<double>(prompt));
    }
    text += '\n';
  }
  return text;
}

std::string AgentTable(const Report& report) {
  const ModeReport& first = report.modes.front();
  const ModeReport& last = report.modes.back();
  if (last.agents.empty()) return "";
  const bool compare = report.modes.size() > 1 && first.agents.size() == last.agents.size();
  std::string text = Format("\n  %s%10s%10s%16s\n", Fit("agent", 30).c_str(), "requests", "reused",
                            compare ? "mean TTFT, ms" : "mean TTFT");
  for (std::size_t a = 0; a < std::min(last.agents.size(), kAgentsShown); ++a) {
    const AgentReport& agent = last.agents[a];
    text += Format("  %s%10lld%8.1f %%", Fit(agent.agent, 30).c_str(), static_cast<long long>(agent.requests),
                   100 * agent.tokens.hit_rate());
    text += compare ? Format("%8.0f -> %.0f\n", first.agents[a].ttft_ms_mean, agent.ttft_ms_mean)
                    : Format("%13.0f ms\n", agent.ttft_ms_mean);
  }
  if (last.agents.size() > kAgentsShown) {
    text += Format("  ... and %zu more agents\n", last.agents.size() - kAgentsShown);
  }
  return text;
}

}  // namespace

std::string ReportText(const Report& report) {
  if (report.modes.empty()) return "";
  std::string text = "Replayed " + report.trace + ": " + Grouped(report.requests) + " requests of " +
                     std::to_string(report.modes[0].agents.size()) + " agents, " +
                     Grouped(report.modes[0].tokens.prompt) + " prompt tokens, on " + report.model + " (" +
                     report.dtype + ", " + report.isa + ")\n\n";
  text += ModeTable(report) + "\n" + Comparisons(report);
  if (report.ceilings) text += CeilingTable(*report.ceilings);
  return text + OverTime(report) + AgentTable(report);
}

std::string ReportCsv(const Report& report) {
  std::string csv =
      "mode,requests,prompt_tokens,prefix_tokens,cross_agent_tokens,moved_tokens,recomputed_tokens,fresh_tokens,hit_"
      "rate,"
      "truncated_requests,ttft_ms_mean,ttft_ms_p50,ttft_ms_p95,ttft_ms_p99,wall_s,outputs_sha256\n";
  for (const ModeReport& mode : report.modes) {
    csv += CsvField(mode.mode) + "," + std::to_string(report.requests);
    for (const std::int64_t tokens : {mode.tokens.prompt, mode.tokens.prefix, mode.cross_agent_tokens,
                                      mode.tokens.moved, mode.tokens.recomputed, mode.tokens.fresh}) {
      csv += "," + std::to_string(tokens);
    }
    csv += "," + CsvNumber(mode.tokens.hit_rate()) + "," + std::to_string(mode.truncated_requests);
    for (const double value : {mode.ttft_ms.mean, mode.ttft_ms.p50, mode.ttft_ms.p95, mode.ttft_ms.p99, mode.wall_s}) {
      csv += "," + CsvNumber(value);
    }
    csv += "," + CsvField(mode.outputs_sha256) + "\n";
  }
  return csv;
}

}  // namespace kvshare::trace

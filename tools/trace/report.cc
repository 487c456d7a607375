#include "tools/trace/report.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "libkvshare/core/hash.h"

namespace kvshare::trace {
namespace {

using Json = nlohmann::ordered_json;

std::string Dump(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

double Round(double value) { return static_cast<double>(static_cast<std::int64_t>(value * 1000 + 0.5)) / 1000; }

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

double Percent(std::int64_t part, std::int64_t whole) {
  return whole == 0 ? 0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
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

}  // namespace

ModeTotals Totals(const Replay& replay, const ModeResult& mode, const std::string* agent) {
  ModeTotals totals;
  std::vector<double> ttft;
  std::vector<TokenId> outputs;
  for (std::size_t r = 0; r < mode.requests.size(); ++r) {
    const PreparedPrompt& prompt = replay.prompts[r];
    const RequestResult& result = mode.requests[r];
    if (agent != nullptr && replay.trace.requests[prompt.request].agent != *agent) continue;
    totals.prompt_tokens += static_cast<std::int64_t>(prompt.ids.size());
    totals.prefix_tokens += result.reuse.prefix_tokens;
    totals.moved_tokens += result.reuse.moved_tokens;
    totals.recomputed_tokens += result.reuse.recomputed_tokens;
    totals.fresh_tokens += result.reuse.fresh_tokens;
    totals.truncated_requests += prompt.truncated ? 1 : 0;
    ttft.push_back(result.ttft_ms);
    outputs.insert(outputs.end(), result.output_ids.begin(), result.output_ids.end());
  }
  totals.ttft_ms = Summarise(std::move(ttft));
  totals.outputs_sha256 = PlainSha256(std::as_bytes(std::span(outputs))).Hex();
  return totals;
}

std::vector<std::string> Agents(const Replay& replay) {
  std::vector<std::string> agents;
  for (const PreparedPrompt& prompt : replay.prompts) {
    const std::string& agent = replay.trace.requests[prompt.request].agent;
    if (std::find(agents.begin(), agents.end(), agent) == agents.end()) agents.push_back(agent);
  }
  return agents;
}

std::string ReportJson(const Replay& replay) {
  Json modes = Json::object();
  for (const ModeResult& mode : replay.modes) {
    const ModeTotals totals = Totals(replay, mode);
    Json agents = Json::object();
    for (const std::string& agent : Agents(replay)) {
      const ModeTotals own = Totals(replay, mode, &agent);
      agents[agent.empty() ? "default" : agent] = {{"prompt_tokens", own.prompt_tokens},
                                                   {"prefix_tokens", own.prefix_tokens},
                                                   {"ttft_ms_mean", Round(own.ttft_ms.mean)}};
    }
    Json out = {{"prompt_tokens", totals.prompt_tokens},
                {"prefix_tokens", totals.prefix_tokens},
                {"moved_tokens", totals.moved_tokens},
                {"recomputed_tokens", totals.recomputed_tokens},
                {"fresh_tokens", totals.fresh_tokens},
                {"truncated_requests", totals.truncated_requests},
                {"ttft_ms",
                 {{"mean", Round(totals.ttft_ms.mean)},
                  {"p50", Round(totals.ttft_ms.p50)},
                  {"p95", Round(totals.ttft_ms.p95)},
                  {"p99", Round(totals.ttft_ms.p99)}}},
                {"wall_s", Round(mode.wall_s)},
                {"outputs_sha256", totals.outputs_sha256},
                {"peak_rss_bytes", nullptr},
                {"agents", std::move(agents)}};
    if (mode.peak_rss_bytes) out["peak_rss_bytes"] = *mode.peak_rss_bytes;
    modes[std::string(ReuseModeName(mode.mode))] = std::move(out);
  }
  return Dump({{"trace", replay.trace_name},
               {"model", replay.model},
               {"dtype", replay.dtype},
               {"isa", replay.isa},
               {"requests", replay.prompts.size()},
               {"modes", std::move(modes)}});
}

void WriteDump(const Replay& replay, std::ostream& out) {
  for (const ModeResult& mode : replay.modes) {
    for (std::size_t r = 0; r < mode.requests.size(); ++r) {
      const TraceRequest& recorded = replay.trace.requests[replay.prompts[r].request];
      const RequestResult& result = mode.requests[r];
      Json misses = Json::array();
      for (const MissReason& miss : result.reuse.miss_reasons) {
        misses.push_back({{"reason", miss.reason}, {"tokens", miss.tokens}});
      }
      out << Dump({{"request_id", recorded.id},
                   {"mode", ReuseModeName(mode.mode)},
                   {"agent", recorded.agent},
                   {"ids", replay.prompts[r].ids},
                   {"output_ids", result.output_ids},
                   {"prefix_tokens", result.reuse.prefix_tokens},
                   {"moved_tokens", result.reuse.moved_tokens},
                   {"recomputed_tokens", result.reuse.recomputed_tokens},
                   {"fresh_tokens", result.reuse.fresh_tokens},
                   {"ttft_ms", Round(result.ttft_ms)},
                   {"miss_reasons", std::move(misses)}})
          << '\n';
    }
  }
}

std::string ReportText(const Replay& replay) {
  std::vector<ModeTotals> totals;
  for (const ModeResult& mode : replay.modes) totals.push_back(Totals(replay, mode));
  const std::vector<std::string> agents = Agents(replay);
  std::string text =
      Format("Replayed %s: %zu requests of %zu agents, %s prompt tokens, on %s (%s, %s)\n\n", replay.trace_name.c_str(),
             replay.prompts.size(), agents.size(), Grouped(totals[0].prompt_tokens).c_str(), replay.model.c_str(),
             replay.dtype.c_str(), replay.isa.c_str());
  const auto row = [&](const char* title, const auto& cell) {
    text += Format("  %-26s", title);
    for (std::size_t m = 0; m < totals.size(); ++m) text += Format("%18s", cell(m).c_str());
    text += '\n';
  };
  row("reuse mode", [&](std::size_t m) { return std::string(ReuseModeName(replay.modes[m].mode)); });
  row("prompt tokens reused", [&](std::size_t m) {
    const std::int64_t reused = totals[m].prefix_tokens + totals[m].moved_tokens;
    return Format("%s (%.1f %%)", Grouped(reused).c_str(), Percent(reused, totals[m].prompt_tokens));
  });
  row("prompt tokens computed",
      [&](std::size_t m) { return Grouped(totals[m].recomputed_tokens + totals[m].fresh_tokens); });
  const auto ms = [&](const char* title, double Summary::*member) {
    row(title, [&](std::size_t m) { return Format("%.1f ms", totals[m].ttft_ms.*member); });
  };
  ms("time to first token, mean", &Summary::mean);
  ms("                     p50", &Summary::p50);
  ms("                     p95", &Summary::p95);
  row("whole replay", [&](std::size_t m) { return Format("%.1f s", replay.modes[m].wall_s); });

  text += '\n';
  for (std::size_t m = 1; m < totals.size(); ++m) {
    const double before = totals[0].ttft_ms.mean;
    const double after = totals[m].ttft_ms.mean;
    text += Format("  %s against %s: first token %.1f times as fast; answers %s\n",
                   std::string(ReuseModeName(replay.modes[m].mode)).c_str(),
                   std::string(ReuseModeName(replay.modes[0].mode)).c_str(), after > 0 ? before / after : 0.0,
                   totals[m].outputs_sha256 == totals[0].outputs_sha256
                       ? ("identical, token for token (sha256 " + totals[0].outputs_sha256.substr(0, 12) + ")").c_str()
                       : "differ");
  }
  if (totals[0].truncated_requests > 0) {
    text += Format("  %s prompts were longer than the model's window and were cut at their front\n",
                   Grouped(totals[0].truncated_requests).c_str());
  }

  const ModeResult& last = replay.modes.back();
  text += Format("\n  %s%10s%10s%14s\n", Fit("agent", 26).c_str(), "requests", "reused",
                 replay.modes.size() > 1 ? "mean TTFT, ms" : "mean TTFT");
  for (const std::string& agent : agents) {
    const ModeTotals first = Totals(replay, replay.modes.front(), &agent);
    const ModeTotals own = Totals(replay, last, &agent);
    const auto count = std::count_if(replay.prompts.begin(), replay.prompts.end(), [&](const PreparedPrompt& p) {
      return replay.trace.requests[p.request].agent == agent;
    });
    text += Format("  %s%10lld%8.1f %%", Fit(agent.empty() ? "default" : agent, 26).c_str(),
                   static_cast<long long>(count), Percent(own.prefix_tokens + own.moved_tokens, own.prompt_tokens));
    text += replay.modes.size() > 1 ? Format("%7.0f -> %.0f\n", first.ttft_ms.mean, own.ttft_ms.mean)
                                    : Format("%11.0f ms\n", own.ttft_ms.mean);
  }
  return text;
}

}  // namespace kvshare::trace

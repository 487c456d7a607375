#include "bench/quality/report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "libkvshare/core/json_text.h"

namespace kvshare::quality {
namespace {

using Json = nlohmann::ordered_json;

// Resampling differs from group to group and is the same in every run.
constexpr std::uint64_t kBootstrapSeed = 20260101;

double Ratio(double a, double b) { return b == 0 ? 0 : a / b; }
double Ratio(std::int64_t a, std::int64_t b) { return Ratio(static_cast<double>(a), static_cast<double>(b)); }

// What became of the chunk that states the answer.
const char* ReuseOf(const JudgedCase& judged, const CaseResult& result, int layers) {
  if (judged.slot < 0) return "unknown";
  const ChunkCost& cost = result.chunks[static_cast<std::size_t>(judged.slot)];
  if (cost.computed_pairs >= cost.cached_tokens * layers) return "computed";
  return cost.computed_pairs == 0 ? "moved" : "repaired";
}

void AddChoices(const Suite& suite, const std::vector<CaseResult>& cases, PolicySummary::Choices* choices) {
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const int other = suite.judged[i].swapped;
    if (other < 0) continue;
    ++choices->n;
    choices->as_exact += cases[i].text == cases[i].exact_text ? 1 : 0;
    if (other < static_cast<int>(i)) continue;  // a pair counts once
    const CaseResult& swapped = cases[static_cast<std::size_t>(other)];
    ++choices->pairs;
    choices->stable += cases[i].text == swapped.text ? 1 : 0;
    choices->exact_stable += cases[i].exact_text == swapped.exact_text ? 1 : 0;
  }
}

PolicySummary SummarisePolicy(const Suite& suite, const PolicyRun& run, const FloorRun& floor, int layers) {
  PolicySummary s{.policy = run.policy};
  std::int64_t cached = 0;
  std::int64_t pairs = 0;
  std::int64_t shared = 0;
  std::int64_t agree = 0;
  std::int64_t same = 0;
  std::vector<double> first;
  std::vector<double> ms;
  std::vector<double> estimates;
  std::vector<double> estimated_kl;
  for (std::size_t i = 0; i < run.cases.size(); ++i) {
    const JudgedCase& judged = suite.judged[i];
    const CaseResult& result = run.cases[i];
    const std::vector<double>& floor_kl = floor.kl[i];
    std::int64_t case_cached = 0;
    std::int64_t case_pairs = 0;
    for (const ChunkCost& cost : result.chunks) {
      case_cached += cost.cached_tokens;
      case_pairs += cost.computed_pairs;
    }
    cached += case_cached;
    pairs += case_pairs;
    shared += result.shared_tokens;
    agree += result.agree;
    same += result.same;
    first.push_back(result.kl.front());
    ms.push_back(result.prefill_ms);
    s.all.Add(judged, result, floor_kl);
    s.tasks[judged.kind].Add(judged, result, floor_kl);
    s.slots[judged.slot < 0 ? "unknown" : std::to_string(judged.slot)].Add(judged, result, floor_kl);
    s.turns[std::to_string(judged.turn)].Add(judged, result, floor_kl);
    s.reuse[ReuseOf(judged, result, layers)].Add(judged, result, floor_kl);
    s.spread[judged.crosses ? "several_chunks" : "one_chunk"].Add(judged, result, floor_kl);
    s.reader[judged.known_reader ? "known" : "unknown"].Add(judged, result, floor_kl);
    const double kl = Mean(result.kl);
    s.guard.escalated_chunks += static_cast<std::int64_t>(result.escalated);
    if (case_pairs < case_cached * layers) {
      ++s.guard.accepted;
      s.guard.above += kl > kGuardKl ? 1 : 0;
      s.guard.session_above[judged.c.session] |= kl > kGuardKl;
    }
    if (result.error_estimate >= 0) {
      estimates.push_back(result.error_estimate);
      estimated_kl.push_back(kl);
    }
  }
  s.charged_budget = Ratio(pairs, cached * layers);
  s.shared_budget = Ratio(pairs + (shared - cached) * layers, shared * layers);
  s.top1 = Ratio(agree, static_cast<std::int64_t>(s.all.kl.size()));
  s.divergence_index = Ratio(same, s.all.n);
  s.kl_first = Mean(first);
  s.prefill_ms = Mean(ms);
  s.guard.estimated = static_cast<std::int64_t>(estimates.size());
  s.guard.rank_correlation = Spearman(estimates, estimated_kl);
  AddChoices(suite, run.cases, &s.choices);
  return s;
}

Json SpreadJson(const std::vector<double>& kl) {
  const Spread spread = SpreadOf(kl);
  return {{"mean", spread.mean}, {"p95", spread.p95}, {"max", spread.max}};
}

// The KL as a multiple of the noise floor of the same cases.
void AddFloors(const Group& group, Json* kl) {
  if (group.floors.empty()) return;
  const Interval ci = IntervalOf(group.floors);
  (*kl)["floors"] = QuotientOfSums(TermsOf(group.floors));
  (*kl)["floors_ci"] = {ci.low, ci.high};
}

Json GroupJson(const Group& group) {
  Json json = {{"n", group.n}};
  if (group.answered > 0) {
    const Interval ci = IntervalOf(group.differences);
    json["accuracy"] = group.Share(group.right);
    json["exact_accuracy"] = group.Share(group.exact_right);
    json["ci"] = {ci.low, ci.high};
    json["lost"] = group.lost;
    json["gained"] = group.gained;
  }
  json["identical"] = Ratio(group.identical, group.n);
  json["kl"] = SpreadJson(group.kl);
  AddFloors(group, &json["kl"]);
  return json;
}

Json GroupsJson(const std::map<std::string, Group>& groups) {
  Json json = Json::object();
  for (const auto& [name, group] : groups) json[name] = GroupJson(group);
  return json;
}

Json PolicyJson(const PolicySummary& s) {
  Json json = {{"charged_budget", s.charged_budget}, {"shared_budget", s.shared_budget}};
  if (s.policy.budget) json["wished_budget"] = *s.policy.budget;
  if (s.policy.mode == ReuseMode::kCacheBlend) json["blend_filter"] = s.policy.gradual ? "gradual" : "once";
  json["kl"] = SpreadJson(s.all.kl);
  json["kl"]["first_token"] = s.kl_first;
  AddFloors(s.all, &json["kl"]);
  json["top1"] = s.top1;
  json["divergence_index"] = s.divergence_index;
  json["identical"] = Ratio(s.all.identical, s.all.n);
  json["prefill_ms"] = s.prefill_ms;
  json["tasks"] = Json::object();
  for (const auto& [kind, group] : s.tasks) {
    if (group.answered > 0) json["tasks"][kind] = GroupJson(group);
  }
  json["by_slot"] = GroupsJson(s.slots);
  json["by_turn"] = GroupsJson(s.turns);
  json["by_reuse"] = GroupsJson(s.reuse);
  json["by_spread"] = GroupsJson(s.spread);
  json["by_reader"] = GroupsJson(s.reader);
  const PolicySummary::Choices& c = s.choices;
  if (c.n > 0) {
    json["judge"] = {{"n", c.n},
                     {"consistency", Ratio(c.as_exact, c.n)},
                     {"pairs", c.pairs},
                     {"swap_consistency", Ratio(c.stable, c.pairs)},
                     {"exact_swap_consistency", Ratio(c.exact_stable, c.pairs)}};
  }
  const auto sessions = static_cast<std::int64_t>(s.guard.session_above.size());
  const std::int64_t sessions_above = std::count_if(s.guard.session_above.begin(), s.guard.session_above.end(),
                                                    [](const auto& of) { return of.second; });
  json["guard"] = {{"accepted", s.guard.accepted},
                   {"kl_above", kGuardKl},
                   {"above", s.guard.above},
                   {"rate", Ratio(s.guard.above, s.guard.accepted)},
                   {"rate_upper", UpperBound(s.guard.above, s.guard.accepted, kConfidence)},
                   {"sessions", sessions},
                   {"sessions_above", sessions_above},
                   {"sessions_rate_upper", UpperBound(sessions_above, sessions, kConfidence)},
                   {"escalated_chunks", s.guard.escalated_chunks},
                   {"estimated", s.guard.estimated},
                   {"rank_correlation", s.guard.rank_correlation}};
  return json;
}

template <typename... Args>
std::string Line(const char* format, Args... args) {
  char line[256];
  std::snprintf(line, sizeof line, format, args...);
  return line;
}

}  // namespace

std::vector<Quotient> TermsOf(const std::map<std::string, Quotient>& by_session) {
  std::vector<Quotient> terms;
  for (const auto& [session, quotient] : by_session) terms.push_back(quotient);
  return terms;
}

Interval IntervalOf(const std::map<std::string, Quotient>& by_session) {
  return BootstrapQuotient(TermsOf(by_session), kConfidence, kBootstrapSeed);
}

std::string FloorsText(const Group& group) {
  if (group.floors.empty()) return "";
  const Interval ci = IntervalOf(group.floors);
  return Line("%.3g [%.3g, %.3g]", QuotientOfSums(TermsOf(group.floors)), ci.low, ci.high);
}

void Group::Add(const JudgedCase& judged, const CaseResult& result, const std::vector<double>& floor_kl) {
  ++n;
  identical += result.identical ? 1 : 0;
  kl.insert(kl.end(), result.kl.begin(), result.kl.end());
  if (!floor_kl.empty()) floors[judged.c.session].Add({Sum(result.kl), Sum(floor_kl)});
  if (!judged.answer) return;
  ++answered;
  right += result.right ? 1 : 0;
  exact_right += result.exact_right ? 1 : 0;
  lost += result.exact_right && !result.right ? 1 : 0;
  gained += result.right && !result.exact_right ? 1 : 0;
  differences[judged.c.session].Add({(result.right ? 1.0 : 0.0) - (result.exact_right ? 1.0 : 0.0), 1});
}

QualityReport Summarise(const Suite& suite, const QualityRun& run, int num_layers) {
  QualityReport report;
  report.samples = suite.samples;
  report.questions = static_cast<std::int64_t>(suite.judged.size());
  report.warm_up = static_cast<std::int64_t>(suite.warm_up.size());
  report.reply_tokens = run.reply_tokens;
  report.layers = num_layers;
  report.exact_prefill_ms = Mean(run.exact_prefill_ms);
  report.floor = run.floor;
  for (const PolicyRun& policy : run.policies)
    report.policies.push_back(SummarisePolicy(suite, policy, run.floor, num_layers));
  return report;
}

std::string ReportJson(const QualityReport& report) {
  const std::vector<double> floor_kl = report.floor.Tokens();
  const Json floor = SpreadJson(floor_kl);
  Json json = {{"model", report.model},
               {"dtype", report.dtype},
               {"source", report.source},
               {"samples", report.samples},
               {"questions", report.questions},
               {"reply_tokens", report.reply_tokens},
               {"warm_up", report.warm_up},
               {"noise_floor",
                {{"kl_mean", floor["mean"]},
                 {"kl_p95", floor["p95"]},
                 {"kl_max", floor["max"]},
                 {"top1", Ratio(report.floor.agree, static_cast<std::int64_t>(floor_kl.size()))},
                 {"against", report.floor.against},
                 {"cases", report.floor.Cases()},
                 {"other_pieces_kl_max", report.floor.other_pieces_kl_max}}},
               {"exact_prefill_ms", report.exact_prefill_ms},
               {"seconds", report.seconds},
               {"policies", Json::object()}};
  for (const PolicySummary& policy : report.policies) {
    json["policies"][std::string(ReuseModeName(policy.policy.mode))] = PolicyJson(policy);
  }
  return JsonText(json);
}

std::string ReportText(const QualityReport& report) {
  std::string out = report.model + " (" + report.dtype + "), " + report.source + ": " + std::to_string(report.samples) +
                    " samples, " + std::to_string(report.questions) + " questions, " +
                    std::to_string(report.reply_tokens) + " tokens compared\n";
  if (report.floor.Cases() > 0) {
    const Spread floor = SpreadOf(report.floor.Tokens());
    out += Line("noise floor (exact against itself in %s): KL mean %.2e, p95 %.2e, max %.2e\n\n",
                report.floor.against.c_str(), floor.mean, floor.p95, floor.max);
  }
  out += Line("%-12s %8s %10s %10s %10s %8s %8s %11s\n", "policy", "budget", "KL mean", "p95", "max", "top-1",
              "same at", "prefill ms");
  for (const PolicySummary& p : report.policies) {
    const Spread kl = SpreadOf(p.all.kl);
    out +=
        Line("%-12s %8.3f %10.2e %10.2e %10.2e %8.4f %8.2f %11.1f\n", std::string(ReuseModeName(p.policy.mode)).c_str(),
             p.charged_budget, kl.mean, kl.p95, kl.max, p.top1, p.divergence_index, p.prefill_ms);
  }
  out += Line("\n%-12s %-10s %5s %9s %9s   %-18s %10s   %s\n", "policy", "kind", "n", "accuracy", "exact",
              "difference, 95 %", "KL mean", "noise floors of the same cases, 95 %");
  for (const PolicySummary& p : report.policies) {
    for (const auto& [kind, group] : p.tasks) {
      if (group.answered == 0) continue;
      const Interval ci = IntervalOf(group.differences);
      out += Line("%-12s %-10s %5lld %9.3f %9.3f   [%+.3f, %+.3f]   %10.2e   %s\n",
                  std::string(ReuseModeName(p.policy.mode)).c_str(), kind.substr(0, 40).c_str(),
                  static_cast<long long>(group.answered), group.Share(group.right), group.Share(group.exact_right),
                  ci.low, ci.high, Mean(group.kl), FloorsText(group).c_str());
    }
  }
  return out;
}

}  // namespace kvshare::quality

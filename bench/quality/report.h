// What a quality run says: sums over its cases, as JSON, as a table, as one HTML page.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "bench/quality/quality_run.h"
#include "bench/quality/statistics.h"
#include "bench/quality/suite.h"

namespace kvshare::quality {

// Cases that have something in common.
struct Group {
  std::int64_t n = 0;
  std::int64_t answered = 0;  // those that have an answer
  std::int64_t right = 0;
  std::int64_t exact_right = 0;
  std::int64_t lost = 0;    // exact right, policy wrong
  std::int64_t gained = 0;  // the other way round
  std::int64_t identical = 0;
  std::vector<double> kl;  // per token

  // By session, as its cases share their chunks and may go wrong together.
  std::map<std::string, Quotient> differences;  // of answered cases: sum of policy right - exact right, and how many
  std::map<std::string, Quotient>
      floors;  // of cases with a noise floor: sums over tokens of the KL, and of the floor's

  // `floor_kl`: the noise floor's at the same tokens, empty where it was not measured.
  void Add(const JudgedCase& judged, const CaseResult& result, const std::vector<double>& floor_kl);
  double Share(std::int64_t of) const { return answered == 0 ? 0 : static_cast<double>(of) / double(answered); }
};

std::vector<Quotient> TermsOf(const std::map<std::string, Quotient>& by_session);
// The 95 % interval of the quotient of their sums, a bootstrap that draws sessions whole.
Interval IntervalOf(const std::map<std::string, Quotient>& by_session);

// "2.9 [1.8, 4.4]": the KL in noise floors of the same cases, with its interval; empty where none was measured.
std::string FloorsText(const Group& group);

struct PolicySummary {
  Policy policy;
  double charged_budget = 0;  // computed pairs / (layers * cached tokens)
  double shared_budget = 0;   // the same over all tokens of chunks, those without stored KV counted as computed
  double top1 = 0;
  double divergence_index = 0;
  Group all;
  double kl_first = 0;  // mean at the first token of the reply
  double prefill_ms = 0;
  std::map<std::string, Group> tasks;
  std::map<std::string, Group> slots;   // "0", "1", ...: the chunk that states the answer
  std::map<std::string, Group> turns;   // "1", "2", ...
  std::map<std::string, Group> reuse;   // that chunk was computed | repaired | moved
  std::map<std::string, Group> spread;  // the answer needs one_chunk | several_chunks
  std::map<std::string, Group> reader;  // known | unknown

  // Candidates in two orders ("judge" cases): the same choice as exact's, and the same choice in both orders.
  struct Choices {
    std::int64_t n = 0;
    std::int64_t as_exact = 0;
    std::int64_t pairs = 0;
    std::int64_t stable = 0;
    std::int64_t exact_stable = 0;
  } choices;

  // The policy's own guard: cases it let through with something reused, and how many of those went wrong anyway.
  struct Guard {
    std::int64_t accepted = 0;
    std::int64_t above = 0;                     // mean KL of the case over kGuardKl
    std::map<std::string, bool> session_above;  // sessions with an accepted case: whether one of them is above
    std::int64_t escalated_chunks = 0;
    std::int64_t estimated = 0;   // cases with an error estimate
    double rank_correlation = 0;  // of estimate and KL over those (Spearman)
  } guard;
};

inline constexpr double kGuardKl = 0.05;
inline constexpr double kConfidence = 0.95;

struct QualityReport {
  std::string model;
  std::string dtype;
  std::string source;  // "world 7" or the file
  std::int64_t samples = 0;
  std::int64_t questions = 0;
  std::int64_t warm_up = 0;
  std::int64_t reply_tokens = 0;
  int layers = 0;
  double exact_prefill_ms = 0;
  double seconds = 0;
  FloorRun floor;
  std::vector<PolicySummary> policies;
};

QualityReport Summarise(const Suite& suite, const QualityRun& run, int num_layers);

// The contract's object, with what docs/reference/kvctl.md adds; one line.
std::string ReportJson(const QualityReport& report);
std::string ReportText(const QualityReport& report);
// One self-contained page: table, quality against budget, accuracy by kind, KL by slot and turn.
std::string ReportHtml(const QualityReport& report);  // html_report.cc

}  // namespace kvshare::quality

// A daemon's statistics as JSON: the fields of `kvctl stat --format json` and of each section of `kvctl info`.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>

#include "kvshare/types.h"

namespace kvshare::kvctl {

nlohmann::ordered_json TotalsJson(const ReuseTotals& totals);
nlohmann::ordered_json PoolJson(const Stats& stats);
nlohmann::ordered_json ColdJson(const ColdStats& cold);
nlohmann::ordered_json AgentsJson(const Stats& stats);
nlohmann::ordered_json MissJson(const Stats& stats);
// Mean, and quantiles as fine as the histogram's bounds: {"count","mean","p50","p95","p99"} in milliseconds.
nlohmann::ordered_json LatencyJson(const Histogram& histogram);
nlohmann::ordered_json StatJson(const Stats& stats);
nlohmann::ordered_json ServerJson(const ServerInfo& info);

// Of the observations, the value below which `share` (0..1) lie, linearly within a bucket; 0 when there are none, the
// last bound when it lies beyond.
double Quantile(const Histogram& histogram, double share);
std::int64_t CountOf(const Histogram& histogram);

double Percent(std::int64_t part, std::int64_t whole);

// One line on stdout; text that is not UTF-8 is replaced.
void PrintJson(const nlohmann::ordered_json& json);

}  // namespace kvshare::kvctl

#include "bench/quality/statistics.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "bench/quality/random.h"
#include "libkvshare/core/check.h"

namespace kvshare::quality {
namespace {

// log(sum_i exp(x_i)), shifted by the largest so that nothing overflows.
double LogSumExp(std::span<const float> x) {
  double highest = -INFINITY;
  for (float v : x) highest = std::max(highest, static_cast<double>(v));
  double sum = 0;
  for (float v : x) sum += std::exp(static_cast<double>(v) - highest);
  return highest + std::log(sum);
}

// P(X <= k) for X ~ Binomial(n, p).
double BinomialCdf(std::int64_t k, std::int64_t n, double p) {
  if (p <= 0) return 1;
  if (p >= 1) return k >= n ? 1 : 0;
  double sum = 0;
  const double count = static_cast<double>(n);
  for (std::int64_t i = 0; i <= k; ++i) {
    const double x = static_cast<double>(i);
    sum += std::exp(std::lgamma(count + 1) - std::lgamma(x + 1) - std::lgamma(count - x + 1) + x * std::log(p) +
                    (count - x) * std::log1p(-p));
  }
  return std::min(1.0, sum);
}

// Ranks from 1; equal values share their mean rank.
std::vector<double> Ranks(std::span<const double> values) {
  std::vector<std::size_t> order(values.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return values[a] < values[b]; });
  std::vector<double> ranks(values.size());
  for (std::size_t begin = 0; begin < order.size();) {
    std::size_t end = begin;
    while (end < order.size() && values[order[end]] == values[order[begin]]) ++end;
    for (std::size_t i = begin; i < end; ++i) ranks[order[i]] = static_cast<double>(begin + end + 1) / 2;
    begin = end;
  }
  return ranks;
}

}  // namespace

double KlDivergence(std::span<const float> exact, std::span<const float> other) {
  KVS_CHECK(exact.size() == other.size() && !exact.empty());
  const double exact_norm = LogSumExp(exact);
  const double other_norm = LogSumExp(other);
  double kl = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const double log_p = static_cast<double>(exact[i]) - exact_norm;
    if (log_p == -INFINITY) continue;  // 0 log 0 = 0
    kl += std::exp(log_p) * (log_p - (static_cast<double>(other[i]) - other_norm));
  }
  return kl < 0 ? 0 : kl;
}

std::int64_t Argmax(std::span<const float> logits) {
  return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

double Sum(std::span<const double> values) { return std::accumulate(values.begin(), values.end(), 0.0); }

double Mean(std::span<const double> values) {
  return values.empty() ? 0 : Sum(values) / static_cast<double>(values.size());
}

double Percentile(std::vector<double> values, double p) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const double rank = p / 100 * static_cast<double>(values.size() - 1);
  const auto below = static_cast<std::size_t>(rank);
  if (below + 1 >= values.size()) return values.back();
  const double share = rank - static_cast<double>(below);
  return values[below] + share * (values[below + 1] - values[below]);
}

Spread SpreadOf(const std::vector<double>& values) {
  return {.mean = Mean(values), .p95 = Percentile(values, 95), .max = Percentile(values, 100)};
}

double Quotient::Value() const {
  if (below != 0) return above / below;
  return above == 0 ? 0 : INFINITY;
}

double QuotientOfSums(std::span<const Quotient> items) {
  Quotient sum;
  for (const Quotient& item : items) sum.Add(item);
  return sum.Value();
}

Interval BootstrapQuotient(std::span<const Quotient> items, double confidence, std::uint64_t seed) {
  if (items.empty()) return {};
  Random random(seed);
  std::vector<double> values(kBootstrapRounds);
  for (double& value : values) {
    Quotient sum;
    for (std::size_t i = 0; i < items.size(); ++i) sum.Add(items[random.Below(items.size())]);
    value = sum.Value();
  }
  const double tail = 100 * (1 - confidence) / 2;
  return {.low = Percentile(values, tail), .high = Percentile(values, 100 - tail)};
}

double UpperBound(std::int64_t hits, std::int64_t n, double confidence) {
  if (n == 0 || hits >= n) return 1;
  double low = 0;
  double high = 1;
  for (int i = 0; i < 100; ++i) {  // the CDF falls as p grows
    const double mid = (low + high) / 2;
    (BinomialCdf(hits, n, mid) > 1 - confidence ? low : high) = mid;
  }
  return high;
}

double Spearman(std::span<const double> x, std::span<const double> y) {
  KVS_CHECK(x.size() == y.size());
  if (x.size() < 3) return 0;
  const std::vector<double> a = Ranks(x);
  const std::vector<double> b = Ranks(y);
  const double mean = static_cast<double>(x.size() + 1) / 2;
  double ab = 0;
  double aa = 0;
  double bb = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    ab += (a[i] - mean) * (b[i] - mean);
    aa += (a[i] - mean) * (a[i] - mean);
    bb += (b[i] - mean) * (b[i] - mean);
  }
  return aa == 0 || bb == 0 ? 0 : ab / std::sqrt(aa * bb);
}

}  // namespace kvshare::quality

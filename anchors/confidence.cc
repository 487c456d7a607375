#include "anchors/confidence.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

#include "libkvshare/core/check.h"

namespace kvshare::anchors {
namespace {

double LogSumExp(std::span<const float> logits, double max) {
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - max);
  return max + std::log(sum);
}

// P(X <= failures) for X ~ Binomial(trials, p), 0 < p < 1.
double BinomialCdf(std::int64_t failures, std::int64_t trials, double p) {
  if (failures >= trials) return 1;
  const auto n = static_cast<double>(trials), x = static_cast<double>(failures);
  // The tail that lies away from the mode, from its greatest term on, each by the ratio to the one before.
  const bool below = x < n * p;
  double k = below ? x : x + 1;
  double term = std::exp(std::lgamma(n + 1) - std::lgamma(k + 1) - std::lgamma(n - k + 1) + k * std::log(p) +
                         (n - k) * std::log1p(-p));
  double sum = 0;
  while (term > sum * std::numeric_limits<double>::epsilon()) {
    sum += term;
    term *= below ? k * (1 - p) / ((n - k + 1) * p) : (n - k) * p / ((k + 1) * (1 - p));
    k += below ? -1 : 1;
  }
  return below ? std::min(sum, 1.0) : std::max(1 - sum, 0.0);
}

}  // namespace

double Margin(std::span<const float> logits) {
  KVS_CHECK(logits.size() >= 2);
  constexpr float kImpossible = -std::numeric_limits<float>::infinity();
  float first = kImpossible, second = kImpossible;
  for (const float logit : logits) {  // in this order of arguments a NaN is never taken
    second = std::max(second, std::min(logit, first));
    first = std::max(first, logit);
  }
  return first == second ? 0 : static_cast<double>(first) - second;
}

double KlDivergence(std::span<const float> exact, std::span<const float> other) {
  KVS_CHECK(!exact.empty() && exact.size() == other.size());
  const double log_exact = LogSumExp(exact, *std::max_element(exact.begin(), exact.end()));
  const double log_other = LogSumExp(other, *std::max_element(other.begin(), other.end()));
  double kl = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const double log_p = exact[i] - log_exact;
    kl += std::exp(log_p) * (log_p - (other[i] - log_other));
  }
  return std::max(kl, 0.0);  // rounding can take it below
}

double ClopperPearsonUpper(std::int64_t failures, std::int64_t trials, double confidence) {
  KVS_CHECK(0 <= failures && failures <= trials && confidence > 0 && confidence < 1);
  if (failures == trials) return 1.0;
  double low = 0;
  double high = 1;
  for (int step = 0; step < 60; ++step) {  // halving: far below the precision of a double in the end
    const double p = (low + high) / 2;
    (BinomialCdf(failures, trials, p) > 1 - confidence ? low : high) = p;
  }
  return high;
}

void AuditBook::Record(double margin, double kl) {
  const Audit audit{margin, !(kl <= limits_.kl)};
  ++recorded_;
  failures_ += audit.failed;
  Remember(audit);
}

void AuditBook::Remember(const Audit& audit) {
  if (recent_.size() < limits_.window) {
    recent_.push_back(audit);
    return;
  }
  recent_[next_] = audit;
  next_ = (next_ + 1) % recent_.size();
}

std::vector<AuditBook::Audit> AuditBook::Recent() const {
  std::vector<Audit> recent = recent_;
  std::rotate(recent.begin(), recent.begin() + static_cast<std::ptrdiff_t>(next_), recent.end());
  return recent;
}

void AuditBook::Restore(std::span<const Audit> recent) {
  recent_.clear();
  next_ = 0;
  for (const Audit& audit : recent) Remember(audit);
}

double AuditBook::Threshold(double floor, double prior) const {
  std::vector<Audit> sorted;
  std::copy_if(recent_.begin(), recent_.end(), std::back_inserter(sorted),
               [floor](const Audit& audit) { return audit.margin >= floor; });
  std::sort(sorted.begin(), sorted.end(), [](const Audit& a, const Audit& b) {
    return a.margin != b.margin ? a.margin > b.margin : a.failed > b.failed;
  });
  const auto audits = static_cast<std::int64_t>(sorted.size());
  const bool enough = ClopperPearsonUpper(0, audits, limits_.confidence) <= limits_.failure_rate;
  const double sure = LeastWith(enough ? limits_.failure_rate : limits_.early_failure_rate, sorted);
  if (enough && !std::isinf(sure)) return sure;
  const double unsure = enough ? std::max(prior, LeastBound(sorted)) : std::isinf(sure) ? prior : sure;
  return std::max(unsure, LeastUnrefuted(limits_.failure_rate, sorted));
}

double AuditBook::LeastWith(double failure_rate, std::span<const Audit> sorted) const {
  double threshold = std::numeric_limits<double>::infinity();
  std::int64_t failed = 0;
  for (std::size_t i = 0; i < sorted.size(); ++i) {
    failed += sorted[i].failed;
    // A threshold takes in all audits of the same margin.
    if (i + 1 < sorted.size() && sorted[i + 1].margin == sorted[i].margin) continue;
    const auto accepted = static_cast<std::int64_t>(i) + 1;
    if (static_cast<double>(failed) > failure_rate * static_cast<double>(accepted)) continue;  // the bound is above
    // The same as ClopperPearsonUpper(failed, accepted) <= failure_rate, without solving for the bound.
    if (BinomialCdf(failed, accepted, failure_rate) <= 1 - limits_.confidence) threshold = sorted[i].margin;
  }
  return threshold;
}

double AuditBook::LeastUnrefuted(double failure_rate, std::span<const Audit> sorted) const {
  double threshold =
      sorted.empty() ? 0 : std::nextafter(sorted.front().margin, std::numeric_limits<double>::infinity());
  std::int64_t failed = 0;
  bool refuted = false;
  for (std::size_t i = 0; i < sorted.size(); ++i) {
    failed += sorted[i].failed;
    if (i + 1 < sorted.size() && sorted[i + 1].margin == sorted[i].margin) continue;
    const auto accepted = static_cast<std::int64_t>(i) + 1;
    // P(X >= failed) is what is left of P(X <= failed - 1).
    refuted = failed > 0 && 1 - BinomialCdf(failed - 1, accepted, failure_rate) <= 1 - limits_.confidence;
    if (!refuted) threshold = sorted[i].margin;
  }
  return refuted ? threshold : 0;
}

double AuditBook::LeastBound(std::span<const Audit> sorted) const {
  double threshold = std::numeric_limits<double>::infinity(), least = 1;
  std::int64_t failed = 0;
  for (std::size_t i = 0; i < sorted.size(); ++i) {
    failed += sorted[i].failed;
    // Before the next failure each audit more lowers the bound.
    if (i + 1 < sorted.size() && (!sorted[i + 1].failed || sorted[i + 1].margin == sorted[i].margin)) continue;
    const auto accepted = static_cast<std::int64_t>(i) + 1;
    // As in LeastWith: the bound is solved for only where it is less.
    if (static_cast<double>(failed) > least * static_cast<double>(accepted)) continue;
    if (least < 1 && BinomialCdf(failed, accepted, least) > 1 - limits_.confidence) continue;
    least = ClopperPearsonUpper(failed, accepted, limits_.confidence);
    threshold = sorted[i].margin;
  }
  return threshold;
}

double Guard::DoubtRate() const {
  const double asked = margin();
  if (asked == kNever) return 1;
  const auto missed = std::count_if(least_.begin(), least_.end(), [asked](double least) { return least < asked; });
  return (kPriorWeight * prior_.doubts + static_cast<double>(missed)) /
         (kPriorWeight + static_cast<double>(least_.size()));
}

Guard::State Guard::Snapshot() const {
  State state{.quantile = quantile_.value(), .least = least_, .audits = book_.Recent()};
  std::rotate(state.least.begin(), state.least.begin() + static_cast<std::ptrdiff_t>(next_), state.least.end());
  return state;
}

void Guard::Restore(const State& state) {
  quantile_.Restore(state.quantile, !state.least.empty());
  least_.clear();
  next_ = 0;
  for (const double least : state.least) Remember(least);
  book_.Restore(state.audits);
  Learn();
}

void Guard::Answered(double least_margin) {
  quantile_.Answered(least_margin < quantile_.value());
  Remember(least_margin);
  Learn();
}

void Guard::Remember(double least_margin) {
  if (least_.size() < kRemembered) {
    least_.push_back(least_margin);
  } else {
    least_[next_] = least_margin;
    next_ = (next_ + 1) % least_.size();
  }
}

void Guard::Audited(double margin, double kl) {
  book_.Record(margin, kl);
  Learn();
}

// Audits of what the quantile sends back anyway say nothing of what is trusted.
void Guard::Learn() {
  const double asked = book_.Threshold(quantile_.value(), prior_.margin);
  audited_ = std::min(asked, kNever);
}

}  // namespace kvshare::anchors

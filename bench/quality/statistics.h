// The judge's statistics, in double precision throughout.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace kvshare::quality {

// KL(p || q) in nats of the two distributions whose logits these are:
//   sum_i p_i (log p_i - log q_i),  p = softmax(exact), q = softmax(other)
// Shapes: two rows of the same length. Returns exactly 0 for equal rows and never less than 0 (rounding is clamped);
// infinity where q gives no mass to what p can say. Rows that hold NaN give NaN.
double KlDivergence(std::span<const float> exact, std::span<const float> other);

// Index of the largest logit; of equal ones the first.
std::int64_t Argmax(std::span<const float> logits);

double Sum(std::span<const double> values);
double Mean(std::span<const double> values);  // 0 for none
// Linear interpolation between closest ranks, as numpy's percentile does; p in [0, 100]; 0 for no values.
double Percentile(std::vector<double> values, double p);

struct Spread {
  double mean = 0;
  double p95 = 0;
  double max = 0;
};
Spread SpreadOf(const std::vector<double>& values);

struct Interval {
  double low = 0;
  double high = 0;
};
inline constexpr int kBootstrapRounds = 10000;

// The terms of one item of a quotient of sums.
struct Quotient {
  double above = 0;
  double below = 0;

  void Add(const Quotient& other) { *this = {above + other.above, below + other.below}; }
  double Value() const;  // infinite for something over nothing, 0 for nothing over nothing
};
double QuotientOfSums(std::span<const Quotient> items);

// Percentile bootstrap of the quotient of sums: 10,000 resamples with replacement, seeded by `seed` alone. {0, 0} for
// no items. These are drawn whole, so that both sums are of the same ones. With 1 below, of their mean.
Interval BootstrapQuotient(std::span<const Quotient> items, double confidence, std::uint64_t seed);

// Clopper and Pearson's one-sided upper bound of a proportion of which `hits` of `n` were seen: the p at which as few
// hits have probability 1 - confidence. 1 for n == 0.
double UpperBound(std::int64_t hits, std::int64_t n, double confidence);

// Spearman's rank correlation, ties by mean rank; 0 when either side is constant or there are fewer than 3 pairs.
double Spearman(std::span<const double> x, std::span<const double> y);

}  // namespace kvshare::quality

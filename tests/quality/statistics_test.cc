// The judge's statistics against values worked out by hand (the formula stands beside each).
#include "bench/quality/statistics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace kvshare::quality {
namespace {

TEST(StatisticsTest, KlOfTwoCoinsIsTheFormula) {
  // p = (3/4, 1/4), q = (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2)
  const std::vector<float> p = {std::log(3.0f), 0};
  const std::vector<float> q = {5, 5};
  EXPECT_NEAR(KlDivergence(p, q), 0.75 * std::log(1.5) + 0.25 * std::log(0.5), 1e-7);
  // The other way round: 1/2 log(2/3) + 1/2 log 2
  EXPECT_NEAR(KlDivergence(q, p), 0.5 * std::log(2.0 / 3) + 0.5 * std::log(2.0), 1e-7);
}

TEST(StatisticsTest, KlOfEqualRowsIsZeroToTheBit) {
  const std::vector<float> row = {1.25f, -3, 100, 0.1f, -700};
  EXPECT_EQ(KlDivergence(row, row), 0);
}

TEST(StatisticsTest, KlDoesNotSeeAConstant) {
  const std::vector<float> p = {1, 2, 3};
  const std::vector<float> q = {1001, 1002, 1003};
  EXPECT_NEAR(KlDivergence(p, q), 0, 1e-12);
}

TEST(StatisticsTest, KlIsInfiniteWhereMassIsMissingAndNanStaysNan) {
  const float none = -std::numeric_limits<float>::infinity();
  EXPECT_EQ(KlDivergence(std::vector<float>{0, 0}, std::vector<float>{0, none}), INFINITY);
  EXPECT_NEAR(KlDivergence(std::vector<float>{0, none}, std::vector<float>{0, 0}), std::log(2.0), 1e-12);
  EXPECT_TRUE(std::isnan(KlDivergence(std::vector<float>{0, 0}, std::vector<float>{0, NAN})));
}

TEST(StatisticsTest, ArgmaxTakesTheFirstOfEquals) {
  EXPECT_EQ(Argmax(std::vector<float>{1, 7, 7, 2}), 1);
  EXPECT_EQ(Argmax(std::vector<float>{-1}), 0);
}

TEST(StatisticsTest, PercentilesInterpolate) {
  const std::vector<double> values = {4, 1, 3, 2};
  EXPECT_DOUBLE_EQ(Percentile(values, 0), 1);
  EXPECT_DOUBLE_EQ(Percentile(values, 50), 2.5);
  EXPECT_DOUBLE_EQ(Percentile(values, 95), 3.85);  // rank 2.85 of 0..3
  EXPECT_DOUBLE_EQ(Percentile(values, 100), 4);
  EXPECT_DOUBLE_EQ(Percentile({}, 50), 0);
  EXPECT_DOUBLE_EQ(Mean(values), 2.5);
  const Spread spread = SpreadOf(values);
  EXPECT_DOUBLE_EQ(spread.p95, 3.85);
  EXPECT_DOUBLE_EQ(spread.max, 4);
}

TEST(StatisticsTest, BootstrapOfAConstantIsThatConstant) {
  const std::vector<Quotient> values(12, {.above = -0.5, .below = 1});
  const Interval ci = BootstrapQuotient(values, 0.95, 1);
  EXPECT_DOUBLE_EQ(ci.low, -0.5);
  EXPECT_DOUBLE_EQ(ci.high, -0.5);
}

TEST(StatisticsTest, BootstrapOfTwoValuesHasTheirResamples) {
  // Means of two draws from {0, 1}: 0, 1/2, 1 with probability 1/4, 1/2, 1/4. At 40 % the tails of 30 % end within the
  // middle mass; at 90 % those of 5 % end in the outer ones.
  const std::vector<Quotient> values = {{.above = 0, .below = 1}, {.above = 1, .below = 1}};
  const Interval narrow = BootstrapQuotient(values, 0.4, 7);
  EXPECT_DOUBLE_EQ(narrow.low, 0.5);
  EXPECT_DOUBLE_EQ(narrow.high, 0.5);
  const Interval wide = BootstrapQuotient(values, 0.9, 7);
  EXPECT_DOUBLE_EQ(wide.low, 0);
  EXPECT_DOUBLE_EQ(wide.high, 1);
}

TEST(StatisticsTest, BootstrapIsCloseToTheNormalIntervalAndRepeats) {
  std::vector<Quotient> values;
  for (int i = 0; i < 400; ++i) values.push_back({i % 4 == 0 ? 1.0 : 0.0, 1});  // mean 1/4
  const double half = 1.959964 * std::sqrt(0.25 * 0.75 / 400);
  const Interval ci = BootstrapQuotient(values, 0.95, 3);
  EXPECT_NEAR(ci.low, 0.25 - half, 0.006);
  EXPECT_NEAR(ci.high, 0.25 + half, 0.006);
  const Interval again = BootstrapQuotient(values, 0.95, 3);
  EXPECT_EQ(ci.low, again.low);
  EXPECT_EQ(ci.high, again.high);
}

TEST(StatisticsTest, QuotientOfSumsIsNotTheMeanOfQuotients) {
  const std::vector<Quotient> items = {{.above = 1, .below = 1}, {.above = 5, .below = 3}};
  EXPECT_DOUBLE_EQ(QuotientOfSums(items), 1.5);
  EXPECT_EQ(QuotientOfSums({}), 0);
  EXPECT_EQ(QuotientOfSums(std::vector<Quotient>{{.above = 2, .below = 0}}), INFINITY);
  // Two draws: both terms are the same item's, so quotients are 1, 6/4 and 5/3, never 1/3 or 5.
  const Interval wide = BootstrapQuotient(items, 0.9, 7);
  EXPECT_DOUBLE_EQ(wide.low, 1);
  EXPECT_DOUBLE_EQ(wide.high, 5.0 / 3);
  const Interval narrow = BootstrapQuotient(items, 0.4, 7);
  EXPECT_DOUBLE_EQ(narrow.low, 1.5);
  EXPECT_DOUBLE_EQ(narrow.high, 1.5);
  EXPECT_EQ(BootstrapQuotient({}, 0.95, 3).high, 0);
}

TEST(StatisticsTest, UpperBoundIsClopperPearsons) {
  // No hits: (1 - p)^n = 0.05. 149 audits without a failure hold 2 % at 95 %; 148 do not.
  EXPECT_NEAR(UpperBound(0, 149, 0.95), 1 - std::pow(0.05, 1.0 / 149), 1e-9);
  EXPECT_LE(UpperBound(0, 149, 0.95), 0.02);
  EXPECT_GT(UpperBound(0, 148, 0.95), 0.02);
  // One hit of two: P(X <= 1) = 1 - p^2 = 0.05.
  EXPECT_NEAR(UpperBound(1, 2, 0.95), std::sqrt(0.95), 1e-9);
  EXPECT_EQ(UpperBound(0, 0, 0.95), 1);
  EXPECT_EQ(UpperBound(5, 5, 0.95), 1);
}

TEST(StatisticsTest, SpearmanSeesOrderAlone) {
  const std::vector<double> x = {1, 2, 3, 4};
  EXPECT_DOUBLE_EQ(Spearman(x, std::vector<double>{1, 10, 100, 1000}), 1);
  EXPECT_DOUBLE_EQ(Spearman(x, std::vector<double>{4, 3, 2, 1}), -1);
  // Ranks 1, 2.5, 2.5, 4 about 2.5: products 2.25 + 0 + 0 + 2.25, squares 2 (2.25 + 0.25) and 2 * 2.25.
  EXPECT_NEAR(Spearman(x, std::vector<double>{1, 2, 2, 3}), 4.5 / std::sqrt(5 * 4.5), 1e-12);
  EXPECT_EQ(Spearman(x, std::vector<double>{2, 2, 2, 2}), 0);
  EXPECT_EQ(Spearman(std::vector<double>{1, 2}, std::vector<double>{1, 2}), 0);
}

}  // namespace
}  // namespace kvshare::quality

#include "anchors/confidence.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <optional>
#include <random>

namespace kvshare::anchors {
namespace {

TEST(ConfidenceTest, ProbabilityAndDivergenceOfKnownDistributions) {
  const std::vector<float> even = {3, 3, 3, 3};
  EXPECT_EQ(Margin(even), 0);
  const std::vector<float> odds = {std::log(8.0f), 0, 0};  // 0.8, 0.1, 0.1
  EXPECT_NEAR(Margin(odds), std::log(8.0), 1e-6);
  EXPECT_EQ(KlDivergence(odds, odds), 0.0);
  const std::vector<float> flat = {0, 0, 0};
  EXPECT_NEAR(KlDivergence(odds, flat), 0.8 * std::log(2.4) + 0.2 * std::log(0.3), 1e-7);
  const std::vector<float> huge = {1e4f, -1e4f};  // no overflow
  EXPECT_EQ(Margin(huge), 2e4);
  EXPECT_EQ(Margin(std::vector<float>{-2, 5, 1, 4.5f, 5}), 0);  // the same twice
  EXPECT_EQ(Margin(std::vector<float>{1, -3, 4}), 3);
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(Margin(std::vector<float>{kNan, 1, kNan, -3, 4, kNan}), 3);
  EXPECT_EQ(Margin(std::vector<float>{kNan, kNan, -kInf}), 0);
  EXPECT_EQ(Margin(std::vector<float>{kInf, 2, kInf}), 0);
}

TEST(ConfidenceTest, ClopperPearsonAgreesWithItsClosedFormAndItsDefinition) {
  // With no failure the bound solves (1 - p)^n = 1 - confidence.
  for (const std::int64_t n : {1, 10, 149, 1000}) {
    EXPECT_NEAR(ClopperPearsonUpper(0, n, 0.95), 1 - std::pow(0.05, 1.0 / static_cast<double>(n)), 1e-9);
  }
  EXPECT_LE(ClopperPearsonUpper(0, 149, 0.95), 0.02);  // the counts that reading/algorithms.md gives
  EXPECT_GT(ClopperPearsonUpper(0, 148, 0.95), 0.02);
  EXPECT_LE(ClopperPearsonUpper(1, 236, 0.95), 0.02);
  EXPECT_GT(ClopperPearsonUpper(1, 230, 0.95), 0.02);
  EXPECT_EQ(ClopperPearsonUpper(5, 5, 0.95), 1.0);
  EXPECT_EQ(ClopperPearsonUpper(0, 0, 0.95), 1.0);
}

TEST(AuditBookTest, SaysNothingBeforeItKnowsEnough) {
  AuditBook book;
  for (int i = 0; i < 28; ++i) book.Record(0.99, 0.0);
  EXPECT_EQ(book.Threshold(0, 3), 3);
  book.Record(0.99, 0.0);  // 29 without a failure: at most 10 %
  EXPECT_EQ(book.Threshold(0, 3), 0.99);
  book.Record(0.5, 1.0);
  for (int i = 0; i < 16; ++i) book.Record(0.4, 0.0);
  EXPECT_EQ(book.Threshold(0, 3), 0.4);  // 46 with one failure: at most 10 % too
  EXPECT_EQ(book.Threshold(0.45, 3), 0.99);
  EXPECT_EQ(book.Threshold(1.0, 3), 3);
}

TEST(AuditBookTest, WhatIsSaidEarlyIsHeldToMoreWithTime) {
  AuditBook book;
  for (int i = 0; i < 148; ++i) book.Record(0.5, i % 30 == 0 ? 1.0 : 0.0);
  EXPECT_EQ(book.Threshold(0, 3), 0.5);  // 5 of 148: at most 10 %, and perhaps 2 %
  book.Record(0.5, 0.0);
  EXPECT_EQ(book.Threshold(0, 3), 3);  // but not surely
}

// What was trusted is not given up when a failure keeps the bound from 2 % for a while: above it is asked, as far as
// that is better.
TEST(AuditBookTest, OneFailureAmongManyCostsTheLessSureOnly) {
  AuditBook book;
  for (int i = 0; i < 120; ++i) book.Record(1.0, 0.0);
  book.Record(0.3, 1.0);
  for (int i = 0; i < 40; ++i) book.Record(0.3, 0.0);
  EXPECT_EQ(book.Threshold(0, 0), 1.0);  // 0 of 120: 2.5 %; 1 of 161: 2.9 %
  EXPECT_EQ(book.Threshold(0, Guard::kNever), Guard::kNever);
  for (int i = 0; i < 34; ++i) book.Record(0.3, 0.0);
  EXPECT_EQ(book.Threshold(0, 0), 0.3);  // 1 of 195: 2.4 %
  for (int i = 0; i < 45; ++i) book.Record(0.2, 0.0);
  EXPECT_EQ(book.Threshold(0, Guard::kNever), 0.2);  // 1 of 240: surely 2 %
}

// What was trusted before anything was known of it is trusted no longer than audits bear it out.
TEST(AuditBookTest, FewFailuresAmongFewRefute) {
  AuditBook book;
  for (int i = 1; i <= 19; ++i) book.Record(i, 0.0);
  book.Record(0.3, 1.0);
  EXPECT_EQ(book.Threshold(0, 0), 0);  // 1 of 20: 33 % likely at 2 %
  book.Record(2.5, 1.0);
  EXPECT_EQ(book.Threshold(0, 0), 0);  // 2 of 21: 7 %
  book.Record(0.5, 1.0);
  EXPECT_EQ(book.Threshold(0, 0), 0.5);  // 3 of 22: 1 %; without the least sure, 7 %
  EXPECT_EQ(book.Threshold(0, 1.5), 1.5);
  AuditBook bad;
  bad.Record(2.0, 1.0);
  EXPECT_GT(bad.Threshold(0, 0), 2.0);
}

TEST(AuditBookTest, TheThresholdStandsAboveWhereFailuresAre) {
  AuditBook book({.window = 4096});
  std::mt19937 rng(7);
  for (int i = 0; i < 3000; ++i) {
    const double p = std::uniform_real_distribution<>(0.3, 1.0)(rng);
    book.Record(p, p < 0.7 && i % 3 == 0 ? 1.0 : 0.001);
  }
  const double threshold = book.Threshold(0, 0);
  EXPECT_GT(threshold, 0.6);  // a few failures are tolerated among many
  EXPECT_LT(threshold, 0.75);
  EXPECT_EQ(book.audits(), 3000);
}

// What is said of one margin at one time is wrong at most once in 20 times. The book looks at all margins after every
// audit, so that some margin passes more often where failures are as frequent as is just tolerated, whatever the
// margin; where they are more frequent it passes ever more rarely.
TEST(AuditBookTest, LookingAtAllMarginsPassesMoreThanOneInTwenty) {
  const auto passed = [](double failure_rate, int seed) {
    std::mt19937 rng(static_cast<unsigned>(seed));
    std::uniform_real_distribution<double> uniform(0, 1);
    int looks = 0, passes = 0;
    for (int run = 0; run < 20; ++run) {
      AuditBook book;
      for (int audit = 1; audit <= 1500; ++audit) {
        book.Record(uniform(rng), uniform(rng) < failure_rate ? 1 : 0);
        if (audit < 149 || audit % 10 != 0) continue;
        ++looks;
        passes += book.Threshold(0, Guard::kNever) < Guard::kNever;
      }
    }
    std::printf("failures %.2f: a margin passes %.3f of the time\n", failure_rate, 1.0 * passes / looks);
    return 1.0 * passes / looks;
  };
  const double tolerated = passed(0.02, 1), twice = passed(0.04, 2), four_times = passed(0.08, 3);
  EXPECT_LT(tolerated, 0.25);
  EXPECT_LT(twice, 0.08);
  EXPECT_LT(four_times, 0.02);
  EXPECT_LT(twice, tolerated);
}

TEST(AuditBookTest, OldAuditsAreForgottenAndNotANumberIsAFailure) {
  AuditBook book({.window = 200});
  for (int i = 0; i < 300; ++i) book.Record(0.95, std::nan(""));
  EXPECT_GT(book.Threshold(0, 0), 0.95);
  EXPECT_EQ(book.failures(), 300);
  for (int i = 0; i < 200; ++i) book.Record(0.95, 0.0);
  EXPECT_EQ(book.Threshold(0, 0), 0.95);
}

// Chunks that nothing is known of: strict, until audits say how near exact they are.
TEST(GuardTest, LearnsThatChunksAreGoodFromAnswersItSendsBack) {
  Guard guard({.margin = 3, .doubts = 0.6});
  std::mt19937 rng(3);
  std::exponential_distribution<double> margin(2.0);
  EXPECT_EQ(guard.margin(), 3.0);
  EXPECT_DOUBLE_EQ(guard.DoubtRate(), 0.6);
  int sent_back = 0, first_trusted = 0;
  for (int i = 1; i <= 2000; ++i) {
    const double seen = margin(rng);
    guard.Answered(seen);
    if (seen >= guard.margin()) {
      if (first_trusted == 0) first_trusted = i;
      continue;
    }
    guard.Audited(seen, 0.01);
    sent_back += i > 1000;
  }
  EXPECT_GE(first_trusted, 29);
  EXPECT_LE(first_trusted, 60);
  EXPECT_NEAR(sent_back / 1000.0, GuardMargin::kDoubtedShare, 0.1);
  EXPECT_NEAR(guard.DoubtRate(), GuardMargin::kDoubtedShare, 0.12);
}

TEST(GuardTest, TrustsNothingWhereAnswersAreFarFromExact) {
  Guard guard({.margin = Guard::kNever, .doubts = 0.6});
  std::mt19937 rng(4);
  std::uniform_real_distribution<double> margin(0, 2.9);
  for (int i = 0; i < 600; ++i) {
    const double seen = margin(rng);
    guard.Answered(seen);
    guard.Audited(seen, i % 5 == 0 ? 0.2 : 0.01);
    ASSERT_GE(guard.margin(), 2.5) << i;  // a lucky few at the top may pass early
  }
  EXPECT_EQ(guard.margin(), Guard::kNever);
  EXPECT_EQ(guard.DoubtRate(), 1);
  // It goes on learning, and trusts again once what was far is forgotten.
  for (int i = 0; i < 600; ++i) guard.Audited(margin(rng), 0.01);
  EXPECT_LT(guard.margin(), 1);
}

TEST(GuardTest, LosesTrustAgain) {
  Guard guard({.margin = 0, .doubts = 0.2});
  for (int i = 0; i < 200; ++i) guard.Audited(1.0 + i * 0.01, 0.001);
  guard.Answered(1.0);
  EXPECT_LE(guard.margin(), 1.0);
  for (int i = 0; i < 60; ++i) guard.Audited(1.0 + i * 0.01, 1.0);
  EXPECT_GE(guard.margin(), 1.5);
}

// Whatever the scale of a model's margins, about a fifth of its requests is sent back, the least sure ones; where all
// margins are wide, fewer.
TEST(ConfidenceTest, TheGuardMarginFindsTheQuantileOfAnyScale) {
  std::mt19937 rng(5);
  for (const double scale : {0.2, 1.0, 3.0, 6.0, 30.0}) {
    std::exponential_distribution<double> margin(1 / scale);
    GuardMargin guard;
    int doubted = 0;
    constexpr int kWarmUp = 200, kRequests = 4000;
    for (int i = 0; i < kWarmUp + kRequests; ++i) {
      const bool doubt = margin(rng) < guard.value();
      guard.Answered(doubt);
      doubted += i >= kWarmUp && doubt;
      ASSERT_GE(guard.value(), GuardMargin::kLeast);
      ASSERT_LE(guard.value(), GuardMargin::kMost);
    }
    const double share = static_cast<double>(doubted) / kRequests;
    if (scale < 30) {
      EXPECT_NEAR(share, GuardMargin::kDoubtedShare, 0.04) << scale;
    } else {
      EXPECT_NEAR(share, 1 - std::exp(-GuardMargin::kMost / scale), 0.03);
    }
  }
}

// Seven answers, all near ties: a team's talk, most of which is not to be sent back.
TEST(ConfidenceTest, TheGuardMarginComesDownSoonToWhatAnswersHave) {
  GuardMargin guard;
  std::vector<double> asked;
  int doubted = 0;
  for (const double margin : {0.06, 0.2, 0.14, 0.1, 0.23, 0.09, 0.13}) {
    doubted += margin < guard.value();
    guard.Answered(margin < guard.value());
    asked.push_back(guard.value());
  }
  EXPECT_LE(doubted, 4);
  EXPECT_EQ(asked[2], 0.7 / 8);
  EXPECT_GT(asked[3], asked[2]);  // reached: from here on it moves by steps
  EXPECT_GT(asked[4], 0.08);
}

// One answer that has the margin is enough: later ones that miss it move it by a step.
TEST(ConfidenceTest, TheGuardMarginHalvesOnlyUntilItIsReached) {
  GuardMargin guard;
  guard.Answered(/*doubted=*/false);
  const double before = guard.value();
  guard.Answered(/*doubted=*/true);
  EXPECT_GT(guard.value(), before - 0.1);
}

TEST(GuardTest, AnEmptyStateIsNotTakenForAMarginThatWasReached) {
  Guard fresh({.margin = 0, .doubts = 0.2}), old({.margin = 0, .doubts = 0.2});
  fresh.Restore({});
  fresh.Answered(0.01);
  EXPECT_EQ(fresh.margin(), 0.35);
  old.Restore({.quantile = 0.7, .least = {1.0}, .audits = {}});
  old.Answered(0.01);
  EXPECT_GT(old.margin(), 0.6);
}

}  // namespace
}  // namespace kvshare::anchors

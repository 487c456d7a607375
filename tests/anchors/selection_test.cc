#include "anchors/selection.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <random>

namespace kvshare::anchors {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

TEST(SelectionTest, TakesTheLargestAndOfEqualsTheFirst) {
  const std::vector<float> scores = {1, 5, 3, 5, 5, 0};
  EXPECT_THAT(LargestScores(scores, 2), ElementsAre(1, 3));
  EXPECT_THAT(LargestScores(scores, 4), ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(LargestScores(scores, 0), IsEmpty());
  EXPECT_THAT(LargestScores(scores, -3), IsEmpty());
  EXPECT_THAT(LargestScores({}, 3), IsEmpty());
  EXPECT_EQ(LargestScores(scores, 100).size(), scores.size());
}

TEST(SelectionTest, WhatIsNotANumberComesLast) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT(LargestScores(std::vector<float>{nan, -1, nan, 2}, 2), ElementsAre(1, 3));
}

TEST(SelectionTest, NothingLeftOutIsLargerThanWhatIsTaken) {
  std::mt19937 rng(1);
  for (int round = 0; round < 100; ++round) {
    std::vector<float> scores(1 + rng() % 200);
    for (float& s : scores) s = static_cast<float>(rng() % 30);
    const auto count = static_cast<std::int64_t>(rng() % scores.size());
    const auto taken = LargestScores(scores, count);
    ASSERT_EQ(static_cast<std::int64_t>(taken.size()), count);
    std::vector<bool> in(scores.size());
    float least = std::numeric_limits<float>::infinity();
    for (const std::int64_t i : taken) {
      in[static_cast<std::size_t>(i)] = true;
      least = std::min(least, scores[static_cast<std::size_t>(i)]);
    }
    for (std::size_t i = 0; i < scores.size(); ++i) {
      if (!in[i]) {
        EXPECT_LE(scores[i], least);
      }
    }
  }
}

}  // namespace
}  // namespace kvshare::anchors

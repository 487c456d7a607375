// Sampling: determinism, the limits' edges, and the distribution of many draws.
#include "runtime/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <vector>

namespace kvshare::runtime {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::map<TokenId, int> Draw(const std::vector<float>& logits, const SamplingParams& params, int draws) {
  std::map<TokenId, int> counts;
  for (int step = 0; step < draws; ++step) ++counts[SampleToken(logits, params, step)];
  return counts;
}

// Pearson's statistic of the counts against probabilities.
double ChiSquare(const std::map<TokenId, int>& counts, const std::map<TokenId, double>& probabilities, int draws) {
  double sum = 0;
  for (const auto& [id, p] : probabilities) {
    const auto it = counts.find(id);
    const double seen = it == counts.end() ? 0 : it->second;
    sum += (seen - p * draws) * (seen - p * draws) / (p * draws);
  }
  return sum;
}

TEST(SamplerTest, GreedyTakesTheLowestIdAmongEquals) {
  const std::vector<float> logits = {1, 3, 2, 3};
  EXPECT_EQ(SampleToken(logits, {}, 0), 1);
  EXPECT_EQ(SampleToken(logits, {.temperature = -1}, 0), 1);
  EXPECT_EQ(SampleToken(logits, {.temperature = kNan}, 0), 1);
}

TEST(SamplerTest, TopKOfOneAndTopPOfNothingAreGreedy) {
  std::mt19937 rng(3);
  std::normal_distribution<float> normal(0, 3);
  for (int round = 0; round < 200; ++round) {
    std::vector<float> logits(50);
    for (float& l : logits) l = normal(rng);
    const TokenId greedy = SampleToken(logits, {}, 0);
    EXPECT_EQ(SampleToken(logits, {.temperature = 2, .top_k = 1}, round), greedy);
    EXPECT_EQ(SampleToken(logits, {.temperature = 2, .top_p = 0}, round), greedy);
    EXPECT_EQ(SampleToken(logits, {.temperature = 2, .top_p = -1}, round), greedy);
    EXPECT_EQ(SampleToken(logits, {.temperature = 1e-30f}, round), greedy);
  }
}

TEST(SamplerTest, DrawsFollowTheSoftmax) {
  const std::vector<float> logits = {0.0f, 1.0f, -1.0f, 2.0f, 0.5f, -3.0f};
  const SamplingParams params{.temperature = 1.5f, .seed = 42};
  std::map<TokenId, double> p;
  double total = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) total += p[static_cast<TokenId>(i)] = std::exp(logits[i] / 1.5);
  for (auto& entry : p) entry.second /= total;
  // 5 degrees of freedom: 20.5 is the 0.1 % point.
  EXPECT_LT(ChiSquare(Draw(logits, params, 100000), p, 100000), 20.5);
}

TEST(SamplerTest, NeighbouringSeedsAreIndependent) {
  const std::vector<float> logits(4, 0.0f);
  std::map<TokenId, int> pairs;  // (draw of seed s, draw of seed s + 1) at the same step
  std::map<TokenId, double> p;
  for (TokenId i = 0; i < 16; ++i) p[i] = 1.0 / 16;
  for (std::uint64_t seed = 0; seed < 20000; ++seed) {
    const TokenId a = SampleToken(logits, {.temperature = 1, .seed = seed}, 0);
    const TokenId b = SampleToken(logits, {.temperature = 1, .seed = seed + 1}, 0);
    ++pairs[a * 4 + b];
  }
  // 15 degrees of freedom: 37.7 is the 0.1 % point.
  EXPECT_LT(ChiSquare(pairs, p, 20000), 37.7);
}

TEST(SamplerTest, TopKKeepsTheMostLikely) {
  const auto counts = Draw({1, 5, 4, 3, 2}, {.temperature = 10, .top_k = 2}, 2000);
  EXPECT_EQ(counts.size(), 2u);
  EXPECT_TRUE(counts.contains(1) && counts.contains(2));
  EXPECT_EQ(Draw({0, 0, 0}, {.temperature = 1, .top_k = 99}, 2000).size(), 3u);
}

TEST(SamplerTest, TopPKeepsTheSmallestSetThatReachesIt) {
  // Probabilities 0.5, 0.25, 0.125, 0.125.
  const std::vector<float> logits = {std::log(4.0f), std::log(2.0f), 0.0f, 0.0f};
  EXPECT_EQ(Draw(logits, {.temperature = 1, .top_p = 0.49f}, 1000).size(), 1u);
  EXPECT_EQ(Draw(logits, {.temperature = 1, .top_p = 0.51f}, 1000).size(), 2u);
  EXPECT_EQ(Draw(logits, {.temperature = 1, .top_p = 0.76f}, 1000).size(), 3u);
  EXPECT_EQ(Draw(logits, {.temperature = 1, .top_p = 0.99f}, 1000).size(), 4u);
  EXPECT_EQ(Draw(logits, {.temperature = 1, .top_p = 1.0f}, 1000).size(), 4u);
  const auto kept = Draw(logits, {.temperature = 1, .top_k = 3, .top_p = 0.76f}, 1000);
  EXPECT_EQ(kept.size(), 2u);  // of the three kept, two hold 6/7
}

TEST(SamplerTest, AResultIsAFunctionOfSeedAndStep) {
  const std::vector<float> logits(1000, 0.0f);
  const SamplingParams params{.temperature = 1, .seed = 7};
  EXPECT_EQ(SampleToken(logits, params, 5), SampleToken(logits, params, 5));
  std::map<TokenId, int> by_seed;
  for (std::uint64_t seed = 0; seed < 100; ++seed) ++by_seed[SampleToken(logits, {.temperature = 1, .seed = seed}, 5)];
  EXPECT_GT(by_seed.size(), 80u);
}

TEST(SamplerTest, OddLogitsAreSurvived) {
  const SamplingParams params{.temperature = 1};
  EXPECT_EQ(SampleToken(std::vector<float>{kNan, -kInf, 1.0f}, params, 0), 2);
  EXPECT_EQ(SampleToken(std::vector<float>{kNan, kNan}, params, 0), 0);
  EXPECT_EQ(CheckLogits(std::vector<float>{kNan, -kInf}).code(), StatusCode::kInternal);
  EXPECT_TRUE(CheckLogits(std::vector<float>{kNan, -kInf, -1e30f}).ok());
  EXPECT_TRUE(CheckLogits(std::vector<float>{kNan, kInf}).ok());
  EXPECT_EQ(SampleToken(std::vector<float>{-kInf, -kInf}, params, 0), 0);
  EXPECT_EQ(SampleToken(std::vector<float>{kNan, 3.0f}, {}, 0), 1);
  const auto counts = Draw({kInf, 0, kInf, kNan}, params, 1000);
  EXPECT_EQ(counts.size(), 2u);
  EXPECT_TRUE(counts.contains(0) && counts.contains(2));
  EXPECT_EQ(Draw({3e38f, -3e38f}, {.temperature = 1e-3f}, 100).size(), 1u);
}

}  // namespace
}  // namespace kvshare::runtime

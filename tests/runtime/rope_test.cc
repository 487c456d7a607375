#include "runtime/rope.h"

#include <gtest/gtest.h>

#include <cmath>

namespace kvshare::runtime {
namespace {

// Against values computed with transformers' formulas (modeling_rope_utils) by hand in the cases where they collapse.
TEST(RopeTest, DefaultAndLinearAreTheTextbook) {
  RopeConfig rope;
  for (const int dim : {16, 64, 128}) {
    const auto f = RopeFrequencies(rope, dim);
    ASSERT_EQ(static_cast<int>(f.size()), dim / 2);
    for (int j = 0; j < dim / 2; ++j) EXPECT_DOUBLE_EQ(f[j], 1.0 / std::pow(10000.0, 2.0 * j / dim));
    rope.kind = RopeKind::kLinear;
    rope.factor = 4;
    const auto linear = RopeFrequencies(rope, dim);
    for (int j = 0; j < dim / 2; ++j) EXPECT_DOUBLE_EQ(linear[j], f[j] / 4);
    rope = {};
  }
}

TEST(RopeTest, Llama3KeepsFastPairsAndSlowsSlowOnes) {
  const RopeConfig rope{.kind = RopeKind::kLlama3,
                        .theta = 500000.0,
                        .factor = 8,
                        .low_freq_factor = 1,
                        .high_freq_factor = 4,
                        .original_max_position = 8192};
  RopeConfig plain;
  plain.theta = 500000.0;
  const auto got = RopeFrequencies(rope, 128), base = RopeFrequencies(plain, 128);
  int kept = 0, slowed = 0;
  for (int j = 0; j < 64; ++j) {
    const double turns = 8192 * base[j] / (2 * M_PI);  // within the original context
    if (turns > 4) {
      EXPECT_EQ(got[j], base[j]);
      ++kept;
    } else if (turns < 1) {
      EXPECT_DOUBLE_EQ(got[j], base[j] / 8);
      ++slowed;
    } else {
      const double smooth = (turns - 1) / 3;
      EXPECT_NEAR(got[j], (1 - smooth) * base[j] / 8 + smooth * base[j], 1e-12 * base[j]);
    }
  }
  EXPECT_GT(kept, 20);
  EXPECT_GT(slowed, 20);
}

TEST(RopeTest, YarnRampsByTurns) {
  const RopeConfig rope{.kind = RopeKind::kYarn, .theta = 1e6, .factor = 4, .original_max_position = 32768};
  RopeConfig plain;
  plain.theta = 1e6;
  const auto got = RopeFrequencies(rope, 128), base = RopeFrequencies(plain, 128);
  // The pairs with beta_fast = 32 and beta_slow = 1 turns in 32768 positions: 23.6 and 39.7 (Qwen3's own settings).
  for (int j = 0; j < 64; ++j) {
    const double ramp = std::clamp((j - 23.0) / (40.0 - 23.0), 0.0, 1.0);
    EXPECT_NEAR(got[j], base[j] * (1 - ramp) + base[j] / 4 * ramp, 1e-15) << j;
  }
  EXPECT_NEAR(RopeAttentionFactor(rope), 1.1386294361119891, 1e-15);
  EXPECT_EQ(RopeAttentionFactor(plain), 1.0);
}

TEST(RopeTest, DivisorsDivide) {
  RopeConfig rope;
  rope.divisors = {1, 2, 4, 8};
  const auto got = RopeFrequencies(rope, 8), base = RopeFrequencies({}, 8);
  for (int j = 0; j < 4; ++j) EXPECT_DOUBLE_EQ(got[j], base[j] / rope.divisors[j]);
}

TEST(RopeTest, TableIsRoundedOnceWhateverTheThreads) {
  const RopeConfig rope{.kind = RopeKind::kYarn, .theta = 1e4, .factor = 2, .original_max_position = 512};
  constexpr int kPositions = 1000, kHalf = 16;
  std::vector<float> cos(kPositions * kHalf), sin(cos.size()), cos3(cos.size()), sin3(cos.size());
  FillRopeTable(rope, 2 * kHalf, kPositions, 1, cos.data(), sin.data());
  FillRopeTable(rope, 2 * kHalf, kPositions, 3, cos3.data(), sin3.data());
  EXPECT_EQ(cos, cos3);
  EXPECT_EQ(sin, sin3);
  const auto f = RopeFrequencies(rope, 2 * kHalf);
  const double factor = RopeAttentionFactor(rope);
  for (int p = 0; p < kPositions; p += 37) {
    for (int j = 0; j < kHalf; ++j) {
      EXPECT_EQ(cos[p * kHalf + j], static_cast<float>(factor * std::cos(p * f[j])));
      EXPECT_EQ(sin[p * kHalf + j], static_cast<float>(factor * std::sin(p * f[j])));
    }
  }
}

}  // namespace
}  // namespace kvshare::runtime

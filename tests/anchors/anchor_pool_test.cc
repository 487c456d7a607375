#include "anchors/anchor_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "tests/anchors/anchor_samples.h"

namespace kvshare::anchors {
namespace {

KvBlock RandomBlock(std::mt19937& rng, std::int64_t tokens, float scale = 1.0f) {
  KvBlock block(3, tokens, 8);
  std::normal_distribution<float> normal(0, scale);
  for (float& value : block.values) value = normal(rng);
  return block;
}

KvBlock Plus(const KvBlock& a, const KvBlock& b) {
  KvBlock sum = a;
  for (std::size_t i = 0; i < sum.values.size(); ++i) sum.values[i] += b.values[i];
  return sum;
}

void Register(AnchorPool& pool, const std::string& placeholder, const std::string& agent, const std::string& content,
              const KvBlock& base, const KvBlock& real) {
  pool.Register(placeholder, agent, content, RowsOf(base), RowsOf(real));
}

TEST(AnchorPoolTest, ShareableOnlyWithTwoAnchorsOfWhichOneIsNear) {
  std::mt19937 rng(1);
  AnchorPool pool;
  const KvBlock near = RandomBlock(rng, 40);
  EXPECT_FALSE(pool.Shareable("p", near));
  Register(pool, "p", "agent", "one", near, near);
  EXPECT_FALSE(pool.Shareable("p", near));
  Register(pool, "p", "agent", "two", RandomBlock(rng, 40, 3.0f), near);
  EXPECT_FALSE(pool.Shareable("p", RandomBlock(rng, 41))) << "anchors must be as long";
  EXPECT_TRUE(pool.Shareable("p", near));
  EXPECT_FALSE(pool.Shareable("other", near));
  // Two anchors at the same distance say nothing about which to trust: entropy 1 of 1.
  AnchorPool even;
  const KvBlock same = RandomBlock(rng, 40);
  Register(even, "p", "agent", "one", same, same);
  Register(even, "p", "agent", "two", same, same);
  EXPECT_FALSE(even.Shareable("p", near));
}

TEST(AnchorPoolTest, SaysBeforehandWhatItCannotServe) {
  std::mt19937 rng(5);
  AnchorPool pool({.max_bytes = 1 << 20});
  const KvBlock base = RandomBlock(rng, 40);
  EXPECT_EQ(pool.Reach("p", "agent"), 0);
  Register(pool, "p", "agent", "one", base, base);
  EXPECT_EQ(pool.Reach("p", "agent"), 0) << "one is too few";
  Register(pool, "p", "agent", "two", RandomBlock(rng, 40), base);
  EXPECT_EQ(pool.Reach("p", "agent"), 40);
  EXPECT_EQ(pool.Reach("p", "stranger"), 0);
  EXPECT_EQ(pool.Reach("other", "agent"), 0);
  Register(pool, "p", "agent", "three", RandomBlock(rng, 60), RandomBlock(rng, 60));
  EXPECT_EQ(pool.Reach("p", "agent"), 40) << "one that is longer is too few";
  Register(pool, "p", "second", "four", RandomBlock(rng, 50), RandomBlock(rng, 50));
  EXPECT_EQ(pool.Reach("p", "agent"), 50);
  // 3 layers x 2 x tokens of one block of 34 bytes, twice: 408 bytes a token, of which a quarter of 1 MiB holds 642.
  EXPECT_TRUE(pool.HasRoomFor(3, 642, 8));
  EXPECT_FALSE(pool.HasRoomFor(3, 643, 8));
}

TEST(AnchorPoolTest, OneAnchorGivesItsOffsetButNotInTheFirstLayer) {
  std::mt19937 rng(2);
  AnchorPool pool;
  const KvBlock base = RandomBlock(rng, 10);
  const KvBlock offset = RandomBlock(rng, 10, 0.1f);
  Register(pool, "p", "reader", "one", base, Plus(base, offset));
  KvBlock block = RandomBlock(rng, 6);
  const KvBlock before = block;
  ASSERT_EQ(pool.anchors(), 1u);
  const Anchor anchor = pool.Snapshot()[0];
  EXPECT_EQ(anchor.tokens, 10);
  EXPECT_TRUE(anchor.offsets.contains("reader"));
  EXPECT_FALSE(anchor.offsets.contains("stranger"));
  pool.Correct("p", "stranger", &block);
  EXPECT_EQ(block.values, before.values);
  pool.Correct("p", "reader", &block);
  for (int layer = 0; layer < 3; ++layer) {
    for (int part = 0; part < 2; ++part) {
      for (std::int64_t t = 0; t < 6; ++t) {
        for (std::size_t i = 0; i < 8; ++i) {
          const float expected = before.row(layer, part, t)[i] + (layer == 0 ? 0 : offset.row(layer, part, t)[i]);
          EXPECT_NEAR(block.row(layer, part, t)[i], expected, 0.002) << "half a scale: offsets are at most 0.5";
        }
      }
    }
  }
}

TEST(AnchorPoolTest, WeightsAreThoseOfTheFormula) {
  std::mt19937 rng(3);
  AnchorPool pool;
  const std::int64_t tokens = 4;
  std::vector<KvBlock> bases, offsets;
  for (int a = 0; a < 3; ++a) {
    bases.push_back(RandomBlock(rng, tokens));
    offsets.push_back(RandomBlock(rng, tokens));
    // Values that a block holds exactly, so that only the formula is tested: a row is one, and its scale is 1/32.
    for (auto* block : {&bases.back(), &offsets.back()}) {
      for (float& v : block->values) v = std::clamp(std::round(v * 32), -127.0f, 127.0f) / 32;
      for (std::size_t i = 0; i < block->values.size(); i += 8) block->values[i] = 127.0f / 32;
    }
    Register(pool, "p", "reader", "c" + std::to_string(a), bases.back(), Plus(bases.back(), offsets.back()));
  }
  KvBlock block = RandomBlock(rng, tokens);
  const KvBlock before = block;
  pool.Correct("p", "reader", &block);
  for (int part = 0; part < 2; ++part) {
    for (std::int64_t t = 0; t < tokens; ++t) {
      double weight[3], sum = 0;
      for (int a = 0; a < 3; ++a) {
        double distance = 0;
        for (int layer = 0; layer < 3; ++layer) {
          for (std::size_t i = 0; i < 8; ++i) {
            distance +=
                std::abs(before.row(layer, part, t)[i] - bases[static_cast<std::size_t>(a)].row(layer, part, t)[i]);
          }
        }
        sum += weight[a] = std::exp(-distance / 24);
      }
      for (int layer = 1; layer < 3; ++layer) {
        for (std::size_t i = 0; i < 8; ++i) {
          double expected = before.row(layer, part, t)[i];
          for (int a = 0; a < 3; ++a) {
            expected += weight[a] / sum * offsets[static_cast<std::size_t>(a)].row(layer, part, t)[i];
          }
          EXPECT_NEAR(block.row(layer, part, t)[i], expected, 1e-4);
        }
      }
    }
  }
}

TEST(AnchorPoolTest, KeepsToItsLimits) {
  std::mt19937 rng(4);
  const KvBlock one = RandomBlock(rng, 8);
  const std::size_t anchor_bytes = 2 * 34 * one.values.size() / 8;  // base and one offset, a block for each row
  AnchorPool pool({.max_anchors = 4, .max_bytes = 6 * anchor_bytes});
  for (int i = 0; i < 20; ++i) {
    const KvBlock base = RandomBlock(rng, 8);
    Register(pool, "p" + std::to_string(i % 2), "a", "c" + std::to_string(i), base, base);
    EXPECT_LE(pool.bytes(), 6 * anchor_bytes);
    EXPECT_LE(pool.anchors(), 6u);
    EXPECT_EQ(pool.bytes(), pool.anchors() * anchor_bytes);
  }
  EXPECT_EQ(pool.anchors(), 6u);
}

TEST(AnchorPoolTest, TheSameContentSeenByAnotherAgentIsOneAnchor) {
  std::mt19937 rng(5);
  AnchorPool pool;
  const KvBlock base = RandomBlock(rng, 8);
  Register(pool, "p", "a", "text", base, base);
  Register(pool, "p", "b", "text", base, base);
  ASSERT_EQ(pool.anchors(), 1u);
  const Anchor anchor = pool.Snapshot()[0];
  EXPECT_EQ(anchor.tokens, 8);
  EXPECT_TRUE(anchor.offsets.contains("a"));
  EXPECT_TRUE(anchor.offsets.contains("b"));
}

TEST(AnchorPoolTest, ARestoredPoolGoesOnAsTheOneThatWasSaved) {
  AnchorPool pool({.max_anchors = 4});
  TeachSamples(&pool, 0, 12);
  AnchorPool restored({.max_anchors = 4});
  restored.Restore(pool.Snapshot());
  EXPECT_EQ(restored.bytes(), pool.bytes());
  EXPECT_EQ(restored.version(), pool.version());
  EXPECT_EQ(Describe(restored.Snapshot()), Describe(pool.Snapshot()));
  for (AnchorPool* p : {&pool, &restored}) TeachSamples(p, 12, 17);  // evicts: what is used least is known too
  EXPECT_EQ(Describe(restored.Snapshot()), Describe(pool.Snapshot()));
  for (const std::string agent : {"critic", "judge"}) {
    KvBlock a = SampleBlock(99, 5), b = a;
    pool.Correct("slot1/planner", agent, &a);
    restored.Correct("slot1/planner", agent, &b);
    EXPECT_EQ(a.values, b.values);
    EXPECT_NE(a.values, SampleBlock(99, 5).values);
  }
}

TEST(AnchorPoolTest, WhatWasLearntMeanwhileStaysNewer) {
  AnchorPool old, pool;
  TeachSamples(&old, 0, 6);
  Register(pool, "slot0/planner", "critic", "text0", SampleBlock(70, 6), SampleBlock(71, 6));  // known to both
  Register(pool, "slot0/planner", "critic", "new", SampleBlock(72, 6), SampleBlock(73, 6));
  const std::vector<Anchor> since = pool.Snapshot();
  const std::uint64_t before = pool.version();
  pool.Restore(old.Snapshot());
  EXPECT_GT(pool.version(), before);
  const std::vector<Anchor> all = pool.Snapshot();
  ASSERT_EQ(all.size(), old.anchors() + 1);
  EXPECT_EQ(all.back().content, "new");
  EXPECT_EQ(all[all.size() - 2].content, "text0");
  EXPECT_EQ(*all[all.size() - 2].base, *since.front().base);
  for (std::size_t i = 1; i < all.size(); ++i) {
    EXPECT_GT(all[i].serial, all[i - 1].serial);
    for (std::size_t j = 0; j < i; ++j) EXPECT_NE(all[i].version, all[j].version);
  }
  std::size_t bytes = 0;
  for (const Anchor& anchor : all) bytes += anchor.bytes();
  EXPECT_EQ(pool.bytes(), bytes);
}

// The first prompt after a restart is computed while its session's anchors are being read back, and teaches one
// agent's.
TEST(AnchorPoolTest, OtherAgentsOffsetsFromTheSameBaseStay) {
  AnchorPool old, pool;
  for (const char* agent : {"critic", "writer"}) {
    for (const int text : {0, 1}) {
      Register(old, "slot0", agent, "text" + std::to_string(text), SampleBlock(70 + text, 6),
               SampleBlock(80 + text, 6));
    }
  }
  Register(pool, "slot0", "critic", "text0", SampleBlock(70, 6), SampleBlock(90, 6));
  Register(pool, "slot0", "critic", "text1", SampleBlock(79, 6), SampleBlock(91, 6));  // from another base
  const Anchor::Values taught = pool.Snapshot().front().offsets.at("critic");
  pool.Restore(old.Snapshot());
  const std::vector<Anchor> all = pool.Snapshot();
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(all[0].offsets.size(), 2u);
  EXPECT_EQ(all[0].offsets.at("critic"), taught);
  EXPECT_EQ(*all[0].offsets.at("writer"), *old.Snapshot().front().offsets.at("writer"));
  EXPECT_EQ(all[1].offsets.size(), 1u);
  std::size_t bytes = 0;
  for (const Anchor& anchor : all) bytes += anchor.bytes();
  EXPECT_EQ(pool.bytes(), bytes);
}

TEST(AnchorPoolTest, RestoringKeepsToTheLimits) {
  AnchorPool old;
  TeachSamples(&old, 0, 20);
  const std::size_t one = old.Snapshot().front().bytes();
  AnchorPool few({.max_anchors = 3}), small({.max_bytes = 4 * one});
  few.Restore(old.Snapshot());
  small.Restore(old.Snapshot());
  EXPECT_EQ(few.anchors(), 6u);  // of two placeholders
  EXPECT_LE(small.bytes(), 4 * one);
  EXPECT_GT(small.anchors(), 0u);
}

}  // namespace
}  // namespace kvshare::anchors

// MovedPrompt against plain prefill of the same tokens. The oracle for moving: in a model of one layer K and V depend
// on token and position alone, so a chunk computed in any company, at any place, is right once it is rotated.
#include "agentd/repair/moved_prompt.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/agentd/repair/moved_bed.h"
#include "tests/testing/ids.h"
#include "tests/testing/status_matchers.h"

namespace kvshare::agentd {
namespace {

using kernels::kPageTokens;
using kernels::PageIndex;
using Ids = std::vector<TokenId>;
using testing::Join;

class MovedPromptTest : public ::testing::TestWithParam<kernels::DType> {
 protected:
  Ids Random(int count) { return testing::RandomIds(rng_, count); }
  // Of rounding: keys are kept in the dtype, and rotated once more.
  double Tolerance() const { return GetParam() == kernels::DType::kF32 ? 2e-5 : 3e-2; }

  std::mt19937 rng_{17};
};

TEST_P(MovedPromptTest, MovingIsExactWhereCompanyDoesNotMatter) {
  for (const int before : {0, 40, 70, 200}) {
    SCOPED_TRACE("the run has " + std::to_string(before) + " tokens before the chunk");
    Bed bed(GetParam(), 1);
    const Ids chunk = Random(130), other = Random(50);
    std::vector<PageIndex> run;
    bed.Plain(Join({Random(before), chunk, Random(9)}), &run);
    std::vector<PageIndex> second;
    bed.Plain(Join({Random(20), other}), &second);
    const Ids prompt = Join({Random(65), chunk, Random(3), other, Random(30)});
    const std::vector<float> want = bed.Plain(prompt);
    for (const ReuseMode mode :
         {ReuseMode::kRotate, ReuseMode::kEpic, ReuseMode::kCacheBlend, ReuseMode::kDhd, ReuseMode::kAuto}) {
      SCOPED_TRACE(std::string(ReuseModeName(mode)));
      RepairOptions options;
      options.mode = mode;
      const auto moved =
          bed.Moved(prompt, {Bed::Chunk(run, before, 130, 65), Bed::Chunk(second, 20, 50, 198, 2)}, options);
      std::vector<float> got = bed.Logits();
      KVS_ASSERT_OK(moved->Prefill(got.data()));
      EXPECT_LE(WorstDifference(got, want), Tolerance() * Scale(want));
      EXPECT_EQ(moved->counts().moved + moved->counts().recomputed, 180);
      EXPECT_FALSE(moved->counts().exact);
    }
  }
}

TEST_P(MovedPromptTest, WhatPoliciesComputeIsCounted) {
  constexpr int kLayers = 6;
  Bed bed(GetParam(), kLayers);
  const Ids chunk = Random(200);
  std::vector<PageIndex> run;
  bed.Plain(Join({Random(10), chunk}), &run);
  const Ids prompt = Join({Random(140), chunk, Random(30)});  // far from 10: not one thread
  const auto counts = [&](ReuseMode mode, double ratio, std::int64_t rows_while_loading = 0) {
    RepairOptions options;
    options.mode = mode;
    options.recompute_ratio = ratio;
    options.rows_while_loading = rows_while_loading;
    const auto moved = bed.Moved(prompt, {Bed::Chunk(run, 10, 200, 140)}, options);
    std::vector<float> logits = bed.Logits();
    EXPECT_TRUE(moved->Prefill(logits.data()).ok());
    return moved->counts();
  };
  EXPECT_EQ(counts(ReuseMode::kRotate, -1).computed_pairs, 0);
  EXPECT_EQ(counts(ReuseMode::kEpic, -1).computed_pairs, 16 * kLayers);
  EXPECT_EQ(counts(ReuseMode::kEpic, 0.5).recomputed, 100);
  const RepairCounts blend = counts(ReuseMode::kCacheBlend, 0.1);
  EXPECT_EQ(blend.recomputed, 20);
  EXPECT_EQ(blend.computed_pairs, 200 * 2 + 20 * kLayers);  // two layers to choose
  EXPECT_EQ(counts(ReuseMode::kDhd, 0.1).computed_pairs, blend.computed_pairs);
  EXPECT_EQ(counts(ReuseMode::kAuto, 0.1).computed_pairs, 20 * kLayers);
  // The loading controller: 370 tokens in two of six layers and 170 in all are 293 rows.
  EXPECT_EQ(counts(ReuseMode::kCacheBlend, -1, 293 + 29).recomputed, 30);  // 15 %
  EXPECT_EQ(counts(ReuseMode::kCacheBlend, -1, 294 + 50).recomputed, 50);
  EXPECT_EQ(counts(ReuseMode::kCacheBlend, -1, 1000).recomputed, 75) << "less work than computing all";
  EXPECT_EQ(counts(ReuseMode::kCacheBlend, 0.1, 1000).recomputed, 20);
  EXPECT_EQ(counts(ReuseMode::kDhd, -1, 1000).recomputed, 30);
  const RepairCounts all = counts(ReuseMode::kCacheBlend, 1.0);
  EXPECT_TRUE(all.exact);
  EXPECT_EQ(all.recomputed, 200);
  EXPECT_EQ(all.computed_pairs, 200 * kLayers);
}

// The more is computed, the nearer; and all of it is exact, to the bit.
TEST_P(MovedPromptTest, RecomputingAllIsPlainPrefillToTheBit) {
  Bed bed(GetParam(), 4);
  const Ids chunk = Random(150);
  std::vector<PageIndex> run;
  bed.Plain(Join({Random(90), chunk}), &run);
  const Ids prompt = Join({Random(33), chunk, Random(40)});
  const std::vector<float> want = bed.Plain(prompt);
  for (const ReuseMode mode : {ReuseMode::kEpic, ReuseMode::kCacheBlend, ReuseMode::kDhd, ReuseMode::kAuto}) {
    RepairOptions options;
    options.mode = mode;
    options.recompute_ratio = 1;
    const auto moved = bed.Moved(prompt, {Bed::Chunk(run, 90, 150, 33)}, options);
    std::vector<float> got = bed.Logits();
    KVS_ASSERT_OK(moved->Prefill(got.data()));
    EXPECT_EQ(got, want) << ReuseModeName(mode);
  }
}

// In small steps that may be interrupted it is the same to the bit, and who is interrupted says so.
TEST_P(MovedPromptTest, InterruptionsChangeNoBit) {
  Bed bed(GetParam(), 4);
  const Ids chunk = Random(150);
  std::vector<PageIndex> run;
  bed.Plain(Join({Random(90), chunk}), &run);
  const Ids prompt = Join({Random(33), chunk, Random(40)});
  RepairOptions options;
  options.mode = ReuseMode::kAuto;
  const auto prefill = [&](std::int64_t rows, int steps, std::vector<float>* logits) {
    const auto moved = bed.Moved(prompt, {Bed::Chunk(run, 90, 150, 33)}, options);
    if (rows > 0) moved->Interruptible(rows, [&steps] { return steps-- > 0; });
    *logits = bed.Logits();
    return moved->Prefill(logits->data());
  };
  std::vector<float> whole, parts;
  KVS_ASSERT_OK(prefill(0, 0, &whole));
  // 33 + 40 fresh rows, then 30 or 31 and the prompt's end once more.
  KVS_ASSERT_OK(prefill(7, 100, &parts));
  EXPECT_EQ(parts, whole);
  for (const int steps : {0, 1, 10, 12}) {
    EXPECT_EQ(prefill(7, steps, &parts).code(), StatusCode::kCancelled) << steps;
  }
}

// The guard's way: approximate, some tokens on, then exact as if it had never been otherwise.
TEST_P(MovedPromptTest, RecomputeForgetsWhatWasApproximate) {
  Bed bed(GetParam(), 4);
  const Ids chunk = Random(150), answer = Random(8);
  std::vector<PageIndex> run;
  bed.Plain(Join({Random(90), chunk}), &run);
  const Ids prompt = Join({Random(33), chunk, Random(40)});
  const auto moved = bed.Moved(prompt, {Bed::Chunk(run, 90, 150, 33)}, {.mode = ReuseMode::kAuto});
  std::vector<float> logits = bed.Logits();
  KVS_ASSERT_OK(moved->Prefill(logits.data()));
  const std::size_t vocab = logits.size();
  std::vector<float> rows(answer.size() * vocab), again(answer.size() * vocab);
  KVS_ASSERT_OK(moved->Append(answer, rows.data()));
  EXPECT_NE(logits, bed.Plain(prompt)) << "four layers of another company's KV, and nothing differs";

  // Taking tokens back and appending them again changes nothing.
  moved->KeepAppended(3);
  KVS_ASSERT_OK(moved->Append(std::span(answer).subspan(3), again.data() + 3 * vocab));
  EXPECT_TRUE(std::equal(rows.begin() + static_cast<std::ptrdiff_t>(3 * vocab), rows.end(),
                         again.begin() + static_cast<std::ptrdiff_t>(3 * vocab)));

  KVS_ASSERT_OK(moved->Recompute(logits.data()));
  EXPECT_EQ(logits, bed.Plain(Join({prompt, answer})));
  EXPECT_TRUE(moved->counts().exact);
  EXPECT_EQ(moved->counts().reason, "quality_guard");
  EXPECT_EQ(moved->counts().moved, 0);
  EXPECT_FALSE(moved->Doubtful(logits));
}

// In modes without a guard, too: what reusing made of it may be sound once it is computed. What was computed is not so
// a second time.
TEST_P(MovedPromptTest, LogitsThatAreNotNumbersAreDoubtful) {
  Bed bed(GetParam(), 4);
  const Ids chunk = Random(150);
  std::vector<PageIndex> run;
  bed.Plain(Join({Random(90), chunk}), &run);
  const auto moved =
      bed.Moved(Join({Random(33), chunk, Random(40)}), {Bed::Chunk(run, 90, 150, 33)}, {.mode = ReuseMode::kRotate});
  std::vector<float> logits = bed.Logits();
  KVS_ASSERT_OK(moved->Prefill(logits.data()));
  const std::vector<float> none(logits.size(), std::numeric_limits<float>::quiet_NaN());
  EXPECT_FALSE(moved->Doubtful(logits));
  EXPECT_TRUE(moved->Doubtful(none));
  KVS_ASSERT_OK(moved->Recompute(logits.data()));
  EXPECT_FALSE(moved->Doubtful(none));
}

TEST_P(MovedPromptTest, ARowInCompanyIsTheRowAlone) {
  Bed bed(GetParam(), 3);
  const Ids chunk = Random(100), other = Random(77);
  std::vector<PageIndex> run, beside;
  bed.Plain(Join({Random(90), chunk}), &run);
  const Ids prompt = Join({Random(33), chunk, Random(40)});
  bed.Plain(other, &beside);
  const std::vector<PageIndex> more = bed.Take(1);
  std::vector<float> alone = bed.Logits(), logits = bed.Logits();
  for (const bool company : {false, true}) {
    const auto moved = bed.Moved(prompt, {Bed::Chunk(run, 90, 100, 33)}, {.mode = ReuseMode::kRotate});
    KVS_ASSERT_OK(moved->Prefill(logits.data()));
    runtime::ForwardBatch batch;
    if (company) {  // a sequence of 77 tokens goes on
      batch.ids.push_back(5);
      batch.positions.push_back(77);
      batch.slots.push_back({beside[1], 13});
      batch.segments.push_back({.pages = beside, .length = 78, .row_end = 1});
    }
    moved->AddRow(9, &batch);
    batch.logit_rows.push_back(static_cast<std::int64_t>(batch.ids.size()) - 1);
    std::vector<float> got = bed.Logits();
    KVS_ASSERT_OK(bed.model().Forward(batch, bed.pages(), got.data()));
    if (company) {
      EXPECT_EQ(got, alone);
    }
    alone = got;
  }
}

TEST_P(MovedPromptTest, AnExactPrefixMayEndInsideAPage) {
  Bed bed(GetParam(), 3);
  const Ids head = Random(100), chunk = Random(90);
  const Ids prompt = Join({head, chunk, Random(20)});
  std::vector<PageIndex> prefix, run;
  bed.Plain(head, &prefix);
  bed.Plain(Join({Random(30), chunk}), &run);
  const std::vector<float> want = bed.Plain(prompt);
  MovedPrompt moved(&bed.model(), bed.pages(), prompt, {.pages = prefix, .tokens = 100}, {Bed::Chunk(run, 30, 90, 100)},
                    {.mode = ReuseMode::kRotate}, nullptr, "reader");
  EXPECT_EQ(moved.RowsToCompute(), 20);
  moved.GivePages(bed.Take(moved.PagesNeeded(kNewTokens)), kNewTokens);
  std::vector<float> logits = bed.Logits();
  KVS_ASSERT_OK(moved.Prefill(logits.data()));
  KVS_ASSERT_OK(moved.Recompute(logits.data()));
  EXPECT_EQ(logits, want);
}

// What stands before the first chunk is what plain prefill computes, to the bit, wherever the stored prefix ends.
TEST_P(MovedPromptTest, TheLeadIsExact) {
  for (const ReuseMode mode : {ReuseMode::kRotate, ReuseMode::kCacheBlend, ReuseMode::kAuto}) {
    for (const std::int64_t stored : {0, 64, 100, 150}) {
      SCOPED_TRACE(std::string(ReuseModeName(mode)) + ", " + std::to_string(stored) + " tokens stored");
      Bed bed(GetParam(), 4);
      const Ids head = Random(150), chunk = Random(90), more = Random(50), other = Random(40);
      const Ids prompt = Join({head, chunk, more, other, Random(20)});
      std::vector<PageIndex> prefix, run, plain;
      bed.Plain(head, &prefix);
      prefix.resize(static_cast<std::size_t>(PagesFor(stored)));
      bed.Plain(Join({Random(30), chunk, Random(70), other}), &run);
      bed.Plain(prompt, &plain);
      const auto full = stored / kPageTokens;
      MovedPrompt moved(&bed.model(), bed.pages(), prompt, {.pages = prefix, .tokens = stored},
                        {Bed::Chunk(run, 30, 90, 150), Bed::Chunk(run, 190, 40, 290)}, {.mode = mode}, nullptr, "r");
      EXPECT_EQ(moved.lead_tokens(), 150);
      std::vector<PageIndex> table(prefix.begin(), prefix.begin() + full);
      const std::vector<PageIndex> own = bed.Take(moved.PagesNeeded(kNewTokens));
      table.insert(table.end(), own.begin(), own.end());
      const auto begin = static_cast<std::size_t>(moved.PagesToBegin(kNewTokens));
      ASSERT_LE(begin, own.size());
      moved.GivePages({own.begin(), own.begin() + static_cast<std::ptrdiff_t>(begin)}, kNewTokens);
      std::vector<float> logits = bed.Logits();
      KVS_ASSERT_OK(moved.Prefill(logits.data()));
      const auto same = [&](std::int64_t position) {
        const auto page = static_cast<std::size_t>(position / kPageTokens);
        return bed.SameRow({table[page], static_cast<int>(position % kPageTokens)},
                           {plain[page], static_cast<int>(position % kPageTokens)});
      };
      for (std::int64_t position = 0; position < 150; ++position) EXPECT_TRUE(same(position)) << position;

      // And fresh rows side by side are named as they lie.
      const std::vector<MovedPrompt::FreshRows> fresh = moved.fresh();
      ASSERT_EQ(fresh.size(), 2u);
      EXPECT_EQ(fresh[0].start, 240);
      EXPECT_EQ(fresh[0].length, 50);
      EXPECT_EQ(fresh[0].pages, std::vector<PageIndex>{table[3]});
      EXPECT_EQ(fresh[0].first, 0);
      EXPECT_EQ(fresh[1].start, 330);
      EXPECT_EQ(fresh[1].length, 20);
      EXPECT_EQ(fresh[1].pages, (std::vector<PageIndex>{table[3], table[4]}));
      EXPECT_EQ(fresh[1].first, 50);

      // Recomputing goes on where the lead ends.
      moved.GiveMorePages(std::span(own).subspan(begin));
      KVS_ASSERT_OK(moved.Recompute(logits.data()));
      EXPECT_EQ(logits, bed.Plain(prompt));
      for (std::int64_t position = 0; position < moved.tokens(); ++position) EXPECT_TRUE(same(position)) << position;
      EXPECT_TRUE(moved.fresh().empty());
    }
  }
}

// KVCOMM: dense runs register anchors; content that is much alike is then corrected towards what a dense run computes.
TEST_P(MovedPromptTest, ContentLikeTheAnchorsIsCorrectedTowardsTheTruth) {
  Bed bed(GetParam(), 4);
  anchors::AnchorPool anchors({.entropy_gate = 1.0});
  const Ids before = Random(20), head = Random(50), tail = Random(20), alike = Random(60);
  std::vector<Ids> contents;
  std::vector<std::vector<PageIndex>> runs(3);
  std::vector<float> logits = bed.Logits();
  for (int i = 0; i < 3; ++i) {
    contents.push_back(Join({alike, Random(4)}));
    bed.Plain(Join({before, contents.back()}), &runs[static_cast<std::size_t>(i)]);
  }
  const auto serve = [&](std::size_t i) {
    std::vector<PageIndex> own;
    const auto moved = bed.Moved(Join({head, contents[i], tail}), {Bed::Chunk(runs[i], 20, 64, 50, i + 1)},
                                 {.mode = ReuseMode::kKvcomm}, &anchors, &own);
    EXPECT_TRUE(moved->Prefill(logits.data()).ok());
    EXPECT_EQ(moved->HasLesson(), moved->counts().exact);
    if (moved->HasLesson()) moved->Teach(own);
    EXPECT_FALSE(moved->HasLesson());
    return moved->counts();
  };
  EXPECT_TRUE(serve(0).exact);
  EXPECT_TRUE(serve(1).exact);  // one anchor is not enough
  EXPECT_EQ(anchors.anchors(), 2u);
  const RepairCounts third = serve(2);
  EXPECT_FALSE(third.exact);
  EXPECT_EQ(third.moved, 64);
  EXPECT_EQ(third.computed_pairs, 0);
  // As stored, and corrected: the latter is nearer to the truth.
  const Ids prompt = Join({head, contents[2], tail});
  const std::vector<float> want = bed.Plain(prompt);
  std::vector<float> corrected = logits, stored = bed.Logits();
  const auto rotated = bed.Moved(prompt, {Bed::Chunk(runs[2], 20, 64, 50, 3)}, {.mode = ReuseMode::kRotate});
  KVS_ASSERT_OK(rotated->Prefill(stored.data()));
  EXPECT_LT(WorstDifference(corrected, want), WorstDifference(stored, want));
}

INSTANTIATE_TEST_SUITE_P(DTypes, MovedPromptTest, ::testing::Values(kernels::DType::kF32, kernels::DType::kBf16),
                         [](const auto& dtype) { return std::string(kernels::DTypeName(dtype.param)); });

}  // namespace
}  // namespace kvshare::agentd

// Gradual filtering against one choice, against itself in other steps, and against a double-precision forward pass that
// keeps every layer's keys and values in one row for each token and puts in what is to be seen there.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "libkvshare/core/status_macros.h"
#include "runtime/rope.h"
#include "tests/agentd/repair/moved_bed.h"
#include "tests/reference/llama_reference.h"
#include "tests/testing/ids.h"
#include "tests/testing/status_matchers.h"

namespace kvshare::agentd {
namespace {

using kernels::KvSlot;
using kernels::PageIndex;
using Ids = std::vector<TokenId>;
using Positions = std::vector<std::int64_t>;
using testing::Join;

constexpr int kLayers = 6;
constexpr std::int64_t kCheck = 1;

class GradualTest : public ::testing::TestWithParam<kernels::DType> {
 protected:
  Ids Random(int count) { return testing::RandomIds(rng_, count); }
  // As moved_prompt_test's.
  double Tolerance() const { return GetParam() == kernels::DType::kF32 ? 2e-5 : 3e-2; }

  // Two chunks of other company among fresh text.
  void Make(Bed& bed) {
    bed.Plain(first_run_, &first_pages_);
    bed.Plain(second_run_, &second_pages_);
  }
  std::vector<MovedChunk> Chunks() const {
    return {Bed::Chunk(first_pages_, 70, 130, 65), Bed::Chunk(second_pages_, 20, 70, 198, 2)};
  }
  Positions MovedPositions() const {
    Positions moved;
    for (const MovedChunk& chunk : Chunks()) {
      for (std::int64_t t = 0; t < chunk.length; ++t) moved.push_back(chunk.start + t);
    }
    return moved;
  }
  static RepairOptions Options(double ratio, std::vector<double> filter) {
    RepairOptions options;
    options.mode = ReuseMode::kCacheBlend;
    options.recompute_ratio = ratio;
    options.filter = std::move(filter);
    return options;
  }

  std::mt19937 rng_{29};
  const Ids first_ = Random(130), second_ = Random(70), end_ = Random(30);
  const Ids first_run_ = Join({Random(70), first_, Random(5)}), second_run_ = Join({Random(20), second_});
  const Ids prompt_ = Join({Random(65), first_, Random(3), second_, end_});
  std::vector<PageIndex> first_pages_, second_pages_;
};

// What the next row would see of each token, by layer.
std::vector<std::map<std::int64_t, KvSlot>> Seen(MovedPrompt& moved, int layers) {
  std::vector<std::map<std::int64_t, KvSlot>> seen(static_cast<std::size_t>(layers));
  runtime::ForwardBatch batch;
  moved.AddRow(1, &batch);
  for (int layer = 0; layer < layers; ++layer) {
    for (const kernels::KvSegment& s : batch.segments) {
      if (!kernels::SeenIn(s, layer)) continue;
      for (std::int64_t t = 0; t < s.length; ++t) {
        const auto row = static_cast<std::uint64_t>(s.first + t);
        if (!s.skip.empty() && (s.skip[row / 64] >> (row % 64) & 1) != 0) continue;
        const bool once = seen[static_cast<std::size_t>(layer)].emplace(PositionOf(s, t), SlotOf(s, t)).second;
        EXPECT_TRUE(once) << "token " << PositionOf(s, t) << " is seen twice in layer " << layer;
      }
    }
  }
  moved.KeepAppended(0);
  return seen;
}

// The moved tokens that are seen as computed, by layer.
std::vector<Positions> ComputedOf(MovedPrompt& moved, int layers) {
  std::vector<Positions> computed;
  for (const auto& seen : Seen(moved, layers)) {
    computed.emplace_back();
    EXPECT_EQ(seen.size(), static_cast<std::size_t>(moved.tokens()) + 1) << "a token is not seen, or the new one";
    for (const MovedChunk& chunk : moved.chunks()) {
      for (std::int64_t t = 0; t < chunk.length; ++t) {
        const std::int64_t row = chunk.first + t;
        const KvSlot stored{chunk.pages[static_cast<std::size_t>(row / 64)], static_cast<int>(row % 64)};
        if (!(seen.at(chunk.start + t) == stored)) computed.back().push_back(chunk.start + t);
      }
    }
  }
  return computed;
}

std::vector<std::int64_t> Sizes(const std::vector<Positions>& sets) {
  std::vector<std::int64_t> sizes;
  for (const Positions& set : sets) sizes.push_back(static_cast<std::int64_t>(set.size()));
  return sizes;
}

TEST_P(GradualTest, AFilterThatDropsNothingIsOneChoiceToTheBit) {
  Bed bed(GetParam(), kLayers);
  Make(bed);
  const Ids answer = Random(5);
  std::vector<float> want, rows;
  std::vector<Positions> chosen;
  for (const std::vector<double>& filter : {std::vector<double>(), {1}, {1, 1}, {1, 1, 1, 1, 1, 1, 1, 1, 1}}) {
    const auto moved = bed.Moved(prompt_, Chunks(), Options(0.2, filter));
    std::vector<float> got = bed.Logits();
    KVS_ASSERT_OK(moved->Prefill(got.data()));
    const std::vector<Positions> computed = ComputedOf(*moved, kLayers);
    std::vector<float> answered(answer.size() * got.size());
    KVS_ASSERT_OK(moved->Append(answer, answered.data()));
    if (want.empty()) {
      EXPECT_EQ(Sizes(computed), std::vector<std::int64_t>(kLayers, 40));
      want = got;
      rows = answered;
      chosen = computed;
    }
    EXPECT_EQ(got, want) << filter.size();
    EXPECT_EQ(answered, rows) << filter.size();
    EXPECT_EQ(computed, chosen) << filter.size();
    EXPECT_EQ(moved->counts().recomputed, 40);
  }
}

TEST_P(GradualTest, AllOfItIsPlainPrefillToTheBit) {
  Bed bed(GetParam(), kLayers);
  Make(bed);
  const auto moved = bed.Moved(prompt_, Chunks(), Options(1, {1.5, 1.25, 1}));
  std::vector<float> got = bed.Logits();
  KVS_ASSERT_OK(moved->Prefill(got.data()));
  EXPECT_EQ(got, bed.Plain(prompt_));
  EXPECT_TRUE(moved->counts().exact);
}

TEST_P(GradualTest, WhatIsComputedIsCounted) {
  struct Case {
    int layers;
    std::vector<double> filter;
    std::vector<std::int64_t> sizes;  // by layer
    std::int64_t pairs;
    std::int64_t rows;  // of 65 + 3 + 30 fresh tokens and 200 moved ones
  };
  // Two layers of 200 tokens to choose; then passes over layers 0 to 2, 3, and the others.
  for (const Case& c :
       {Case{6, {}, {20, 20, 20, 20, 20, 20}, 400 + 6 * 20, 98 + (2 * 298 + 6 * 20 + 5) / 6},
        Case{6, {1.5, 1.25, 1}, {30, 30, 25, 20, 20, 20}, 400 + 3 * 30 + 25 + 2 * 20, 98 + (2 * 298 + 155 + 5) / 6},
        // From here on the end of the filter is used.
        Case{4, {1.5, 1.25, 1}, {30, 30, 25, 20}, 400 + 3 * 30 + 25, 98 + (2 * 298 + 115 + 3) / 4},
        Case{3, {1.5, 1.25, 1}, {25, 25, 20}, 400 + 3 * 25, 98 + (2 * 298 + 75 + 2) / 3},
        Case{2, {1.5, 1.25, 1}, {20, 20}, 400 + 2 * 20, 98 + (2 * 298 + 40 + 1) / 2},
        Case{1, {1.5, 1.25, 1}, {20}, 200 + 20, 98 + 298 + 20}}) {
    SCOPED_TRACE(std::to_string(c.layers) + " layers, " + std::to_string(c.filter.size()) + " choices");
    Bed bed(GetParam(), c.layers);
    Make(bed);
    const auto moved = bed.Moved(prompt_, Chunks(), Options(0.1, c.filter));
    EXPECT_EQ(moved->RowsToCompute(), c.rows);
    std::vector<float> logits = bed.Logits();
    KVS_ASSERT_OK(moved->Prefill(logits.data()));
    EXPECT_EQ(moved->counts().computed_pairs, c.pairs);
    EXPECT_EQ(moved->counts().chunk_pairs[0] + moved->counts().chunk_pairs[1], c.pairs);
    EXPECT_EQ(moved->counts().recomputed, 20);
    EXPECT_EQ(moved->counts().moved, 180);
    const std::vector<Positions> computed = ComputedOf(*moved, c.layers);
    EXPECT_EQ(Sizes(computed), c.sizes);
    for (std::size_t layer = 1; layer < computed.size(); ++layer) {
      EXPECT_TRUE(std::includes(computed[layer - 1].begin(), computed[layer - 1].end(), computed[layer].begin(),
                                computed[layer].end()));
    }
  }
}

// Few tokens, none at all, and more than there are.
TEST_P(GradualTest, BoundariesOfWhatIsChosen) {
  Bed bed(GetParam(), kLayers);
  Make(bed);
  const auto sizes = [&](double ratio, std::vector<double> filter) {
    const auto moved = bed.Moved(prompt_, Chunks(), Options(ratio, std::move(filter)));
    std::vector<float> logits = bed.Logits();
    EXPECT_TRUE(moved->Prefill(logits.data()).ok());
    return Sizes(ComputedOf(*moved, kLayers));
  };
  using Counts = std::vector<std::int64_t>;
  EXPECT_EQ(sizes(0, {2, 1}), Counts({0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(sizes(0.0049, {2, 1}), Counts({1, 1, 0, 0, 0, 0}));
  EXPECT_EQ(sizes(0.0049, {3, 2, 1, 1}), Counts({2, 2, 1, 0, 0, 0}));
  EXPECT_EQ(sizes(0.9, {2, 1.05, 1}), Counts({200, 200, 189, 180, 180, 180}));
}

TEST_P(GradualTest, StepsChangeNoBit) {
  Bed bed(GetParam(), kLayers);
  Make(bed);
  const Ids answer = Random(3);
  const auto prefill = [&](std::int64_t rows, int steps, std::vector<float>* logits, std::vector<Positions>* computed) {
    const auto moved = bed.Moved(prompt_, Chunks(), Options(0.2, {1.5, 1.25, 1.1, 1}));
    if (rows > 0) moved->Interruptible(rows, [&steps] { return steps-- > 0; });
    *logits = bed.Logits();
    KVS_RETURN_IF_ERROR(moved->Prefill(logits->data()));
    *computed = ComputedOf(*moved, kLayers);
    logits->resize(logits->size() * (answer.size() + 1));
    return moved->Append(answer, logits->data() + logits->size() / (answer.size() + 1));
  };
  std::vector<float> whole, parts;
  std::vector<Positions> computed, again;
  KVS_ASSERT_OK(prefill(0, 0, &whole, &computed));
  EXPECT_EQ(Sizes(computed), std::vector<std::int64_t>({60, 60, 50, 44, 40, 40}));
  for (const std::int64_t rows : {7, 33, 64, 157}) {
    KVS_ASSERT_OK(prefill(rows, 1000, &parts, &again));
    EXPECT_EQ(parts, whole) << rows;
    EXPECT_EQ(again, computed) << rows;
  }
  // Whoever is interrupted says so: while looking, in the first, a middle and the last pass.
  for (const int steps : {0, 4, 7, 10, 13}) {
    EXPECT_EQ(prefill(64, steps, &parts, &again).code(), StatusCode::kCancelled) << steps;
  }
}

// Another end of the prompt changes neither what is chosen before it nor a bit of what is computed there.
TEST_P(GradualTest, WhatComesLaterChangesNothingBefore) {
  Bed bed(GetParam(), kLayers);
  Make(bed);
  std::vector<std::map<std::int64_t, KvSlot>> seen[2];
  std::vector<Positions> computed[2];
  const Ids other = Random(30);
  for (const int i : {0, 1}) {
    Ids prompt = prompt_;
    if (i == 1) std::copy(other.begin(), other.end(), prompt.end() - 30);
    const auto moved = bed.Moved(prompt, Chunks(), Options(0.2, {1.5, 1.25, 1}));
    std::vector<float> logits = bed.Logits();
    KVS_ASSERT_OK(moved->Prefill(logits.data()));
    computed[i] = ComputedOf(*moved, kLayers);
    seen[i] = Seen(*moved, kLayers);
  }
  EXPECT_EQ(computed[0], computed[1]);
  for (const auto& [position, slot] : seen[0].back()) {
    if (position >= static_cast<std::int64_t>(prompt_.size())) continue;
    const bool before = position < static_cast<std::int64_t>(prompt_.size()) - 30;
    EXPECT_EQ(bed.SameRow(slot, seen[1].back().at(position)), before) << position;
  }
}

// By layer, in double precision: what is stored, and what each layer sees of it.
TEST_P(GradualTest, EachLayerSeesWhatItsFilterLeaves) {
  Bed bed(GetParam(), kLayers);
  Make(bed);
  const Ids answer = Random(4);
  const auto moved = bed.Moved(prompt_, Chunks(), Options(0.2, {2, 1.5, 1.25, 1}));
  std::vector<float> got = bed.Logits();
  KVS_ASSERT_OK(moved->Prefill(got.data()));
  const std::vector<Positions> computed = ComputedOf(*moved, kLayers);
  const std::vector<std::int64_t> sizes = Sizes(computed);
  ASSERT_EQ(sizes, std::vector<std::int64_t>({80, 80, 60, 50, 40, 40}));
  const std::size_t vocab = got.size();
  got.resize(vocab * (answer.size() + 1));
  KVS_ASSERT_OK(moved->Append(answer, got.data() + vocab));

  const runtime::ModelConfig& c = bed.model().config();
  testing::TinyModelOptions made;
  made.max_positions = 1024;
  made.layers = kLayers;
  const auto weights = testing::TinyWeights(made);
  const auto reference = [&](const Ids& ids, const reference::LayerVisitor& visitor) {
    return reference::LlamaLogits(c, weights, runtime::RopeFrequencies(c.rope, c.head_dim),
                                  runtime::RopeAttentionFactor(c.rope), ids, visitor);
  };
  // What was computed where the chunks come from, by the position at which they stand now.
  std::vector<std::map<std::int64_t, std::pair<std::vector<double>, std::vector<double>>>> stored(kLayers);
  const auto store = [&](const Ids& run, const MovedChunk& chunk) {
    reference(run, [&](int layer, reference::LayerKv* rows) {
      for (std::int64_t t = 0; t < chunk.length; ++t) {
        const auto row = static_cast<std::size_t>(chunk.base + t);
        stored[static_cast<std::size_t>(layer)][chunk.start + t] = {rows->k[row], rows->v[row]};
      }
    });
  };
  store(first_run_, Chunks()[0]);
  store(second_run_, Chunks()[1]);

  // `choose`: the reference filters by itself; else it is told what to keep.
  const auto blend = [&](bool choose, std::vector<Positions>* kept) {
    Positions left = MovedPositions();
    return reference(Join({prompt_, answer}), [&, left](int layer, reference::LayerKv* rows) mutable {
      const auto at = static_cast<std::size_t>(layer);
      if (layer < kCheck) return;  // K and V depend on token and position alone
      if (choose) {
        std::vector<std::pair<double, std::int64_t>> deviations;
        for (const std::int64_t position : left) {
          const std::vector<double>& v = rows->v[static_cast<std::size_t>(position)];
          double squares = 0;
          for (std::size_t i = 0; i < v.size(); ++i) squares += std::pow(v[i] - stored[at][position].second[i], 2);
          deviations.emplace_back(-squares, position);
        }
        std::sort(deviations.begin(), deviations.end());
        left.clear();
        for (std::int64_t i = 0; i < sizes[at]; ++i) left.push_back(deviations[static_cast<std::size_t>(i)].second);
        std::sort(left.begin(), left.end());
        kept->push_back(left);
      } else {
        left = (*kept)[at];
      }
      for (const std::int64_t position : MovedPositions()) {
        if (std::binary_search(left.begin(), left.end(), position)) continue;
        rows->k[static_cast<std::size_t>(position)] = stored[at][position].first;
        rows->v[static_cast<std::size_t>(position)] = stored[at][position].second;
      }
    });
  };
  const auto distance = [&](const std::vector<double>& want) {
    double worst = 0, scale = 0;
    const std::size_t first = (prompt_.size() - 1) * vocab;
    for (std::size_t i = 0; i < got.size(); ++i) {
      worst = std::max(worst, std::abs(want[first + i] - static_cast<double>(got[i])));
      scale = std::max(scale, std::abs(want[first + i]));
    }
    return worst / scale;
  };
  std::vector<Positions> kept = computed;
  EXPECT_LE(distance(blend(false, &kept)), Tolerance());
  if (GetParam() == kernels::DType::kF32) {
    // The choice too, where rounding does not decide it.
    kept = {computed[0]};
    blend(true, &kept);
    EXPECT_EQ(kept, computed);
    // The tolerance would tell if what is dropped were seen as computed a layer longer.
    kept = computed;
    for (std::size_t layer = kLayers - 1; layer > 1; --layer) kept[layer] = kept[layer - 1];
    EXPECT_GT(distance(blend(false, &kept)), 10 * Tolerance());
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, GradualTest, ::testing::Values(kernels::DType::kF32, kernels::DType::kBf16),
                         [](const auto& dtype) { return std::string(kernels::DTypeName(dtype.param)); });

}  // namespace
}  // namespace kvshare::agentd

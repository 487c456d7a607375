// LayerHook: what it is shown, what it may change, and that nobody else's bits move. In fp32 and bf16, for every RoPE
// kind and with QK-norm.
#include "runtime/layer_hook.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>

#include "kernels/kv_rows.h"
#include "runtime/rope.h"
#include "tests/reference/llama_reference.h"
#include "tests/runtime/selective_harness.h"

namespace kvshare::runtime {
namespace {

using kernels::DType;
using kernels::KvPart;
using kernels::KvSlot;

constexpr std::size_t kVocab = testing::kTinyVocab;

using Kept = std::optional<std::vector<std::int64_t>>;

class FunctionHook final : public LayerHook {
 public:
  using Function = std::function<Kept(int layer, const LayerRows& rows)>;
  explicit FunctionHook(Function function) : function_(std::move(function)) {}
  Kept OnLayer(int layer, const LayerRows& rows) override {
    ++calls;
    return function_(layer, rows);
  }
  int calls = 0;

 private:
  Function function_;
};

std::vector<std::int64_t> Numbers(std::int64_t begin, std::int64_t end) {
  std::vector<std::int64_t> numbers(static_cast<std::size_t>(end - begin));
  std::iota(numbers.begin(), numbers.end(), begin);
  return numbers;
}

class LayerHookTest : public ::testing::TestWithParam<std::tuple<KindOfModel, DType>> {
 protected:
  static constexpr std::int64_t kRows = 100;

  const KindOfModel& kind() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
  Model* model() const { return tiny_.model.get(); }
  std::size_t width() const {
    const kernels::KvLayout layout = model()->kv_layout();
    return static_cast<std::size_t>(layout.num_kv_heads) * static_cast<std::size_t>(layout.head_dim);
  }

  // The prompt as one step over `run`, all logits wanted.
  ForwardBatch Batch(const KvRun& run, LayerHook* hook) const {
    ForwardBatch batch;
    batch.ids = ids_;
    batch.positions = Numbers(0, kRows);
    for (std::int64_t t = 0; t < kRows; ++t) batch.slots.push_back(run.slot(t));
    batch.segments = {run.At(0, kRows)};
    batch.logit_rows = Numbers(0, kRows);
    batch.hook = hook;
    return batch;
  }

  // K and V of token t, side by side.
  std::vector<float> Stored(const KvRun& run, int layer, std::int64_t t) const {
    std::vector<float> row(2 * width());
    kernels::LoadRow(harness_.pages(), layer, KvPart::kKey, run.slot(t), std::span(row).first(width()));
    kernels::LoadRow(harness_.pages(), layer, KvPart::kValue, run.slot(t), std::span(row).last(width()));
    return row;
  }

  const TinyModel tiny_{kind(), dtype()};
  SelectiveHarness harness_{model(), 16};
  const std::vector<TokenId> ids_ = RandomTokens(31, kRows);
  const std::vector<float> plain_ = harness_.Plain(ids_);  // on pages 0 and 1
  const KvRun plain_run_{.pages = {0, 1}, .start = 0, .length = kRows, .first = 0};
};

TEST_P(LayerHookTest, SeesFreshRowsInTheCanonicalFrameAndChangesNothing) {
  const ModelConfig& c = model()->config();
  const auto half = static_cast<std::size_t>(c.head_dim / 2);
  std::vector<float> cos(static_cast<std::size_t>(c.max_positions) * half), sin(cos.size());
  FillRopeTable(c.rope, c.head_dim, c.max_positions, 1, cos.data(), sin.data());
  const kernels::RopeTable rope{cos, sin, c.max_positions, c.head_dim / 2};
  const reference::Qkv oracle = reference::FirstLayerQkv(c, testing::TinyWeights(kind().options), ids_);
  const auto near = [&](const kernels::MatrixView& got, const std::vector<double>& want) {
    ASSERT_EQ(static_cast<std::size_t>(got.rows * got.cols), want.size());
    double largest = 0, worst = 0;
    for (std::int64_t r = 0; r < got.rows; ++r) {
      for (std::int64_t i = 0; i < got.cols; ++i) {
        const double w = want[static_cast<std::size_t>(r * got.cols + i)];
        largest = std::max(largest, std::abs(w));
        worst = std::max(worst, std::abs(w - static_cast<double>(got.row<float>(r)[i])));
      }
    }
    EXPECT_LE(worst, largest * (dtype() == DType::kF32 ? 1e-5 : 0x1p-7));
  };
  const KvRun run = harness_.Take(0, kRows);
  FunctionHook hook([&](int layer, const LayerRows& rows) -> Kept {
    EXPECT_EQ(layer, hook.calls - 1);
    EXPECT_EQ(rows.rows.size(), kRows);
    EXPECT_EQ(rows.segments->size(), 1u);
    EXPECT_EQ(rows.num_heads, c.num_heads);
    EXPECT_EQ(rows.window, c.sliding_window);
    if (layer == 0) {
      near(rows.q, oracle.q);
      near(rows.k, oracle.k);
      near(rows.v, oracle.v);
    }
    const KvRun scratch{.pages = {15}, .start = 0, .length = 64, .first = 0};
    for (std::int64_t t = 0; t < kRows; ++t) {
      EXPECT_EQ(rows.positions[static_cast<std::size_t>(t)], t);
      EXPECT_EQ(rows.slots[static_cast<std::size_t>(t)], run.slot(t));
      // What is stored already is what these rows give.
      std::vector<float> k(rows.k.row<float>(t), rows.k.row<float>(t) + width());
      const std::vector<float> v(rows.v.row<float>(t), rows.v.row<float>(t) + width());
      kernels::StoredKey(rope, t, c.head_dim, k);
      kernels::StoreRow(rows.pages, layer, KvPart::kKey, scratch.slot(0), k);
      kernels::StoreRow(rows.pages, layer, KvPart::kValue, scratch.slot(0), v);
      EXPECT_TRUE(SameBits(Stored(scratch, layer, 0), Stored(run, layer, t))) << "layer " << layer << " token " << t;
    }
    return std::nullopt;
  });
  EXPECT_TRUE(SameBits(harness_.Forward(Batch(run, &hook)), plain_));
  EXPECT_EQ(hook.calls, c.num_layers);
}

TEST_P(LayerHookTest, WhatItWritesIsWhatAttentionReads) {
  const std::vector<KvSlot> nowhere(kRows, kernels::kNoSlot);
  // The step stores nothing; the hook copies what the plain step stored.
  const KvRun run = harness_.Take(0, kRows);
  std::vector<KvSlot> from, to;
  for (std::int64_t t = 0; t < kRows; ++t) {
    from.push_back(plain_run_.slot(t));
    to.push_back(run.slot(t));
  }
  FunctionHook copy([&](int layer, const LayerRows& rows) -> Kept {
    kernels::CopyRows(rows.pages, from, to, layer, layer + 1);
    return std::nullopt;
  });
  ForwardBatch batch = Batch(run, &copy);
  batch.slots = nowhere;
  EXPECT_TRUE(SameBits(harness_.Forward(batch), plain_));

  // One value row of one layer made another: rows before it do not see it, it and later ones do.
  const std::int64_t changed = 70;
  const std::vector<float> loud(width(), 2.0f);
  FunctionHook overwrite([&](int layer, const LayerRows& rows) -> Kept {
    if (layer == 1) kernels::StoreRow(rows.pages, 1, KvPart::kValue, rows.slots[changed], loud);
    return std::nullopt;
  });
  const std::vector<float> got = harness_.Forward(Batch(harness_.Take(0, kRows), &overwrite));
  const auto cut = static_cast<std::size_t>(changed) * kVocab;
  EXPECT_TRUE(SameBits(std::span(got).first(cut), std::span(plain_).first(cut)));
  for (std::size_t row = changed; row < kRows; ++row) {
    EXPECT_FALSE(
        SameBits(std::span(got).subspan(row * kVocab, kVocab), std::span(plain_).subspan(row * kVocab, kVocab)))
        << row;
  }
}

TEST_P(LayerHookTest, RowsThatLeaveDoNotChangeThoseThatStay) {
  // Two prompts in one batch, so that row ranges of segments have to follow. What the leavers would have stored is
  // there.
  const std::vector<std::int64_t> wanted = {1, 30, 31, 64, 99, 100, 150, 199};
  for (const int leave_at : {0, 1}) {
    const KvRun run = harness_.Take(0, kRows);
    for (int layer = 0; layer < 2; ++layer) {
      for (std::int64_t t = 0; t < kRows; ++t) {
        const KvSlot from[] = {plain_run_.slot(t)}, to[] = {run.slot(t)};
        kernels::CopyRows(harness_.pages(), from, to, layer, layer + 1);
      }
    }
    FunctionHook hook([&](int layer, const LayerRows& rows) -> Kept {
      if (layer < leave_at) return std::nullopt;
      if (layer == leave_at) {
        EXPECT_EQ(rows.rows.size(), 2u * kRows);
        return wanted;
      }
      EXPECT_TRUE(std::equal(rows.rows.begin(), rows.rows.end(), wanted.begin(), wanted.end()));
      for (std::size_t i = 0; i < wanted.size(); ++i) EXPECT_EQ(rows.positions[i], wanted[i] % kRows);
      EXPECT_EQ((*rows.segments)[0].row_begin, 0);
      EXPECT_EQ((*rows.segments)[0].row_end, 5);
      EXPECT_EQ((*rows.segments)[1].row_begin, 5);
      EXPECT_EQ((*rows.segments)[1].row_end, 8);
      return std::nullopt;
    });
    ForwardBatch batch = Batch(run, &hook);
    const ForwardBatch second = Batch(plain_run_, nullptr);
    batch.ids.insert(batch.ids.end(), second.ids.begin(), second.ids.end());
    batch.positions.insert(batch.positions.end(), second.positions.begin(), second.positions.end());
    batch.slots.insert(batch.slots.end(), second.slots.begin(), second.slots.end());
    batch.segments.push_back(second.segments[0]);
    batch.segments[1].row_begin = kRows;
    batch.segments[1].row_end = 2 * kRows;
    batch.logit_rows = wanted;
    const std::vector<float> got = harness_.Forward(batch);
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      EXPECT_TRUE(SameBits(std::span(got).subspan(i * kVocab, kVocab),
                           std::span(plain_).subspan(static_cast<std::size_t>(wanted[i] % kRows) * kVocab, kVocab)))
          << "row " << wanted[i] << " after layer " << leave_at;
    }
  }
}

TEST_P(LayerHookTest, ThoseWhoLeftStoreNothingMore) {
  const KvRun run = harness_.Take(0, kRows);
  const std::vector<float> untouched = Stored(run, 1, 5);
  FunctionHook hook([](int layer, const LayerRows&) -> Kept { return layer == 0 ? Kept({20, 99}) : std::nullopt; });
  ForwardBatch batch = Batch(run, &hook);
  batch.logit_rows = {99};
  harness_.Forward(batch);
  for (std::int64_t t = 0; t < kRows; ++t) {
    EXPECT_TRUE(SameBits(Stored(run, 0, t), Stored(plain_run_, 0, t))) << t;
    const bool stayed = t == 20 || t == 99;
    EXPECT_EQ(SameBits(Stored(run, 1, t), untouched), !stayed) << t;
  }
}

// A check layer in one step, as CacheBlend has it: all rows go through scratch slots; at layer 1 some are selected and
// move to private slots, the others' place is taken by stored KV. With KV stored by the plain step, that is the plain
// step, but for the order of sums.
TEST_P(LayerHookTest, ACheckLayerCanTurnRowsIntoStoredSegments) {
  const KvRun scratch = harness_.Take(0, kRows);
  const std::vector<std::int64_t> selected = {3, 17, 18, 50, 63, 64, 88, 99};
  const KvRun mine = harness_.Take(0, static_cast<std::int64_t>(selected.size()));
  std::vector<std::uint64_t> skip(2, 0);
  for (const std::int64_t t : selected) skip[static_cast<std::size_t>(t / 64)] |= std::uint64_t{1} << (t % 64);
  FunctionHook hook([&](int layer, const LayerRows& rows) -> Kept {
    if (layer == 0) return std::nullopt;
    std::vector<KvSlot> from, to;
    for (std::size_t i = 0; i < selected.size(); ++i) {
      KvSlot& slot = rows.slots[static_cast<std::size_t>(selected[i])];
      from.push_back(slot);
      to.push_back(slot = mine.slot(static_cast<std::int64_t>(i)));
    }
    kernels::CopyRows(rows.pages, from, to, 0, 2);
    kernels::KvSegment stored = plain_run_.At(0, kRows), own = mine.At(0, kRows);
    stored.skip = skip;
    own.positions = selected;
    *rows.segments = {stored, own};
    return selected;
  });
  ForwardBatch batch = Batch(scratch, &hook);
  batch.logit_rows = selected;
  const std::vector<float> got = harness_.Forward(batch);
  const std::vector<double> all = OracleLogits(kind(), model()->config(), ids_);
  std::vector<double> want;
  for (const std::int64_t t : selected) {
    const auto row = std::span(all).subspan(static_cast<std::size_t>(t) * kVocab, kVocab);
    want.insert(want.end(), row.begin(), row.end());
  }
  EXPECT_LE(RelativeError(got, want), LogitsTolerance(model()->config(), dtype()));
}

TEST_P(LayerHookTest, NewSlotsHoldFromTheNextLayerOn) {
  const KvRun run = harness_.Take(0, kRows), other = harness_.Take(0, kRows);
  const std::vector<float> untouched = Stored(other, 0, 0);
  FunctionHook hook([&](int layer, const LayerRows& rows) -> Kept {
    if (layer == 0) {
      rows.slots[10] = other.slot(10);
      rows.slots[11] = kernels::kNoSlot;
    }
    return std::nullopt;
  });
  harness_.Forward(Batch(run, &hook));
  EXPECT_TRUE(SameBits(Stored(run, 0, 10), Stored(plain_run_, 0, 10)));
  EXPECT_TRUE(SameBits(Stored(run, 0, 11), Stored(plain_run_, 0, 11)));
  EXPECT_TRUE(SameBits(Stored(other, 0, 10), untouched));
  EXPECT_FALSE(SameBits(Stored(other, 1, 10), untouched));
  EXPECT_TRUE(SameBits(Stored(run, 1, 10), untouched));
  EXPECT_TRUE(SameBits(Stored(run, 1, 11), untouched));
}

TEST_P(LayerHookTest, AStepMayEndEarly) {
  const auto check = [&](const KvRun& run, int layers_stored) {
    const std::vector<float> untouched = Stored(harness_.Take(0, 1), 0, 0);
    for (int layer = 0; layer < 2; ++layer) {
      for (const std::int64_t t : {0, 63, 64, 99}) {
        const std::vector<float> want = layer < layers_stored ? Stored(plain_run_, layer, t) : untouched;
        EXPECT_TRUE(SameBits(Stored(run, layer, t), want)) << "layer " << layer << " token " << t;
      }
    }
  };
  for (const int stop : {0, 1}) {
    const KvRun run = harness_.Take(0, kRows);
    FunctionHook hook([](int, const LayerRows&) -> Kept { return std::nullopt; });
    ForwardBatch batch = Batch(run, &hook);
    batch.logit_rows.clear();
    batch.stop_after_layer = stop;
    harness_.Forward(batch);
    EXPECT_EQ(hook.calls, stop + 1);
    check(run, stop + 1);
  }
  const KvRun run = harness_.Take(0, kRows);
  FunctionHook nobody([](int, const LayerRows&) -> Kept { return std::vector<std::int64_t>(); });
  ForwardBatch batch = Batch(run, &nobody);
  batch.logit_rows.clear();
  harness_.Forward(batch);
  EXPECT_EQ(nobody.calls, 1);
  check(run, 1);
}

// Rows go on in other steps than those that stopped, picked from what a hook kept in reverse.
TEST_P(LayerHookTest, RowsGoOnWhereAStepStopped) {
  const ModelConfig& c = model()->config();
  kernels::Backend& backend = model()->backend();
  const std::int64_t hidden = c.hidden_size, width = std::int64_t{c.num_heads} * c.head_dim;
  const auto memory = backend.Allocate(static_cast<std::size_t>(kRows * (hidden + width)) * sizeof(float));
  ASSERT_TRUE(memory.ok());
  auto* const values = reinterpret_cast<float*>((*memory)->data());
  const kernels::MatrixView residual{values, DType::kF32, kRows, hidden, hidden};
  const kernels::MatrixView queries{values + kRows * hidden, DType::kF32, kRows, width, width};
  for (int stop = 0; stop < c.num_layers; ++stop) {
    const KvRun run = harness_.Take(0, kRows);
    FunctionHook keep([&](int layer, const LayerRows& rows) -> Kept {
      if (layer != stop) return std::nullopt;
      std::vector<std::int32_t> reversed(kRows);
      std::iota(reversed.rbegin(), reversed.rend(), 0);
      backend.Embed({.ids = reversed, .table = rows.x, .out = residual});
      backend.Embed({.ids = reversed, .table = rows.q, .out = queries});
      return std::nullopt;
    });
    ForwardBatch first = Batch(run, &keep);
    first.logit_rows.clear();
    first.stop_after_layer = stop;
    harness_.Forward(first);
    std::vector<float> got;
    for (const auto& [begin, end] : {std::pair<std::int64_t, std::int64_t>(0, 37), {37, 64}, {64, kRows}}) {
      FunctionHook hook([&, begin = begin](int layer, const LayerRows& rows) -> Kept {
        EXPECT_GT(layer, stop);
        EXPECT_EQ(rows.positions.front(), begin);
        return std::nullopt;
      });
      ForwardBatch batch;
      batch.resume_after_layer = stop;
      batch.residual = residual;
      batch.queries = queries;
      for (std::int64_t t = begin; t < end; ++t) {
        batch.ids.push_back(0);
        batch.positions.push_back(t);
        batch.slots.push_back(run.slot(t));
        batch.resumed_rows.push_back(static_cast<std::int32_t>(kRows - 1 - t));
      }
      batch.segments = {run.At(0, end - begin)};
      batch.logit_rows = Numbers(0, end - begin);
      batch.hook = &hook;
      const std::vector<float> part = harness_.Forward(batch);
      EXPECT_EQ(hook.calls, c.num_layers - 1 - stop);
      got.insert(got.end(), part.begin(), part.end());
    }
    EXPECT_TRUE(SameBits(got, plain_)) << "after layer " << stop;
  }
}

// One run has K and V of layer 0 alone, another those of the layers after it; in other layers both hold what nobody may
// read. With a hook that lets rows leave, row ranges of both follow.
TEST_P(LayerHookTest, ASegmentCountsInItsLayers) {
  const KvRun below = harness_.Take(0, kRows), above = harness_.Take(0, kRows);
  const int layers = model()->config().num_layers;
  for (std::int64_t t = 0; t < kRows; ++t) {
    const KvSlot from[] = {plain_run_.slot(t)}, to_below[] = {below.slot(t)}, to_above[] = {above.slot(t)};
    kernels::CopyRows(harness_.pages(), from, to_below, 0, 1);
    kernels::CopyRows(harness_.pages(), from, to_above, 1, layers);
  }
  const std::vector<std::int64_t> wanted = {5, 63, 64, 99};
  FunctionHook leave([&](int layer, const LayerRows&) -> Kept { return layer == 0 ? Kept(wanted) : std::nullopt; });
  for (LayerHook* hook : {static_cast<LayerHook*>(nullptr), static_cast<LayerHook*>(&leave)}) {
    ForwardBatch batch = Batch(below, hook);
    batch.slots.assign(kRows, kernels::kNoSlot);
    batch.segments = {below.At(0, kRows), above.At(0, kRows)};
    batch.segments[0].end_layer = 1;
    batch.segments[1].first_layer = 1;
    if (hook != nullptr) batch.logit_rows = wanted;
    const std::vector<float> got = harness_.Forward(batch);
    for (std::size_t i = 0; i < batch.logit_rows.size(); ++i) {
      const auto row = static_cast<std::size_t>(batch.logit_rows[i]);
      EXPECT_TRUE(SameBits(std::span(got).subspan(i * kVocab, kVocab), std::span(plain_).subspan(row * kVocab, kVocab)))
          << row;
    }
  }
}

std::string Name(const ::testing::TestParamInfo<LayerHookTest::ParamType>& test) {
  const auto& [kind, dtype] = test.param;
  std::string name = kind.name + "_" + std::string(kernels::DTypeName(dtype));
  std::replace(name.begin(), name.end(), '+', '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Kinds, LayerHookTest,
                         ::testing::Combine(::testing::ValuesIn(KindsOfModels()),
                                            ::testing::Values(DType::kF32, DType::kBf16)),
                         Name);

}  // namespace
}  // namespace kvshare::runtime

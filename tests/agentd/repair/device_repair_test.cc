// MovedPrompt on the CUDA backend, emulated or the machine's own: what it chooses there, and what anchors make of a
// chunk, is what the host would have of the same bytes.
#include "agentd/repair/moved_prompt.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "agentd/repair/device_anchors.h"
#include "anchors/anchor_pool.h"
#include "anchors/selection.h"
#include "kernels/attention_mass.h"
#include "kernels/kv_rows.h"
#include "runtime/layer_hook.h"
#include "runtime/rope.h"
#include "tests/agentd/device_bench.h"
#include "tests/testing/status_matchers.h"

namespace kvshare::testing {
namespace {

using kernels::kPageTokens;
using kernels::PageIndex;
using kernels::cuda::Where;
using Ids = std::vector<TokenId>;
using Bytes = std::vector<std::byte>;

// Of rounding: keys are kept in bf16, and rotated once more.
constexpr double kTolerance = 3e-2;

double WorstDifference(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double error = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

kernels::KvSlot SlotOf(const std::vector<PageIndex>& pages, std::int64_t row) {
  return {pages[static_cast<std::size_t>(row / kPageTokens)], static_cast<int>(row % kPageTokens)};
}

class DeviceRepairTest : public ::testing::TestWithParam<Where> {
 protected:
  void SetUp() override {
    if (GetParam() == Where::kDevice && !kernels::ProbeCuda().ok()) {
      GTEST_SKIP() << "no GPU to test on: " << kernels::ProbeCuda().status().message();
    }
  }
  Ids Random(int count) {
    Ids ids(static_cast<std::size_t>(count));
    for (TokenId& id : ids) id = static_cast<TokenId>(random_() % 256);
    return ids;
  }

  // A prompt of 60 tokens, and a chunk of 50 in it that stood behind 20 others.
  struct Moved {
    Ids prompt;
    agentd::MovedChunk chunk;
  };
  Moved OneMovedChunk(DeviceBench& bench) {
    const Ids chunk = Random(50);
    Ids there = Random(20), prompt = Random(9);
    there.insert(there.end(), chunk.begin(), chunk.end());
    prompt.insert(prompt.end(), chunk.begin(), chunk.end());
    prompt.push_back(3);
    Moved moved{std::move(prompt), {.start = 9, .length = 50, .first = 20, .base = 20}};
    bench.Plain(there, &moved.chunk.pages);
    return moved;
  }

  std::mt19937 random_{7};
};

// Copies to the host what it is shown and has the host say how much of their attention the rows from `looking_from` on
// give to each position, layer by layer. Keeps V too.
class HostView final : public runtime::LayerHook {
 public:
  HostView(kernels::Backend* backend, std::int64_t looking_from) : backend_(backend), looking_from_(looking_from) {}

  std::optional<std::vector<std::int64_t>> OnLayer(int layer, const runtime::LayerRows& rows) override {
    kernels::AttentionParams p = rows.attention(layer);
    EXPECT_EQ(p.segments.size(), 1u);
    const std::vector<float> q = Rows(rows.q);
    const auto cos = Copy<float>(p.rope.cos.data(), p.rope.cos.size());
    const auto sin = Copy<float>(p.rope.sin.data(), p.rope.sin.size());
    Bytes pages = Copy<std::byte>(p.pages.base, p.pages.num_pages * p.pages.layout.page_bytes());
    p.q.data = const_cast<float*>(q.data());
    p.q.stride = p.q.cols;
    p.rope.cos = cos;
    p.rope.sin = sin;
    p.pages.base = pages.data();
    std::vector<std::int64_t> looking;
    for (std::int64_t r = 0; r < p.q.rows; ++r) {
      if (p.positions[static_cast<std::size_t>(r)] >= looking_from_) looking.push_back(r);
    }
    mass.emplace_back(static_cast<std::size_t>(p.segments.front().length));
    const std::span<float> all[] = {mass.back()};
    kernels::AttentionMass(p, looking, all);
    v.push_back(Rows(rows.v));
    return std::nullopt;
  }
  std::vector<std::vector<float>> mass, v;  // by layer

 private:
  template <typename T>
  std::vector<T> Copy(const void* from, std::size_t count) {
    std::vector<T> to(count);
    KVS_EXPECT_OK(backend_->Download(to.data(), static_cast<const std::byte*>(from), count * sizeof(T)));
    return to;
  }
  std::vector<float> Rows(const kernels::MatrixView& x) {
    std::vector<float> to;
    for (std::int64_t r = 0; r < x.rows; ++r) {
      const auto row = Copy<float>(x.row<float>(r), static_cast<std::size_t>(x.cols));
      to.insert(to.end(), row.begin(), row.end());
    }
    return to;
  }
  kernels::Backend* const backend_;
  const std::int64_t looking_from_;
};

// In a model of one layer K and V depend on token and position alone, so a chunk computed in any company, at any place,
// is right once it is rotated (as tests/agentd/repair has it, and its tolerance).
TEST_P(DeviceRepairTest, AChunkIsRightWhereItIsPlaced) {
  const auto model = LoadOnCuda(GetParam(), 1);
  DeviceBench bench(model.get());
  const Ids chunk = Random(70);
  Ids there = Random(20), prompt = Random(35);
  there.insert(there.end(), chunk.begin(), chunk.end());
  prompt.insert(prompt.end(), chunk.begin(), chunk.end());
  const Ids question = Random(12);
  prompt.insert(prompt.end(), question.begin(), question.end());
  std::vector<PageIndex> run;
  bench.Plain(there, &run);
  const std::vector<float> want = bench.Plain(prompt);
  double scale = 0;
  for (const float x : want) scale = std::max(scale, std::abs(static_cast<double>(x)));
  for (const ReuseMode mode : {ReuseMode::kRotate, ReuseMode::kEpic}) {
    SCOPED_TRACE(std::string(ReuseModeName(mode)));
    agentd::MovedChunk moved{.start = 35, .length = 70, .base = 20};
    moved.pages = run;
    moved.first = 20;
    agentd::RepairOptions options;
    options.mode = mode;
    agentd::MovedPrompt placed(model.get(), bench.pages(), prompt, {}, {moved}, options, nullptr, "agent");
    EXPECT_TRUE(placed.RunsOnBackend());
    placed.GivePages(bench.Take(placed.PagesNeeded(1)), 1);
    std::vector<float> got(want.size());
    KVS_ASSERT_OK(placed.Prefill(got.data()));
    double worst = 0;
    for (std::size_t i = 0; i < got.size(); ++i) {
      const double error = std::abs(static_cast<double>(got[i]) - static_cast<double>(want[i]));
      if (!(error <= worst)) worst = error;
    }
    EXPECT_LE(worst, kTolerance * scale);
    EXPECT_GT(placed.counts().moved, 50);
  }
}

// What is stored is right, but for the V of some tokens in the layer that is looked at. The host makes its scores of
// what it copies of plain prefill, and of what is stored; a mode computes those tokens that lead by them. In a model of
// one layer the chunks are moved; in one of several they stay where they were, for elsewhere nothing would be right,
// and all is computed in small steps.
TEST_P(DeviceRepairTest, TheTokensThatTheHostWouldChooseAreComputed) {
  for (const int layers : {1, 3}) {
    const int check = std::min(1, layers - 1);
    const auto model = LoadOnCuda(GetParam(), layers);
    DeviceBench bench(model.get());
    Ids prompt = Random(15);
    std::vector<agentd::MovedChunk> chunks;
    for (const int length : {58, 33}) {
      const Ids chunk = Random(length), other = Random(5);
      const auto start = static_cast<std::int64_t>(prompt.size());
      chunks.push_back({.start = start, .length = length, .base = start});
      prompt.insert(prompt.end(), chunk.begin(), chunk.end());
      prompt.insert(prompt.end(), other.begin(), other.end());
    }
    HostView host(&model->backend(), chunks[1].start + chunks[1].length);
    std::vector<PageIndex> plain, again;
    const std::vector<float> want = bench.Plain(prompt, &plain, &host);
    if (layers > 1) bench.Plain(prompt, &again);
    struct Token {
      std::int64_t position;
      kernels::KvSlot stored;
    };
    std::vector<Token> moved;
    for (agentd::MovedChunk& chunk : chunks) {
      if (layers == 1) {  // behind 20 others
        Ids there = Random(20);
        there.insert(there.end(), prompt.begin() + chunk.start, prompt.begin() + chunk.start + chunk.length);
        bench.Plain(there, &chunk.pages);
        chunk.base = 20;
      } else {
        chunk.pages.assign(again.begin() + chunk.base / kPageTokens, again.end());
      }
      chunk.first = static_cast<int>(chunk.base % kPageTokens);
      for (std::int64_t t = 0; t < chunk.length; ++t) {
        moved.push_back({chunk.start + t, SlotOf(chunk.pages, chunk.first + t)});
      }
    }
    for (std::size_t token = 3; token < moved.size(); token += 5) bench.TurnV(moved[token].stored, check);
    const auto score = [&](const Token& token, ReuseMode mode) {
      const auto position = static_cast<std::size_t>(token.position);
      if (mode == ReuseMode::kAuto) {
        float mass = 0;
        for (int layer = layers / 2; layer < layers; ++layer)
          mass += host.mass[static_cast<std::size_t>(layer)][position];
        return mass;
      }
      const auto at = static_cast<std::size_t>(check);
      const std::vector<float> stored = bench.V(token.stored, check);
      const auto fresh = std::span(host.v[at]).subspan(position * stored.size(), stored.size());
      const float squares = kernels::Deviation(fresh, stored).squares;
      return mode == ReuseMode::kCacheBlend ? squares : std::sqrt(squares) * host.mass[at][position];
    };
    for (const ReuseMode mode : {ReuseMode::kAuto, ReuseMode::kCacheBlend, ReuseMode::kDhd}) {
      SCOPED_TRACE(std::string(ReuseModeName(mode)) + ", " + std::to_string(layers) + " layers");
      std::vector<float> scores;
      for (const Token& token : moved) scores.push_back(score(token, mode));
      // As many as lead clearly.
      std::vector<float> sorted = scores;
      std::sort(sorted.begin(), sorted.end(), std::greater<>());
      std::size_t count = 6;
      for (std::size_t i = 6; i < 16; ++i) {
        if (sorted[i - 1] / sorted[i] > sorted[count - 1] / sorted[count]) count = i;
      }
      ASSERT_GT(sorted[count - 1], 1.02f * sorted[count]);

      agentd::RepairOptions options;
      options.mode = mode;
      const double half = mode == ReuseMode::kAuto ? -0.5 : 0.5;  // which rounds up, the others down
      options.recompute_ratio = (static_cast<double>(count) + half) / static_cast<double>(moved.size());
      agentd::MovedPrompt placed(model.get(), bench.pages(), prompt, {}, chunks, options, nullptr, "agent");
      ASSERT_TRUE(placed.RunsOnBackend());
      if (layers > 1) placed.Interruptible(40, [] { return true; });
      const std::vector<PageIndex> own = bench.Take(placed.PagesNeeded(1));
      placed.GivePages(own, 1);
      std::vector<float> got(want.size());
      KVS_ASSERT_OK(placed.Prefill(got.data()));
      EXPECT_FALSE(placed.counts().exact);
      EXPECT_EQ(placed.counts().recomputed, static_cast<std::int64_t>(count));
      // A page for the lead, one for what is fresh, then what was chosen. In layer 0 it is what plain prefill computes.
      std::vector<std::int64_t> chosen;
      for (std::size_t i = 0; i < count; ++i) {
        const Bytes row = bench.Row({own[2], static_cast<int>(i)}, 0);
        for (std::size_t token = 0; token < moved.size(); ++token) {
          if (bench.Row(SlotOf(plain, moved[token].position), 0) == row) {
            chosen.push_back(static_cast<std::int64_t>(token));
          }
        }
      }
      EXPECT_EQ(chosen, anchors::LargestScores(scores, static_cast<std::int64_t>(count)));
    }
  }
}

// Gradual filtering: one that drops nothing is one choice, one that drops does not depend on steps, to the bit.
TEST_P(DeviceRepairTest, TokensAreDroppedFromLayerToLayer) {
  const auto model = LoadOnCuda(GetParam(), 4);
  DeviceBench bench(model.get());
  const Moved moved = OneMovedChunk(bench);
  std::vector<float> got(static_cast<std::size_t>(model->config().vocab_size));
  const auto prefill = [&](std::vector<double> filter, std::int64_t rows, std::int64_t pairs) {
    agentd::RepairOptions options;
    options.mode = ReuseMode::kCacheBlend;
    options.recompute_ratio = 0.2;
    options.filter = std::move(filter);
    agentd::MovedPrompt placed(model.get(), bench.pages(), moved.prompt, {}, {moved.chunk}, options, nullptr, "agent");
    EXPECT_TRUE(placed.RunsOnBackend());
    if (rows > 0) placed.Interruptible(rows, [] { return true; });
    placed.GivePages(bench.Take(placed.PagesNeeded(1)), 1);
    KVS_EXPECT_OK(placed.Prefill(got.data()));
    EXPECT_EQ(placed.counts().computed_pairs, pairs);
    EXPECT_EQ(placed.counts().recomputed, 10);
    return got;
  };
  const std::vector<float> once = prefill({}, 0, 2 * 50 + 4 * 10);
  EXPECT_EQ(prefill({1, 1, 1}, 0, 2 * 50 + 4 * 10), once);
  const std::vector<float> gradual = prefill({2, 1.5, 1}, 0, 2 * 50 + 3 * 20 + 15);
  EXPECT_NE(gradual, once);
  EXPECT_EQ(prefill({2, 1.5, 1}, 25, 2 * 50 + 3 * 20 + 15), gradual);
}

// Recomputing all is plain prefill, to the bit.
TEST_P(DeviceRepairTest, RecomputingAllIsPlainPrefill) {
  const auto model = LoadOnCuda(GetParam(), 2);
  DeviceBench bench(model.get());
  const Moved moved = OneMovedChunk(bench);
  const std::vector<float> want = bench.Plain(moved.prompt);
  for (const ReuseMode mode : {ReuseMode::kCacheBlend, ReuseMode::kDhd, ReuseMode::kAuto}) {
    agentd::RepairOptions options;
    options.mode = mode;
    agentd::MovedPrompt placed(model.get(), bench.pages(), moved.prompt, {}, {moved.chunk}, options, nullptr, "agent");
    placed.GivePages(bench.Take(placed.PagesNeeded(1)), 1);
    std::vector<float> got(want.size());
    KVS_ASSERT_OK(placed.Prefill(got.data()));
    EXPECT_NE(got, want) << ReuseModeName(mode);
    KVS_ASSERT_OK(placed.Recompute(got.data()));
    EXPECT_EQ(got, want) << ReuseModeName(mode);
  }
}

// KVCOMM. Prompts that were computed teach; then content that is much alike is corrected where it lies, to what the
// host's pool makes of the same bytes, and is nearer to the truth than as it was stored.
TEST_P(DeviceRepairTest, AnchorsCorrectWhatIsLikeThem) {
  constexpr int kLayers = 3;
  constexpr std::int64_t kBase = 20, kStart = 40;
  const auto model = LoadOnCuda(GetParam(), kLayers);
  DeviceBench bench(model.get());
  anchors::AnchorPool anchors({.entropy_gate = 1.0});
  agentd::DeviceAnchors there_too(&model->backend(), std::size_t{1} << 20);
  const Ids before = Random(kBase), head = Random(kStart), tail = Random(20), alike = Random(59);
  Ids second;
  const auto rope = [&] {
    const runtime::ModelConfig& c = model->config();
    const auto values = static_cast<std::size_t>(c.max_positions * c.head_dim / 2);
    std::vector<float> table(2 * values);
    runtime::FillRopeTable(c.rope, c.head_dim, c.max_positions, 1, table.data(), table.data() + values);
    return std::pair{table, values};
  }();
  const kernels::RopeTable table{std::span(rope.first).first(rope.second), std::span(rope.first).subspan(rope.second),
                                 model->config().max_positions, model->config().head_dim / 2};
  // Of tokens whose first lies in row `first` of pages[0] and was rotated at `position`: as anchors have them.
  const auto block = [&](const std::vector<PageIndex>& pages, int first, std::int64_t position, std::int64_t tokens) {
    anchors::KvBlock rows(kLayers, tokens, model->kv_layout().head_dim);
    for (std::int64_t t = 0; t < tokens; ++t) {
      Bytes page = bench.Page(pages[static_cast<std::size_t>((first + t) / kPageTokens)]);
      const kernels::KvPages copy{page.data(), 1, model->kv_layout()};
      for (int layer = 0; layer < kLayers; ++layer) {
        const kernels::KvSlot slot{0, static_cast<int>((first + t) % kPageTokens)};
        kernels::LoadRow(copy, layer, kernels::KvPart::kKey, slot, rows.row(layer, 0, t));
        kernels::CanonicalKey(table, position + t, model->config().head_dim, rows.row(layer, 0, t));
        kernels::LoadRow(copy, layer, kernels::KvPart::kValue, slot, rows.row(layer, 1, t));
      }
    }
    return rows;
  };
  std::vector<float> got(static_cast<std::size_t>(model->config().vocab_size));
  for (int i = 0; i < 3; ++i) {
    SCOPED_TRACE("content " + std::to_string(i));
    // The last is shorter than its anchors, and more like the second than like the first.
    Ids content = alike, there = before, prompt = head;
    for (const TokenId id : Random(7 - i)) content.push_back(id);
    if (i == 2) std::copy_n(second.begin(), 61, content.begin());
    if (i == 1) second = content;
    const auto tokens = static_cast<std::int64_t>(content.size());
    for (Ids* ids : {&there, &prompt}) ids->insert(ids->end(), content.begin(), content.end());
    prompt.insert(prompt.end(), tail.begin(), tail.end());
    agentd::MovedChunk chunk{.start = kStart, .length = tokens, .base = kBase};
    bench.Plain(there, &chunk.pages);
    chunk.first = kBase;
    chunk.placeholder = "p";
    chunk.content = std::to_string(i);
    const auto place = [&](ReuseMode mode, std::vector<PageIndex>* own) {
      agentd::RepairOptions options;
      options.mode = mode;
      auto placed =
          std::make_unique<agentd::MovedPrompt>(model.get(), bench.pages(), prompt, agentd::MovedPrompt::Prefix{},
                                                std::vector{chunk}, options, &anchors, "reader", &there_too);
      EXPECT_TRUE(placed->RunsOnBackend());
      *own = bench.Take(placed->PagesNeeded(1));
      placed->GivePages(*own, 1);
      KVS_EXPECT_OK(placed->Prefill(got.data()));
      return placed;
    };
    std::vector<PageIndex> own;
    const std::vector<float> want = bench.Plain(prompt);
    anchors::AnchorPool by_host_alone = anchors;
    const auto placed = place(ReuseMode::kKvcomm, &own);
    const anchors::KvBlock stored = block(chunk.pages, chunk.first, kBase, tokens);
    if (i < 2) {  // one anchor is not enough
      EXPECT_EQ(got, want);
      ASSERT_TRUE(placed->HasLesson());
      placed->Teach(own);
      const std::vector<anchors::Anchor> known = anchors.Snapshot();
      ASSERT_EQ(known.size(), static_cast<std::size_t>(i) + 1);
      anchors::AnchorPool host;
      host.Register("p", "reader", chunk.content, anchors::RowsOf(stored),
                    anchors::RowsOf(block(own, kStart, kStart, tokens)));
      const anchors::Anchor expected = host.Snapshot().front();
      EXPECT_EQ(*known.back().base, *expected.base);
      EXPECT_EQ(*known.back().offsets.at("reader"), *expected.offsets.at("reader"));
      continue;
    }
    EXPECT_FALSE(placed->counts().exact);
    EXPECT_EQ(placed->counts().moved, tokens);
    EXPECT_EQ(placed->counts().computed_pairs, 0);
    EXPECT_TRUE(by_host_alone.Shareable("p", stored));
    for (std::size_t a = 0; a < 2; ++a) {
      EXPECT_EQ(anchors.Snapshot()[a].used, static_cast<std::int64_t>(a)) << "anchor " << a;
      EXPECT_EQ(by_host_alone.Snapshot()[a].used, static_cast<std::int64_t>(a)) << "anchor " << a;
    }
    const double corrected_error = WorstDifference(got, want);
    // A page for the lead, one for what is fresh, then what was corrected.
    const anchors::KvBlock corrected = block({own[2]}, 0, kStart, tokens);
    anchors::KvBlock by_host = stored;
    anchors.Correct("p", "reader", &by_host);
    double largest = 0;
    for (const float x : by_host.values) largest = std::max(largest, std::abs(static_cast<double>(x)));
    EXPECT_LE(WorstDifference(corrected.values, by_host.values), largest * 0x1p-7) << "of bf16";
    EXPECT_GT(WorstDifference(stored.values, by_host.values), largest * 0x1p-4) << "nothing was corrected";
    // Anchors that are on the device already do the same.
    const std::vector<float> first_time = got;
    const std::size_t bytes = there_too.bytes();
    EXPECT_GE(bytes, 4 * 2 * kLayers * tokens * model->kv_layout().head_dim);
    place(ReuseMode::kKvcomm, &own);
    EXPECT_EQ(got, first_time);
    EXPECT_EQ(there_too.bytes(), bytes);
    place(ReuseMode::kRotate, &own);
    EXPECT_LT(corrected_error, WorstDifference(got, want));
  }
}

INSTANTIATE_TEST_SUITE_P(Cuda, DeviceRepairTest, ::testing::Values(Where::kEmulatedWalk, Where::kDevice),
                         kernels::cuda::WhereName);

}  // namespace
}  // namespace kvshare::testing

// The selective forward's gates (docs/design/selective-forward.md): chunks that stand elsewhere, rows computed here and
// there, for every RoPE kind, with QK-norm and with a window, in fp32 and bf16.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <numeric>

#include "kernels/kv_rows.h"
#include "runtime/rope.h"
#include "tests/runtime/selective_harness.h"

namespace kvshare::runtime {
namespace {

using kernels::DType;
using kernels::kPageTokens;
using kernels::KvPart;
using kernels::KvSegment;

constexpr std::size_t kVocab = testing::kTinyVocab;

class SelectiveTest : public ::testing::TestWithParam<std::tuple<KindOfModel, DType>> {
 protected:
  const KindOfModel& kind() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
  Model* model() const { return tiny_.model.get(); }
  double tolerance() const { return LogitsTolerance(model()->config(), dtype()); }

  const TinyModel tiny_{kind(), dtype()};
};

std::span<const float> RowOf(const std::vector<float>& logits, std::size_t row) {
  return std::span(logits).subspan(row * kVocab, kVocab);
}

std::vector<std::int64_t> Numbers(std::int64_t begin, std::int64_t end) {
  std::vector<std::int64_t> numbers(static_cast<std::size_t>(end - begin));
  std::iota(numbers.begin(), numbers.end(), begin);
  return numbers;
}

std::vector<TokenId> Joined(std::initializer_list<std::vector<TokenId>> parts) {
  std::vector<TokenId> all;
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// Rows of one request that lie side by side in private pages, wherever in the prompt they stand.
struct PrivateRows {
  KvRun run;
  std::vector<std::int64_t> positions;

  PrivateRows(SelectiveHarness* harness, std::vector<std::int64_t> at)
      : run(harness->Take(0, static_cast<std::int64_t>(at.size()))), positions(std::move(at)) {}

  KvSegment Segment(std::int64_t rows) const {
    KvSegment s = run.At(0, rows);
    s.shift = 0;
    s.positions = positions;
    return s;
  }
};

// Computes rows [begin, end) of `rows`, all of whose logits it returns, over `chunks` and the rows themselves.
std::vector<float> ComputeRows(SelectiveHarness* harness, std::span<const TokenId> prompt, const PrivateRows& rows,
                               std::vector<KvSegment> chunks, std::size_t begin, std::size_t end) {
  const auto count = static_cast<std::int64_t>(end - begin);
  ForwardBatch batch;
  for (std::size_t i = begin; i < end; ++i) {
    batch.ids.push_back(prompt[static_cast<std::size_t>(rows.positions[i])]);
    batch.positions.push_back(rows.positions[i]);
    batch.slots.push_back(rows.run.slot(static_cast<std::int64_t>(i)));
    batch.logit_rows.push_back(static_cast<std::int64_t>(i - begin));
  }
  for (KvSegment& s : chunks) s.row_end = count;
  batch.segments = std::move(chunks);
  batch.segments.push_back(rows.Segment(count));
  return harness->Forward(batch);
}

// Gate 1 and 7. Only distances count, so the oracle of the prompt from position 0 is that of any place.
TEST_P(SelectiveTest, AChunkAtAnotherPositionIsAsIfComputedThere) {
  const std::vector<TokenId> chunk = RandomTokens(1, 90), suffix = RandomTokens(2, 40);
  const std::vector<double> all = OracleLogits(kind(), model()->config(), Joined({chunk, suffix}));
  const auto want = std::span(all).subspan(chunk.size() * kVocab);
  struct Move {
    std::int64_t base, placed;
    int first;
  };
  // The last base makes queries look further back than the table of angles reaches.
  double worst = 0;
  for (const Move m : {Move{0, 0, 0}, {0, 700, 0}, {700, 0, 17}, {37, 1500, 63}, {1500, 3, 1}, {1958, 0, 40}}) {
    SelectiveHarness harness(model(), 8);
    const KvRun stored = harness.Compute(chunk, m.base, m.first);
    std::vector<TokenId> prompt(static_cast<std::size_t>(m.placed) + chunk.size());
    prompt.insert(prompt.end(), suffix.begin(), suffix.end());
    const auto begin = static_cast<std::int64_t>(prompt.size() - suffix.size());
    const PrivateRows rows(&harness, Numbers(begin, begin + 40));
    const auto got = ComputeRows(&harness, prompt, rows, {stored.At(m.placed, 40)}, 0, suffix.size());
    const double error = RelativeError(got, want);
    EXPECT_LE(error, tolerance()) << m.base << " -> " << m.placed;
    worst = std::max(worst, error);
  }
  std::printf("  worst %.1e of the largest logit (allowed %.1e)\n", worst, tolerance());
}

// Gate 1 for the stored rows themselves.
TEST_P(SelectiveTest, AStoredKeyMovesToWhatWouldHaveBeenStoredThere) {
  const ModelConfig& c = model()->config();
  const auto half = static_cast<std::size_t>(c.head_dim / 2);
  std::vector<float> cos(static_cast<std::size_t>(c.max_positions) * half), sin(cos.size());
  FillRopeTable(c.rope, c.head_dim, c.max_positions, 1, cos.data(), sin.data());
  const kernels::RopeTable rope{cos, sin, c.max_positions, c.head_dim / 2};
  const std::vector<TokenId> chunk = RandomTokens(3, 70);
  SelectiveHarness harness(model(), 8);
  const KvRun base = harness.Compute(chunk, 41), direct = harness.Compute(chunk, 1300);
  const auto width = static_cast<std::size_t>(c.num_kv_heads) * static_cast<std::size_t>(c.head_dim);
  std::vector<float> moved(width), there(width), canonical(width);
  const double unit = dtype() == DType::kF32 ? 1e-5 : 0x1p-7;  // two roundings of two parts of a pair
  for (std::int64_t t = 0; t < 70; ++t) {
    kernels::LoadRow(harness.pages(), 0, KvPart::kValue, base.slot(t), moved);
    kernels::LoadRow(harness.pages(), 0, KvPart::kValue, direct.slot(t), there);
    EXPECT_TRUE(SameBits(moved, there)) << "values do not depend on the position";
    kernels::LoadRow(harness.pages(), 0, KvPart::kKey, base.slot(t), moved);
    kernels::LoadRow(harness.pages(), 0, KvPart::kKey, direct.slot(t), there);
    float largest = 0;
    for (const float v : there) largest = std::max(largest, std::abs(v));
    canonical = moved;
    kernels::MoveKey(rope, 1300 - 41, c.head_dim, moved);
    kernels::CanonicalKey(rope, 41 + t, c.head_dim, canonical);
    kernels::StoredKey(rope, 1300 + t, c.head_dim, canonical);
    for (std::size_t i = 0; i < width; ++i) {
      EXPECT_LE(std::abs(moved[i] - there[i]), unit * largest) << "token " << t;
      EXPECT_LE(std::abs(canonical[i] - there[i]), unit * largest) << "token " << t;
    }
  }
}

// Gates 3 and 4, and shift 0.
TEST_P(SelectiveTest, AChunkAtItsOwnPlaceAndContextGivesTheSameBits) {
  const std::vector<TokenId> prompt = RandomTokens(4, kernels::kSplitTokens + 50);
  SelectiveHarness harness(model(), 60);
  const std::vector<float> whole = harness.Plain(prompt);
  const auto want = std::span(whole).subspan(kernels::kSplitTokens * kVocab);
  const KvRun stored = harness.Compute(std::span(prompt).first(kernels::kSplitTokens), 0, 0, 300);
  const std::vector<std::uint64_t> none(stored.pages.size(), 0);
  const std::vector<std::int64_t> places = Numbers(0, stored.length);
  for (const bool explicit_positions : {false, true}) {
    for (const bool empty_skips : {false, true}) {
      KvSegment s = stored.At(0, 50);
      ASSERT_EQ(s.shift, 0);
      if (explicit_positions) s.positions = places;
      if (empty_skips) s.skip = none;
      const PrivateRows rows(&harness, Numbers(kernels::kSplitTokens, kernels::kSplitTokens + 50));
      EXPECT_TRUE(SameBits(ComputeRows(&harness, prompt, rows, {s}, 0, 50), want));
    }
  }
}

// Gates 2 and 6: chunks in another order than they were stored in, all of their rows computed again.
TEST_P(SelectiveTest, AllRowsSelectedIsThePlainForward) {
  const std::vector<TokenId> a = RandomTokens(5, 60), b = RandomTokens(6, 80), c = RandomTokens(7, 45);
  const std::vector<TokenId> prompt = Joined({c, a, b, RandomTokens(8, 20)});
  const auto n = static_cast<std::int64_t>(prompt.size());
  SelectiveHarness harness(model(), 60);
  const std::vector<float> want = harness.Plain(prompt);
  const KvRun runs[] = {harness.Compute(c, 500), harness.Compute(a, 0, 9), harness.Compute(b, 37)};
  const std::vector<std::uint64_t> all(2, ~std::uint64_t{0});
  std::vector<KvSegment> chunks;
  std::int64_t placed = 0;
  for (const KvRun& run : runs) {
    chunks.push_back(run.At(placed, 0));
    chunks.back().skip = std::span(all).first(run.pages.size());
    placed += run.length;
  }
  for (const std::size_t piece : {std::size_t{205}, std::size_t{70}, std::size_t{1}}) {
    const PrivateRows rows(&harness, Numbers(0, n));
    for (std::size_t begin = 0; begin < prompt.size(); begin += piece) {
      const std::size_t end = std::min(begin + piece, prompt.size());
      // Rows that come later are there, but not yet written: nobody may look at them.
      const auto got = ComputeRows(&harness, prompt, rows, chunks, begin, end);
      ASSERT_TRUE(SameBits(got, std::span(want).subspan(begin * kVocab, (end - begin) * kVocab))) << begin;
    }
  }
}

// The same rows in two private runs are the same sum in another order.
TEST_P(SelectiveTest, RowsScatteredOverRunsAgreeWithTheOracle) {
  const std::vector<TokenId> prompt = RandomTokens(9, 150);
  SelectiveHarness harness(model(), 16);
  std::vector<std::int64_t> odd, even;
  for (std::int64_t p = 0; p < 150; ++p) (p * 7 % 5 < 2 ? odd : even).push_back(p);
  const PrivateRows first(&harness, odd), second(&harness, even);
  ForwardBatch batch;
  std::map<std::int64_t, kernels::KvSlot> slots;
  for (std::size_t i = 0; i < odd.size(); ++i) slots[odd[i]] = first.run.slot(static_cast<std::int64_t>(i));
  for (std::size_t i = 0; i < even.size(); ++i) slots[even[i]] = second.run.slot(static_cast<std::int64_t>(i));
  for (const auto& [position, slot] : slots) {
    batch.ids.push_back(prompt[static_cast<std::size_t>(position)]);
    batch.positions.push_back(position);
    batch.slots.push_back(slot);
  }
  batch.logit_rows = Numbers(0, 150);
  batch.segments = {first.Segment(150), second.Segment(150)};
  EXPECT_LE(RelativeError(harness.Forward(batch), OracleLogits(kind(), model()->config(), prompt)), tolerance());
}

// Gate 5, over moved chunks of which some rows are computed again.
TEST_P(SelectiveTest, NothingLaterReachesAnEarlierRow) {
  const std::vector<TokenId> a = RandomTokens(10, 90), b = RandomTokens(11, 100);
  const std::vector<TokenId> prompt = Joined({a, b, RandomTokens(12, 30)});
  SelectiveHarness harness(model(), 200);
  const KvRun runs[] = {harness.Compute(a, 300, 5), harness.Compute(b, 0)};
  const auto compute = [&](const std::vector<TokenId>& ids, std::vector<std::int64_t> positions, bool with_b = true) {
    std::vector<std::uint64_t> skips[2];
    for (int c = 0; c < 2; ++c) skips[c].assign(runs[c].pages.size(), 0);
    for (const std::int64_t p : positions) {
      if (p >= 190) continue;
      const int c = p < 90 ? 0 : 1;
      const std::int64_t row = runs[c].first + p - (c == 0 ? 0 : 90);
      skips[c][static_cast<std::size_t>(row / kPageTokens)] |= std::uint64_t{1} << (row % kPageTokens);
    }
    std::vector<KvSegment> chunks = {runs[0].At(0, 0), runs[1].At(90, 0)};
    for (int c = 0; c < 2; ++c) chunks[static_cast<std::size_t>(c)].skip = skips[c];
    if (!with_b) chunks.pop_back();
    const PrivateRows rows(&harness, std::move(positions));
    return ComputeRows(&harness, ids, rows, chunks, 0, rows.positions.size());
  };
  std::vector<std::int64_t> selected;
  for (std::int64_t p = 0; p < 220; ++p) {
    if (p >= 190 || p * 13 % 7 == 3) selected.push_back(p);
  }
  const std::vector<float> want = compute(prompt, selected);
  // Rows before `from` have the bits of `want`, at least one of the others has not.
  const auto check = [&](const std::vector<float>& got, std::int64_t from, const char* what) {
    bool changed = false;
    for (std::size_t i = 0; i < selected.size(); ++i) {
      const bool same = SameBits(RowOf(got, i), RowOf(want, i));
      EXPECT_TRUE(same || selected[i] >= from) << what << ": row " << selected[i];
      changed |= !same;
    }
    EXPECT_TRUE(changed) << what;
  };
  for (const std::size_t at : {std::size_t{20}, std::size_t{45}}) {
    std::vector<TokenId> other = prompt;
    TokenId& id = other[static_cast<std::size_t>(selected[at])];
    id = (id + 1) % static_cast<TokenId>(kVocab);
    check(compute(other, selected), selected[at], "another token");
  }
  // One more row is selected: it takes its place among the private ones.
  std::vector<std::int64_t> more = selected;
  const std::int64_t extra = selected[15] + 1;
  more.insert(more.begin() + 16, extra);
  std::vector<float> got = compute(prompt, more);
  got.erase(got.begin() + 16 * kVocab, got.begin() + 17 * kVocab);
  check(got, extra, "a row more");
  check(compute(prompt, selected, false), 90, "the later chunk absent");
  // Other values stored in the later chunk.
  const std::vector<float> loud(static_cast<std::size_t>(model()->kv_layout().num_kv_heads) *
                                    static_cast<std::size_t>(model()->kv_layout().head_dim),
                                3.0f);
  for (int layer = 0; layer < 2; ++layer) {
    for (std::int64_t t = 50; t < 100; ++t) {
      kernels::StoreRow(harness.pages(), layer, KvPart::kValue, runs[1].slot(t), loud);
    }
  }
  check(compute(prompt, selected), 140, "other values");
}

std::string Name(const ::testing::TestParamInfo<SelectiveTest::ParamType>& test) {
  const auto& [kind, dtype] = test.param;
  std::string name = kind.name + "_" + std::string(kernels::DTypeName(dtype));
  std::replace(name.begin(), name.end(), '+', '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Kinds, SelectiveTest,
                         ::testing::Combine(::testing::ValuesIn(KindsOfModels()),
                                            ::testing::Values(DType::kF32, DType::kBf16)),
                         Name);

}  // namespace
}  // namespace kvshare::runtime

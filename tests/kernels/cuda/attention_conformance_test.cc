// CUDA attention against the double-precision oracle, and its bit contract; in the emulator always, on a GPU where
// there is one.
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "tests/kernels/cuda/attention_case.h"
#include "tests/kernels/cuda/backends.h"

namespace kvshare::kernels::cuda {
namespace {

constexpr AttentionShape k64{8, 2, 64, 32};
constexpr AttentionShape k128{4, 1, 128, 64};
constexpr AttentionShape kPartlyRotated{6, 2, 64, 20};  // 3 query heads a group: tiles end within a token
constexpr AttentionShape kUnrotated{2, 2, 128, 0};

std::vector<std::int64_t> Range(std::int64_t begin, std::int64_t end) {
  std::vector<std::int64_t> x(static_cast<std::size_t>(end - begin));
  std::iota(x.begin(), x.end(), begin);
  return x;
}

class CudaAttentionTest : public CudaTest {
 protected:
  // The rows of `part` have the bits that they have in `whole`.
  void ExpectSameRows(const std::vector<float>& whole, const std::vector<float>& part,
                      const std::vector<std::int64_t>& rows, const AttentionShape& shape) {
    const auto width = static_cast<std::size_t>(shape.num_heads * shape.head_dim);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      ASSERT_EQ(std::memcmp(part.data() + i * width, whole.data() + static_cast<std::size_t>(rows[i]) * width,
                            width * sizeof(float)),
                0)
          << "row " << rows[i];
    }
  }
};

TEST_P(CudaAttentionTest, CausalPrefillIsNearOracle) {
  for (const AttentionShape& shape : {k64, k128}) {
    AttentionCase batch(shape, Range(0, 70), 1);
    batch.Add({.length = 70, .row_end = 70});
    ExpectNearOracle(batch, batch.Run(*backend_));
  }
}

TEST_P(CudaAttentionTest, RandomSegmentsAreNearOracle) {
  for (int i = 0; i < Repeats(4); ++i) {
    SCOPED_TRACE("seed " + std::to_string(100 + i));
    const AttentionShape shapes[] = {k64, kPartlyRotated, k128, kUnrotated};
    AttentionCase batch = RandomCase(shapes[i % 4], static_cast<std::uint64_t>(100 + i));
    ExpectNearOracle(batch, batch.Run(*backend_));
  }
}

TEST_P(CudaAttentionTest, LongContextAcrossSplitsIsNearOracle) {
  AttentionCase batch(k64, {0, 63, 64, 1023, 1024, 1025, 2047, 2048, 2149}, 2);
  batch.Add({.length = 2150, .row_end = 9});
  ExpectNearOracle(batch, batch.Run(*backend_));
}

// Scores grow along the keys, so that the running reference moves in every page.
TEST_P(CudaAttentionTest, ScoresThatGrowAreNearOracle) {
  AttentionCase batch(k64, Range(150, 160), 3);
  KeyRun& run = batch.Add({.length = 160, .row_end = 10});
  for (std::size_t i = 0; i < run.k.size(); ++i) run.k[i] *= 0.05f * static_cast<float>(i / 128);
  const std::vector<float> got = batch.Run(*backend_);
  for (const float x : got) ASSERT_TRUE(std::isfinite(x));
}

TEST_P(CudaAttentionTest, BitsDoNotDependOnChunksCompanionsOrPages) {
  const std::int64_t n = 150;
  AttentionCase whole(k64, Range(0, n), 4);
  whole.Add({.length = n, .row_end = n});
  const std::vector<float> want = whole.Run(*backend_);
  {
    SCOPED_TRACE("pages");
    ExpectSameRows(want, whole.Run(*backend_, 77), Range(0, n), k64);
  }
  for (const auto& [begin, end] : {std::pair{0, 77}, {77, 100}, {149, 150}}) {
    SCOPED_TRACE("chunk from " + std::to_string(begin));
    AttentionCase chunk = whole.Rows(Range(begin, end));
    ExpectSameRows(want, chunk.Run(*backend_), Range(begin, end), k64);
  }
  SCOPED_TRACE("scattered");
  std::vector<std::int64_t> rows;
  for (std::int64_t i = 0; i < n; ++i) {
    if (whole.Uniform(0, 99) < 15) rows.push_back(i);
  }
  AttentionCase scattered = whole.Rows(rows);
  ExpectSameRows(want, scattered.Run(*backend_), rows, k64);
}

// Many agents on one prefix, each with a suffix of its own: as when each is alone.
TEST_P(CudaAttentionTest, SharingAPrefixKeepsTheBits) {
  constexpr std::int64_t kAgents = 5, kPrefix = 1100;
  std::vector<std::int64_t> positions;
  for (std::int64_t a = 0; a < kAgents; ++a) positions.push_back(kPrefix + 20 + 3 * a);
  AttentionCase all(k64, positions, 5);
  all.Add({.length = kPrefix, .row_end = kAgents});
  for (std::int64_t a = 0; a < kAgents; ++a) {
    all.Add({.start = kPrefix, .length = 21 + 3 * a, .row_begin = a, .row_end = a + 1});
  }
  const std::vector<float> want = all.Run(*backend_);
  ExpectNearOracle(all, want);
  for (std::int64_t a = 0; a < kAgents; ++a) {
    AttentionCase one = all.Rows({a});
    ExpectSameRows(want, one.Run(*backend_), {a}, k64);
  }
}

TEST_P(CudaAttentionTest, ASegmentCutAtASplitKeepsTheBits) {
  const std::vector<std::int64_t> positions = {1000, 1023, 1024, 1100, 1199};
  AttentionCase one(k64, positions, 6);
  one.Add({.length = 1200, .row_end = 5});
  AttentionCase two = one;
  const auto cut = static_cast<std::ptrdiff_t>(1024 * k64.num_kv_heads * k64.head_dim);
  KeyRun rest = two.runs()[0];
  rest.start = 1024;
  rest.length = 1200 - 1024;
  rest.k.erase(rest.k.begin(), rest.k.begin() + cut);
  rest.v.erase(rest.v.begin(), rest.v.begin() + cut);
  two.runs()[0].length = 1024;
  two.runs()[0].k.resize(static_cast<std::size_t>(cut));
  two.runs()[0].v.resize(static_cast<std::size_t>(cut));
  two.runs().push_back(rest);
  const std::vector<float> want = one.Run(*backend_);
  ExpectSameRows(want, two.Run(*backend_), Range(0, 5), k64);
}

TEST_P(CudaAttentionTest, InfiniteValuesOfLaterKeysDoNotReachEarlierRows) {
  for (const AttentionShape& shape : {k64, k128}) {
    AttentionCase clean(shape, Range(60, 110), 7);
    clean.Add({.length = 110, .row_end = 50});
    AttentionCase dirty = clean;
    const auto width = static_cast<std::size_t>(shape.num_kv_heads * shape.head_dim);
    for (std::size_t j = 0; j < width; ++j) dirty.runs()[0].v[100 * width + j] = std::numeric_limits<float>::infinity();
    const std::vector<float> want = clean.Run(*backend_), got = dirty.Run(*backend_);
    ExpectSameRows(want, got, Range(0, 40), shape);
    EXPECT_FALSE(std::isfinite(got[40 * static_cast<std::size_t>(shape.num_heads * shape.head_dim)]));
  }
}

TEST_P(CudaAttentionTest, NotANumberInAKeyReachesTheRowsThatSeeItAlone) {
  AttentionCase clean(k64, Range(0, 70), 8);
  clean.Add({.length = 70, .row_end = 70});
  AttentionCase dirty = clean;
  dirty.runs()[0].k[40 * 128] = std::nanf("");
  const std::vector<float> want = clean.Run(*backend_), got = dirty.Run(*backend_);
  ExpectSameRows(want, got, Range(0, 40), k64);
  EXPECT_TRUE(std::isnan(got[40 * 512]));
}

TEST_P(CudaAttentionTest, RowsThatSeeNothingGetZeros) {
  AttentionCase batch(k64, {3, 60, 80}, 9);
  batch.Add({.start = 61, .length = 10, .row_end = 2});
  KeyRun skipped{.length = 70, .row_begin = 2, .row_end = 3};
  skipped.skipped.assign(70, true);
  batch.Add(std::move(skipped));
  for (const float x : batch.Run(*backend_)) ASSERT_EQ(x, 0.0f);
  AttentionCase bare(k64, {3, 4}, 10);
  for (const float x : bare.Run(*backend_)) ASSERT_EQ(x, 0.0f);
}

// Also where a block walks all keys, which the fixture does in bfloat16 alone.
TEST(CudaAttentionEmulatedTest, NarrowOutputIsTheRoundedOutput) {
  for (const DType half : {DType::kBf16, DType::kF16}) {
    for (const std::int64_t spread : {std::int64_t{0}, std::int64_t{1} << 40}) {
      auto backend = NewBackendOn(NewEmulatedDevice({}), {.dtype = half, .spread_bytes = spread});
      ASSERT_TRUE(backend.ok());
      AttentionCase batch(k64, Range(0, 70), 12);
      batch.Add({.length = 70, .row_end = 70});
      const std::vector<float> wide = batch.Run(**backend);
      ExpectNearOracle(batch, wide);
      const std::vector<std::uint16_t> narrow = batch.RunNarrow(**backend);
      for (std::size_t i = 0; i < wide.size(); ++i) ASSERT_EQ(narrow[i], HalfBits(half, wide[i])) << i;
    }
  }
}

// Only where kernels are watched: each ldmatrix hits every bank once.
TEST(CudaAttentionEmulatedTest, MatrixLoadsHaveNoBankConflicts) {
  auto backend = NewBackendOn(NewEmulatedDevice({}), {});
  ASSERT_TRUE(backend.ok());
  for (const AttentionShape& shape : {k64, k128}) {
    TakeGridStats();
    AttentionCase batch(shape, Range(0, 64), 11);
    batch.Add({.length = 64, .row_end = 64});
    batch.Run(**backend);
    const GridStats stats = TakeGridStats();
    EXPECT_GT(stats.mma, 0);
    EXPECT_EQ(stats.bank_conflicts, 0);
  }
}

// Either schedule, to the bit.
TEST(CudaAttentionEmulatedTest, SchedulesAgree) {
  for (std::uint64_t seed = 200; seed < 204; ++seed) {
    std::vector<std::vector<float>> outs;
    for (const std::int64_t spread : {std::int64_t{0}, std::int64_t{1} << 40}) {
      auto backend = NewBackendOn(NewEmulatedDevice({.seed = seed + static_cast<std::uint64_t>(spread)}),
                                  {.spread_bytes = spread});
      ASSERT_TRUE(backend.ok());
      AttentionCase batch = RandomCase(seed % 2 == 0 ? kPartlyRotated : k128, seed);
      outs.push_back(batch.Run(**backend));
    }
    EXPECT_EQ(std::memcmp(outs[0].data(), outs[1].data(), outs[0].size() * sizeof(float)), 0) << seed;
  }
}

INSTANTIATE_TEST_SUITE_P(Cuda, CudaAttentionTest,
                         ::testing::Values(Where::kEmulatedWalk, Where::kEmulatedSpread, Where::kEmulatedF16,
                                           Where::kDevice, Where::kDeviceWalk, Where::kDeviceF16),
                         WhereName);

}  // namespace
}  // namespace kvshare::kernels::cuda

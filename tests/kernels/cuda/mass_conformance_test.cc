// Attention mass on the device, against the double-precision oracle, and the choice of rows by it; in the emulator
// always, on a GPU where there is one.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "anchors/selection.h"
#include "kernels/device_kv.h"
#include "tests/kernels/backend_fixture.h"
#include "tests/kernels/cuda/attention_case.h"
#include "tests/kernels/cuda/backends.h"
#include "tests/reference/attention_reference.h"

namespace kvshare::kernels::cuda {
namespace {

constexpr AttentionShape k64{8, 2, 64, 32};
constexpr AttentionShape k128{4, 1, 128, 64};
constexpr AttentionShape kPartlyRotated{6, 2, 64, 20};  // 3 query heads a group: tiles end within a token
constexpr AttentionShape kUnrotated{2, 2, 128, 0};
constexpr std::size_t kAllAsked = ~std::size_t{0};

using Masses = std::vector<std::vector<float>>;

std::vector<std::int64_t> Range(std::int64_t begin, std::int64_t end) {
  std::vector<std::int64_t> x(static_cast<std::size_t>(end - begin));
  std::iota(x.begin(), x.end(), begin);
  return x;
}

class CudaMassTest : public CudaTest {};

// Queries are rounded to the pages' dtype, the rest is fp32; shares of rows, heads and tiles are added one by one to
// 0.25.
void ExpectNearOracle(const AttentionCase& batch, const std::vector<std::int64_t>& rows, const Masses& got,
                      std::size_t idle = kAllAsked) {
  const reference::MassResult want = reference::AttentionMass(batch.params(), batch.inv_freq(), rows);
  const DType half = batch.params().pages.layout.dtype;
  const double d = batch.shape().head_dim, query = DTypeEps(half) + (d + 16) * kF32Eps;
  WorstError worst("mass");
  double square = 0, reference = 0;
  for (std::size_t s = 0; s < got.size(); ++s) {
    for (std::size_t t = 0; t < got[s].size(); ++t) {
      const double mass = s == idle ? 0 : want.mass[s][t], value = static_cast<double>(got[s][t]);
      const double bound =
          mass * (2 * std::expm1(query * want.score_bound + 6 * d * DTypeTiny(half)) + 4096 * kF32Eps) + 64 * kF32Eps;
      worst.Compare(value, 0.25 + mass, mass == 0 ? 0 : bound, static_cast<std::int64_t>(s),
                    static_cast<std::int64_t>(t));
      square += (value - 0.25 - mass) * (value - 0.25 - mass);
      reference += mass * mass;
    }
  }
  // Rounding errors are independent: far below the worst case together, else something is biased.
  EXPECT_LE(std::sqrt(square), 2.5 * DTypeEps(half) * std::sqrt(reference) + 1e-6);
}

void ExpectMass(AttentionCase& batch, Backend& backend, const std::vector<std::int64_t>& rows) {
  const Masses got = batch.Mass(backend, rows);
  ExpectNearOracle(batch, rows, got);
}

TEST_P(CudaMassTest, RandomSegmentsAreNearOracle) {
  const AttentionShape shapes[] = {k64, kPartlyRotated, k128, kUnrotated};
  for (int i = 0; i < Repeats(8); ++i) {
    SCOPED_TRACE("seed " + std::to_string(300 + i));
    AttentionCase batch = RandomCase(shapes[i % 4], static_cast<std::uint64_t>(300 + i));
    std::vector<std::int64_t> rows;
    for (std::int64_t r = 0; r < batch.rows(); ++r) {
      if (i % 2 == 0 || batch.Uniform(0, 2) == 0) rows.push_back(r);
    }
    const std::size_t idle = i < 4 ? 1 : kAllAsked;
    const Masses got = batch.Mass(*backend_, rows, 1, idle);
    ExpectNearOracle(batch, rows, got, idle);
  }
}

TEST_P(CudaMassTest, KeysOfSeveralSplitsAreNearOracle) {
  AttentionCase batch(k64, {0, 63, 64, 1023, 1024, 1025, 2047, 2048, 2149}, 2);
  batch.Add({.length = 2150, .row_end = 9, .first = 0});
  ExpectMass(batch, *backend_, {0, 2, 3, 4, 5, 8});
  batch.set_window(1000);
  ExpectMass(batch, *backend_, {1, 7, 8});
  batch.set_window(0);
  batch.runs()[0].first = 37;  // tokens of a page lie in two
  ExpectMass(batch, *backend_, Range(0, 9));
}

// More rows than are looked at together.
TEST_P(CudaMassTest, ManyRowsAreNearOracle) {
  AttentionCase batch(k64, Range(0, 140), 3);
  batch.Add({.length = 140, .row_end = 140});
  ExpectMass(batch, *backend_, Range(0, 140));
}

TEST_P(CudaMassTest, RowsThatSeeNothingGiveNothing) {
  AttentionCase batch(k64, {5, 6, 7}, 4);
  batch.Add({.start = 100, .length = 40, .row_end = 3});
  EXPECT_EQ(batch.Mass(*backend_, {0, 1, 2}), Masses{std::vector<float>(40, 0.25f)});
  EXPECT_EQ(batch.Mass(*backend_, {}), Masses{std::vector<float>(40, 0.25f)});
  // The first key alone is seen, by one row alone.
  batch.runs()[0].start = 7;
  const Masses got = batch.Mass(*backend_, {0, 1, 2});
  EXPECT_FLOAT_EQ(got[0][0], 0.25f + 8);
  EXPECT_EQ(std::count(got[0].begin() + 1, got[0].end(), 0.25f), 39);
}

// A key that is not finite spoils those rows alone that see it.
TEST_P(CudaMassTest, KeysThatAreNotFiniteSpoilNoOtherKeys) {
  AttentionCase batch(k64, {10, 60}, 5);
  KeyRun& run = batch.Add({.length = 64, .row_end = 2});
  run.k[30 * 128 + 3] = std::nanf("");  // token 30, of kv head 0
  const Masses first = batch.Mass(*backend_, {0});
  for (std::size_t t = 0; t < 64; ++t) EXPECT_EQ(first[0][t] > 0.25f, t <= 10) << t;
  const Masses second = batch.Mass(*backend_, {1});
  for (std::size_t t = 0; t < 64; ++t) EXPECT_EQ(std::isnan(second[0][t]), t <= 60) << t;
}

TEST_P(CudaMassTest, BitsDependOnNeitherPagesNorTheRestOfTheBatch) {
  AttentionCase batch(k64, Range(1000, 1090), 6);
  batch.Add({.length = 1100, .row_end = 90});
  const std::vector<std::int64_t> rows = {3, 4, 50, 89};
  const Masses want = batch.Mass(*backend_, rows);
  EXPECT_EQ(batch.Mass(*backend_, rows, 77), want);
  EXPECT_EQ(batch.Rows(rows).Mass(*backend_, Range(0, 4)), want);
}

// As `auto` asks: the masses of two chunks side by side, the rest of the prompt a third segment that nobody asks about,
// and of it all only the chosen cross.
TEST_P(CudaMassTest, TokensOfSeveralChunksAreChosenTogether) {
  AttentionCase batch(k128, Range(300, 340), 7);
  batch.Add({.start = 10, .length = 70, .shift = 5, .row_end = 40, .first = 9});
  batch.Add({.start = 100, .length = 30, .shift = -20, .row_end = 40});
  batch.Add({.start = 300, .length = 40, .row_end = 40});
  const Masses want = batch.Mass(*backend_, Range(20, 40), 1, 2);
  std::vector<float> all = want[0];
  all.insert(all.end(), want[1].begin(), want[1].end());
  const auto mass = Uploaded(std::span<const float>(all));
  std::vector<std::int32_t> chosen(15);
  const Status status =
      backend_->device_kv()->ChooseRowsByMass(reinterpret_cast<const float*>(mass->data()), nullptr, 100, chosen);
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(std::vector<std::int64_t>(chosen.begin(), chosen.end()), anchors::LargestScores(all, 15));
}

TEST(CudaMassEmulatedTest, MatrixLoadsHaveNoBankConflicts) {
  auto backend = NewBackendOn(NewEmulatedDevice({}), {});
  ASSERT_TRUE(backend.ok());
  for (const AttentionShape& shape : {k64, k128}) {
    TakeGridStats();
    AttentionCase batch(shape, Range(0, 64), 8);
    batch.Add({.length = 64, .row_end = 64});
    batch.Mass(**backend, Range(0, 64));
    const GridStats stats = TakeGridStats();
    EXPECT_GT(stats.mma, 0);
    EXPECT_EQ(stats.bank_conflicts, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Cuda, CudaMassTest, kEachHalf, WhereName);

}  // namespace
}  // namespace kvshare::kernels::cuda

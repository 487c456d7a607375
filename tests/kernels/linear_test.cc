// Linear and GatedLinear against the double-precision oracle, and their bit contract: a row's result is its own,
// whatever rows stand beside it, wherever the batch is cut and however many threads run.
#include <cmath>
#include <span>
#include <vector>

#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/few_rows.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/thread_pool.h"
#include "tests/kernels/backend_fixture.h"
#include "tests/reference/ops_reference.h"

namespace kvshare::kernels {
namespace {

struct LinearShape {
  std::int64_t k;
  std::vector<std::int64_t> parts;  // output features of each concatenated part
};

const LinearShape kShapes[] = {{64, {64}},  {576, {576, 192, 192}}, {192, {1}},  {48, {15, 17}},
                               {72, {513}}, {1536, {576}},          {64, {9000}}};

class LinearTest : public BackendTest {
 protected:
  // Random weights [n, k] as the backend rounds them, with their packed form.
  void MakeWeights(const LinearShape& shape, bool with_bias, bool gated) {
    weights_.clear();
    std::vector<HostMatrix> parts;
    n_ = 0;
    for (const std::int64_t rows : shape.parts) {
      HostRows part(rows, shape.k, dtype());  // rounded to the compute dtype, so that packing loses nothing
      part.FillNormal(random_, 0.05f);
      std::vector<float> plain;
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::vector<float> row = part.Row(r);
        plain.insert(plain.end(), row.begin(), row.end());
      }
      weights_.push_back(std::move(plain));
      n_ += rows;
    }
    for (std::size_t i = 0; i < weights_.size(); ++i) parts.push_back({weights_[i].data(), shape.parts[i], shape.k});
    bias_.clear();
    std::normal_distribution<float> normal(0.0f, 0.3f);
    if (with_bias) {
      for (std::int64_t i = 0; i < n_; ++i) bias_.push_back(normal(random_));
    }
    auto packed = backend_->MakeLinear({.parts = parts, .bias = bias_, .gated = gated});
    ASSERT_TRUE(packed.ok()) << packed.status().message();
    packed_ = std::move(packed).value();
    EXPECT_EQ(packed_->in_features(), shape.k);
    EXPECT_EQ(packed_->out_features(), n_);
  }
  std::span<const float> WeightRow(std::int64_t row, std::int64_t k) const {
    std::size_t part = 0;
    while (row >= static_cast<std::int64_t>(weights_[part].size()) / k) {
      row -= static_cast<std::int64_t>(weights_[part].size()) / k;
      ++part;
    }
    return {weights_[part].data() + row * k, static_cast<std::size_t>(k)};
  }
  double Bias(std::int64_t column) const {
    return bias_.empty() ? 0.0 : double{bias_[static_cast<std::size_t>(column)]};
  }
  reference::Sum Exact(const std::vector<float>& x, std::int64_t column, std::int64_t k) const {
    return reference::Dot(x, WeightRow(column, k), Bias(column));
  }
  // Recursive summation of K products and a bias in fp32: (K + 2) half-units of every partial sum, which |x||w| bounds.
  // Dot-product instructions flush denormals: K times the smallest normal number.
  static double SumBound(const reference::Sum& sum, std::int64_t k) {
    return static_cast<double>(k + 2) * (kF32Eps * sum.magnitude + 0x1p-126);
  }

  std::int64_t n_ = 0;
  std::vector<std::vector<float>> weights_;
  std::vector<float> bias_;
  std::unique_ptr<LinearWeights> packed_;
};

TEST_P(LinearTest, AgreesWithTheOracle) {
  for (const LinearShape& shape : kShapes) {
    for (const bool accumulate : {false, true}) {
      MakeWeights(shape, /*with_bias=*/accumulate, /*gated=*/false);
      HostRows x(67, shape.k, dtype()), out(67, n_, DType::kF32);
      x.FillNormal(random_);
      out.FillNormal(random_);
      const HostRows before = out;
      WorstError worst("Linear K " + std::to_string(shape.k) + " N " + std::to_string(n_));
      backend_->Linear({.x = x.View(), .weights = packed_.get(), .out = out.View(), .accumulate = accumulate});
      for (const std::int64_t r : {0, 1, 15, 16, 63, 64, 66}) {
        const std::vector<float> row = x.Row(r);
        for (std::int64_t c = 0; c < n_; ++c) {
          reference::Sum exact = Exact(row, c, shape.k);
          if (accumulate) {
            exact.value += double{before.Get(r, c)};
            exact.magnitude += std::abs(double{before.Get(r, c)});
          }
          worst.Compare(out.Get(r, c), exact.value, SumBound(exact, shape.k), r, c);
        }
      }
    }
  }
}

TEST_P(LinearTest, GatedAgreesWithTheOracle) {
  for (const LinearShape& shape :
       {LinearShape{64, {112, 112}}, LinearShape{576, {1536, 1536}}, LinearShape{40, {5, 5}}}) {
    for (const bool with_bias : {false, true}) {
      MakeWeights(shape, with_bias, /*gated=*/true);
      const std::int64_t half = n_ / 2;
      HostRows x(70, shape.k, dtype()), out(70, half, dtype());
      x.FillNormal(random_, 3.0f);
      WorstError worst("GatedLinear K " + std::to_string(shape.k) + " N " + std::to_string(n_));
      backend_->GatedLinear({.x = x.View(), .weights = packed_.get(), .out = out.View()});
      for (const std::int64_t r : {0, 17, 63, 64, 69}) {
        const std::vector<float> row = x.Row(r);
        for (std::int64_t c = 0; c < half; ++c) {
          const reference::Sum gate = Exact(row, c, shape.k), up = Exact(row, half + c, shape.k);
          const double silu = reference::Silu(gate.value);
          const double value = silu * up.value;
          // |silu'| <= 1.1; exp, the division and two products: 8 half-units; then the output's rounding.
          const double gate_error = 1.1 * SumBound(gate, shape.k), up_error = SumBound(up, shape.k);
          const double bound = gate_error * (std::abs(up.value) + up_error) + std::abs(silu) * up_error +
                               (8 * kF32Eps + DTypeEps(dtype())) * std::abs(value) + 0x1p-120;
          worst.Compare(out.Get(r, c), value, bound, r, c);
        }
      }
    }
  }
}

TEST_P(LinearTest, ARowsBitsAreItsOwn) {
  MakeWeights({576, {576, 192, 192}}, true, false);
  constexpr std::int64_t kRows = 150;
  HostRows x(kRows, 576, dtype()), whole(kRows, n_, DType::kF32);
  x.FillNormal(random_);
  backend_->Linear({.x = x.View(), .weights = packed_.get(), .out = whole.View()});
  for (int trial = 0; trial < 60; ++trial) {
    const std::int64_t rows = std::uniform_int_distribution<std::int64_t>(1, trial % 3 == 0 ? kRows : 9)(random_);
    const std::int64_t first = std::uniform_int_distribution<std::int64_t>(0, kRows - rows)(random_);
    HostRows part(rows, n_, DType::kF32);
    backend_->Linear({.x = x.View(first, rows), .weights = packed_.get(), .out = part.View()});
    ASSERT_TRUE(whole.HoldsRows(first, part)) << rows << " rows from " << first;
  }
}

TEST_P(LinearTest, AGatedRowsBitsAreItsOwn) {
  MakeWeights({192, {528, 528}}, true, true);
  constexpr std::int64_t kRows = 130;
  HostRows x(kRows, 192, dtype()), whole(kRows, n_ / 2, dtype());
  x.FillNormal(random_);
  backend_->GatedLinear({.x = x.View(), .weights = packed_.get(), .out = whole.View()});
  for (int trial = 0; trial < 60; ++trial) {
    const std::int64_t rows = std::uniform_int_distribution<std::int64_t>(1, trial % 3 == 0 ? kRows : 9)(random_);
    const std::int64_t first = std::uniform_int_distribution<std::int64_t>(0, kRows - rows)(random_);
    HostRows part(rows, n_ / 2, dtype());
    backend_->GatedLinear({.x = x.View(first, rows), .weights = packed_.get(), .out = part.View()});
    ASSERT_TRUE(whole.HoldsRows(first, part)) << rows << " rows from " << first;
  }
}

TEST_P(LinearTest, CompanionsThatAreNotNumbersDoNotLeak) {
  MakeWeights({64, {96}}, false, false);
  HostRows x(5, 64, dtype()), clean(5, n_, DType::kF32), dirty(5, n_, DType::kF32);
  x.FillNormal(random_);
  backend_->Linear({.x = x.View(), .weights = packed_.get(), .out = clean.View()});
  for (std::int64_t c = 0; c < 64; ++c) x.Set(3, c, std::nanf(""));
  backend_->Linear({.x = x.View(), .weights = packed_.get(), .out = dirty.View()});
  for (const std::int64_t r : {0, 1, 2, 4}) EXPECT_EQ(clean.Row(r), dirty.Row(r)) << "row " << r;
  // A smaller batch after a poisoned one reuses its scratch.
  backend_->Linear({.x = x.View(0, 3), .weights = packed_.get(), .out = dirty.View(0, 3)});
  for (const std::int64_t r : {0, 1, 2}) EXPECT_EQ(clean.Row(r), dirty.Row(r)) << "row " << r;
}

TEST_P(LinearTest, ThreadsDoNotChangeBits) {
  const LinearShape shape{576, {1536, 1536}};
  HostRows x(77, 576, dtype());
  x.FillNormal(random_);
  std::unique_ptr<HostRows> first;
  const std::mt19937_64 start = random_;
  for (const int threads : {1, 2, 3}) {
    packed_.reset();
    backend_ = MakeBackend(threads);
    random_ = start;  // the same weights for each
    MakeWeights(shape, false, true);
    auto out = std::make_unique<HostRows>(77, n_ / 2, dtype());
    backend_->GatedLinear({.x = x.View(), .weights = packed_.get(), .out = out->View()});
    if (first == nullptr)
      first = std::move(out);
    else
      EXPECT_TRUE(first->SameBytes(*out)) << threads << " threads";
  }
}

// K = 1 and one weight of 1 make the gate whatever x is: SwiGLU far from where models keep it.
TEST_P(LinearTest, SwigluAtItsEnds) {
  const float ones[] = {1.0f, 0.0f};
  const float zero_then_one[] = {0.0f, 1.0f};
  const HostMatrix parts[] = {{ones, 1, 2}, {zero_then_one, 1, 2}};  // gate = x[0], up = x[1]
  auto packed = backend_->MakeLinear({.parts = parts, .bias = {}, .gated = true});
  ASSERT_TRUE(packed.ok()) << packed.status().message();
  const std::vector<float> gates = {0.0f,   1e-30f, -1e-30f, 1.0f, -1.0f, 10.0f, -10.0f, 80.0f,
                                    -80.0f, -88.0f, -89.0f,  1e4f, -1e4f, 1e30f, -1e30f, -3e38f};
  const auto rows = static_cast<std::int64_t>(gates.size());
  HostRows x(rows + 1, 2, dtype()), out(rows + 1, 1, dtype());
  for (std::int64_t r = 0; r < rows; ++r) {
    x.Set(r, 0, gates[static_cast<std::size_t>(r)]);
    x.Set(r, 1, 1.0f);
  }
  x.Set(rows, 0, std::nanf(""));
  x.Set(rows, 1, 1.0f);
  backend_->GatedLinear({.x = x.View(), .weights = packed->get(), .out = out.View()});
  WorstError worst("SwiGLU");
  for (std::int64_t r = 0; r < rows; ++r) {
    const double exact = reference::Silu(double{x.Get(r, 0)});
    // 8 half-units, the output's rounding, and 90 / 2^127 where exp reaches infinity a little early.
    worst.Compare(out.Get(r, 0), exact, (8 * kF32Eps + DTypeEps(dtype())) * std::abs(exact) + 0x1p-120, r, 0);
  }
  EXPECT_TRUE(std::isnan(out.Get(rows, 0)));
}

// What the engine falls back to where a library's rows depend on each other must give the same bits where they do not.
TEST_P(LinearTest, OneNumberOfRowsForAllGivesTheSameBits) {
  ThreadPool pool(2);
  const ElementwiseKernel& elementwise = ElementwiseFor(GetParam().isa);
  std::vector<float> w(272 * 96);
  std::normal_distribution<float> normal(0.0f, 0.1f);
  for (float& v : w) v = normal(random_);
  const HostMatrix part{w.data(), 272, 96};
  std::vector<HostRows> outs;
  HostRows x(71, 96, dtype());
  x.FillNormal(random_);
  for (const bool fixed_rows : {false, true}) {
    auto engine =
        NewLinearEngine({.isa = GetParam().isa, .compute = dtype(), .fixed_rows = fixed_rows}, elementwise, pool);
    ASSERT_TRUE(engine.ok()) << engine.status().message();
    auto packed = (*engine)->Pack({.parts = {&part, 1}, .bias = {}, .gated = false});
    ASSERT_TRUE(packed.ok()) << packed.status().message();
    EXPECT_TRUE((*engine)->SelfTest().ok());
    EXPECT_EQ((*engine)->description().find("fixed-rows96x272") != std::string::npos, fixed_rows);
    for (const std::int64_t rows : {71, 3, 1}) {
      HostRows out(rows, 272, DType::kF32);
      (*engine)->Run({.x = x.View(0, rows), .weights = packed->get(), .out = out.View(), .accumulate = false});
      outs.push_back(std::move(out));
    }
  }
  for (std::size_t i = 0; i < 3; ++i) EXPECT_TRUE(outs[i].SameBytes(outs[i + 3])) << outs[i].rows() << " rows";
  for (std::size_t i = 1; i < 3; ++i) EXPECT_TRUE(outs[0].HoldsRows(0, outs[i])) << outs[i].rows() << " rows";
}

TEST_P(LinearTest, StridedRowsAreRead) {
  MakeWeights({64, {32}}, false, false);
  HostRows wide(6, 200, dtype()), narrow(6, 64, dtype()), a(6, n_, DType::kF32), b(6, n_, DType::kF32);
  wide.FillNormal(random_);
  for (std::int64_t r = 0; r < 6; ++r) {
    for (std::int64_t c = 0; c < 64; ++c) narrow.Set(r, c, wide.Get(r, c));
  }
  MatrixView strided = wide.View();
  strided.cols = 64;
  backend_->Linear({.x = strided, .weights = packed_.get(), .out = a.View()});
  backend_->Linear({.x = narrow.View(), .weights = packed_.get(), .out = b.View()});
  EXPECT_TRUE(a.SameBytes(b));
}

TEST_P(LinearTest, SelfTestPasses) {
  EXPECT_TRUE(backend_->SelfTest().ok());  // before there is any layer
  MakeWeights({72, {513}}, false, false);  // and over the layers there are
  const Status status = backend_->SelfTest();
  EXPECT_TRUE(status.ok()) << status.message();
}

// The kernels for a few rows by themselves, on weights packed by hand: every number of rows, columns that do not fill a
// block, and every cut of K.
#if defined(__x86_64__)
void ExpectFewRowsAgreeWithTheOracle(FewRowsKernel few_rows) {
  constexpr std::int64_t kK = 160;
  std::mt19937_64 random(5);
  for (const std::int64_t cols : {1, 15, 16, 17, 63, 64, 65, 130}) {
    HostRows w(cols, kK, DType::kBf16), x(kFewRows, kK, DType::kBf16);
    w.FillNormal(random);
    x.FillNormal(random);
    HostRows packed((cols + 63) / 64, kK * 64, DType::kBf16);
    for (std::int64_t c = 0; c < cols; ++c) {
      for (std::int64_t i = 0; i < kK; ++i) packed.Set(c / 64, i / 2 * 128 + c % 64 * 2 + i % 2, w.Get(c, i));
    }
    for (const std::int64_t chunk : {32, 64, 128, 160}) {
      for (std::int64_t rows = 1; rows <= kFewRows; ++rows) {
        HostRows out(rows + 1, cols, DType::kF32);
        for (std::int64_t c = 0; c < cols; ++c) out.Set(rows, c, 7.0f);  // a row that is not the kernel's
        few_rows(x.View().row<std::uint16_t>(0), kK, rows, {packed.View().row<std::uint16_t>(0), kK, chunk, cols},
                 out.View().row<float>(0));
        WorstError worst(std::to_string(rows) + " rows, " + std::to_string(cols) + " columns, chunks of " +
                         std::to_string(chunk));
        for (std::int64_t c = 0; c < cols; ++c) {
          for (std::int64_t r = 0; r < rows; ++r) {
            const reference::Sum exact = reference::Dot(x.Row(r), w.Row(c), 0);
            // One rounding for each product added, in whatever chunks.
            worst.Compare(out.Get(r, c), exact.value, static_cast<double>(kK) * kF32Eps * exact.magnitude, r, c);
          }
          EXPECT_EQ(out.Get(rows, c), 7.0f);
        }
      }
    }
  }
}

TEST(FewRowsTest, Avx512Bf16AgreesWithTheOracle) {
  if (!CpuHasIsa(CpuIsa::kAvx512Bf16)) GTEST_SKIP() << "this processor has no AVX-512-BF16";
  ExpectFewRowsAgreeWithTheOracle(Avx512Bf16FewRows);
}

TEST(FewRowsTest, AmxBf16AgreesWithTheOracle) {
  if (!CpuHasIsa(CpuIsa::kAmxBf16)) GTEST_SKIP() << "this processor has no AMX-BF16";
  ExpectFewRowsAgreeWithTheOracle(AmxBf16FewRows);
}
#endif

INSTANTIATE_TEST_SUITE_P(Isa, LinearTest, ::testing::ValuesIn(BackendCases()), BackendCaseName);

}  // namespace
}  // namespace kvshare::kernels

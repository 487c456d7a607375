// Moving, coding and choosing KV on the device, against the CPU's row functions and the codes' definitions.
#include "kernels/device_kv.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "anchors/selection.h"
#include "kernels/cuda/mover_args.h"
#include "tests/kernels/backend_fixture.h"
#include "tests/kernels/cuda/backends.h"

namespace kvshare::kernels::cuda {
namespace {

constexpr PageIndex kPages = 5;

class CudaKvTest : public CudaTest {
 protected:
  // Random values on every page, in host memory and on the backend.
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    host_.resize(layout_.page_bytes() * kPages);
    std::normal_distribution<float> normal;
    auto* values = reinterpret_cast<std::uint16_t*>(host_.data());
    for (std::size_t i = 0; i < host_.size() / 2; ++i) values[i] = Round(normal(random_));
    PutPages();
  }
  void PutPages() {
    auto buffer = backend_->Allocate(host_.size());
    ASSERT_TRUE(buffer.ok());
    memory_ = std::move(buffer).value();
    ASSERT_TRUE(backend_->Upload(memory_->data(), host_.data(), host_.size()).ok());
  }
  KvPages OnHost() { return {host_.data(), kPages, layout_}; }
  KvPages OnDevice() { return {memory_->data(), kPages, layout_}; }
  static double Widen(std::uint16_t bits) { return FromHalf(half(), bits); }
  static std::uint16_t Round(float x) { return static_cast<std::uint16_t>(HalfBits(half(), x)); }

  const KvLayout layout_{2, 2, 64, half()};
  std::mt19937_64 random_{20250612};
  std::vector<std::byte> host_;
  std::unique_ptr<Buffer> memory_;
};

TEST_P(CudaKvTest, RowsAreCopiedAsTheCpuCopiesThem) {
  const std::vector<KvSlot> from = {{0, 0}, {1, 63}, {2, 7}, {2, 7}}, to = {{3, 5}, {3, 6}, {4, 0}, {1, 62}};
  for (const auto& [begin, end] : {std::pair{0, 2}, {1, 2}, {1, 1}}) {
    std::vector<std::byte> expected = host_;
    CopyRows({expected.data(), kPages, layout_}, from, to, begin, end);
    PutPages();
    backend_->device_kv()->CopyRows(OnDevice(), from, to, begin, end);
    EXPECT_EQ(Download(memory_->data(), host_.size()), expected);
  }
}

TEST_P(CudaKvTest, PagesGoThroughABlockAndBack) {
  const std::vector<PageIndex> from = {3, 0}, to = {1, 4};
  const auto block = Block(layout_.page_bytes() * 2);
  backend_->device_kv()->GatherPages(OnDevice(), from, block->data());
  backend_->device_kv()->ScatterPages(OnDevice(), block->data(), to);
  std::vector<std::byte> expected = host_;
  const auto page = static_cast<std::ptrdiff_t>(layout_.page_bytes());
  std::copy_n(host_.begin() + 3 * page, page, expected.begin() + 1 * page);
  std::copy_n(host_.begin(), page, expected.begin() + 4 * page);
  EXPECT_EQ(Download(memory_->data(), host_.size()), expected);
}

// Half a code's step, and the roundings of scale and answer.
TEST_P(CudaKvTest, CodedPagesComeBackWithinHalfAStep) {
  auto* values = reinterpret_cast<std::uint16_t*>(host_.data());
  for (int j = 0; j < 64; ++j) values[j] = 0;                                       // a row of zeros
  for (int j = 0; j < 64; ++j) values[64 + j] = static_cast<std::uint16_t>(1 + j);  // denormals
  for (int j = 0; j < 64; ++j) values[128 + j] = Round(half() == DType::kF16 ? 6e4f : 3e38f);
  PutPages();
  for (const KvCode code : {KvCode::kInt8, KvCode::kFp8E4M3}) {
    PutPages();
    const std::vector<PageIndex> from = {0, 2}, to = {3, 4};
    const auto block = Block(QuantizedPageBytes(layout_) * 2);
    backend_->device_kv()->QuantizePages(OnDevice(), from, code, block->data());
    backend_->device_kv()->DequantizePages(OnDevice(), block->data(), code, to);
    const std::vector<std::byte> got = Download(memory_->data(), host_.size());
    const auto* back = reinterpret_cast<const std::uint16_t*>(got.data());
    const std::size_t page = layout_.page_bytes() / 2;
    WorstError worst(code == KvCode::kInt8 ? "int8" : "fp8");
    for (std::size_t n = 0; n < 2; ++n) {
      for (std::size_t row = 0; row < page / 64; ++row) {
        double top = 0;
        for (std::size_t j = 0; j < 64; ++j)
          top = std::max(top, std::abs(Widen(values[from[n] * page + row * 64 + j])));
        for (std::size_t j = 0; j < 64; ++j) {
          const double x = Widen(values[from[n] * page + row * 64 + j]);
          // fp8: three bits of mantissa, steps of top / 448 * 2^-9 near zero.
          const double step = code == KvCode::kInt8 ? top / 127 : std::max(std::abs(x) / 8, top / 448 / 512);
          worst.Compare(Widen(back[to[n] * page + row * 64 + j]), x,
                        step / 2 * 1.0001 + std::abs(x) * DTypeEps(half()) * 1.01 + DTypeTiny(half()) + 0x1p-132,
                        static_cast<std::int64_t>(row), static_cast<std::int64_t>(j));
        }
      }
    }
  }
}

TEST_P(CudaKvTest, ARowThatIsNotFiniteComesBackAsNotANumberAlone) {
  auto* values = reinterpret_cast<std::uint16_t*>(host_.data());
  values[64 + 9] = Round(HUGE_VALF);  // token 1 of the first slab: an infinity
  PutPages();
  const std::vector<PageIndex> page = {0};
  const auto block = Block(QuantizedPageBytes(layout_));
  backend_->device_kv()->QuantizePages(OnDevice(), page, KvCode::kFp8E4M3, block->data());
  backend_->device_kv()->DequantizePages(OnDevice(), block->data(), KvCode::kFp8E4M3, page);
  const std::vector<std::byte> got = Download(memory_->data(), layout_.page_bytes());
  const auto* back = reinterpret_cast<const std::uint16_t*>(got.data());
  for (std::size_t i = 0; i < layout_.page_bytes() / 2; ++i) {
    ASSERT_EQ(std::isnan(Widen(back[i])), i / 64 == 1) << "element " << i;
  }
}

TEST_P(CudaKvTest, DeviationIsThatOfTheCpu) {
  const std::vector<KvSlot> stored = {{0, 3}, {4, 63}, {2, 0}};
  HostRows fresh(3, 128, DType::kF32);
  fresh.FillNormal(random_);
  std::vector<RowDeviation> want(3);
  ValueDeviation(fresh.View(), OnHost(), 1, stored, want);
  const auto in = Block(3 * 128 * 4), out = Block(3 * sizeof(RowDeviation));
  ASSERT_TRUE(backend_->Upload(in->data(), fresh.View().data, 3 * 128 * 4).ok());
  MatrixView view = fresh.View();
  view.data = in->data();
  backend_->device_kv()->ValueDeviation(view, OnDevice(), 1, stored, reinterpret_cast<RowDeviation*>(out->data()));
  const std::vector<std::byte> bytes = Download(out->data(), 3 * sizeof(RowDeviation));
  const auto* got = reinterpret_cast<const RowDeviation*>(bytes.data());
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_NEAR(got[i].squares, want[i].squares, 140 * kF32Eps * want[i].squares);
    EXPECT_NEAR(got[i].cosine, want[i].cosine, 300 * kF32Eps);
  }
}

TEST_P(CudaKvTest, TheGreatestDeviationsAreChosen) {
  for (const std::int64_t n : {1, 5, 128, 129, 300}) {
    std::vector<RowDeviation> deviations(static_cast<std::size_t>(n));
    for (RowDeviation& d : deviations) d.squares = static_cast<float>(random_() % 20);  // many are equal
    if (n > 5) deviations[3].squares = std::nanf("");
    const auto in = Block(deviations.size() * sizeof(RowDeviation));
    ASSERT_TRUE(backend_->Upload(in->data(), deviations.data(), deviations.size() * sizeof(RowDeviation)).ok());
    for (const std::int64_t count : {std::int64_t{0}, std::int64_t{1}, n / 3, n}) {
      std::vector<std::int32_t> want(static_cast<std::size_t>(n)), got(static_cast<std::size_t>(count), -1);
      std::iota(want.begin(), want.end(), 0);
      const auto key = [&](std::int32_t i) {
        const float x = deviations[static_cast<std::size_t>(i)].squares;
        return std::isnan(x) ? std::numeric_limits<float>::infinity() : x;
      };
      std::stable_sort(want.begin(), want.end(), [&](std::int32_t a, std::int32_t b) { return key(a) > key(b); });
      want.resize(static_cast<std::size_t>(count));
      std::sort(want.begin(), want.end());
      const Status status =
          backend_->device_kv()->ChooseRows(reinterpret_cast<const RowDeviation*>(in->data()), n, got);
      ASSERT_TRUE(status.ok()) << status.message();
      EXPECT_EQ(got, want) << count << " of " << n;
    }
  }
}

// Of attention mass, with deviations and without: those that the CPU's policies choose.
TEST_P(CudaKvTest, TheGreatestMassesAreChosen) {
  for (const std::int64_t n : {1, 129, 300}) {
    std::vector<RowDeviation> deviations(static_cast<std::size_t>(n));
    std::vector<float> mass(static_cast<std::size_t>(n)), both;
    for (float& x : mass) x = static_cast<float>(random_() % 20) / 7;
    for (RowDeviation& d : deviations) d = {static_cast<float>(random_() % 20) / 3, std::nanf("")};
    for (std::size_t i = 0; i < mass.size(); ++i) both.push_back(std::sqrt(deviations[i].squares) * mass[i]);
    const auto masses = Uploaded(std::span<const float>(mass));
    const auto rows = Uploaded(std::span<const RowDeviation>(deviations));
    for (const std::int64_t count : {std::int64_t{0}, std::int64_t{1}, n / 3, n}) {
      for (const bool weighted : {false, true}) {
        std::vector<std::int32_t> got(static_cast<std::size_t>(count), -1);
        const auto* on_device = reinterpret_cast<const RowDeviation*>(rows->data());
        const Status status = backend_->device_kv()->ChooseRowsByMass(reinterpret_cast<const float*>(masses->data()),
                                                                      weighted ? on_device : nullptr, n, got);
        ASSERT_TRUE(status.ok()) << status.message();
        const std::vector<std::int64_t> want = anchors::LargestScores(weighted ? both : mass, count);
        EXPECT_EQ(std::vector<std::int64_t>(got.begin(), got.end()), want) << count << " of " << n;
      }
    }
  }
}

// Every code of E4M3, and what lies between two of them, by the format's definition.
TEST(Fp8Test, RoundsToTheNearestCode) {
  std::vector<double> positive;
  for (int code = 0; code < 0x7f; ++code) {
    const int exponent = code >> 3, mantissa = code & 7;
    const double x = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    EXPECT_EQ(FromFp8(static_cast<std::uint8_t>(code)), x) << code;
    EXPECT_EQ(FromFp8(static_cast<std::uint8_t>(code | 0x80)), -x) << code;
    EXPECT_EQ(Fp8Bits(static_cast<float>(x)), code);
    EXPECT_EQ(Fp8Bits(static_cast<float>(-x)), code | 0x80);
    positive.push_back(x);
  }
  EXPECT_EQ(positive.back(), 448.0);
  for (std::size_t i = 0; i + 1 < positive.size(); ++i) {
    const double middle = (positive[i] + positive[i + 1]) / 2;
    const auto at = static_cast<float>(middle);
    EXPECT_EQ(Fp8Bits(at), i + i % 2) << "ties go to the even code";
    EXPECT_EQ(Fp8Bits(std::nextafter(at, 0.0f)), i);
    EXPECT_EQ(Fp8Bits(std::nextafter(at, 1e9f)), i + 1);
  }
}

INSTANTIATE_TEST_SUITE_P(Cuda, CudaKvTest, kEachHalf, WhereName);

}  // namespace
}  // namespace kvshare::kernels::cuda

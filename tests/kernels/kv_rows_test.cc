// Single rows of paged KV: in and out without loss beyond the dtype's rounding, copies byte for byte, and keys between
// their two frames and between positions, against rotations in double precision.
#include "kernels/kv_rows.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

namespace kvshare::kernels {
namespace {

constexpr int kKvHeads = 3, kHeadDim = 20, kHalf = 8;  // the last four dimensions do not rotate
constexpr std::int64_t kPositions = 4096;
constexpr double kFactor = 1.25;  // yarn's
constexpr std::size_t kRow = kKvHeads * kHeadDim;

class KvRowsTest : public ::testing::TestWithParam<DType> {
 protected:
  KvRowsTest() {
    pages_ = {nullptr, 3, {2, kKvHeads, kHeadDim, GetParam()}};
    bytes_.assign(pages_.layout.page_bytes() * pages_.num_pages, std::byte{0x11});
    pages_.base = bytes_.data();
    for (std::int64_t p = 0; p < kPositions; ++p) {
      for (int j = 0; j < kHalf; ++j) {
        cos_.push_back(static_cast<float>(kFactor * std::cos(Angle(p, j))));
        sin_.push_back(static_cast<float>(kFactor * std::sin(Angle(p, j))));
      }
    }
    rope_ = {cos_, sin_, kPositions, kHalf};
  }
  static double Angle(std::int64_t p, int j) { return static_cast<double>(p) * std::pow(10000.0, -double(j) / kHalf); }

  std::vector<float> Random() {
    std::normal_distribution<float> normal;
    std::vector<float> row(kRow);
    for (float& x : row) x = normal(random_);
    return row;
  }
  // factor * R(position) row.
  static std::vector<double> Turned(const std::vector<float>& row, std::int64_t position, double factor) {
    std::vector<double> out(row.begin(), row.end());
    for (std::size_t head = 0; head < kRow; head += kHeadDim) {
      for (std::size_t j = 0; j < kHalf; ++j) {
        const double c = factor * std::cos(Angle(position, static_cast<int>(j)));
        const double s = factor * std::sin(Angle(position, static_cast<int>(j)));
        const double a = row[head + j], b = row[head + j + kHalf];
        out[head + j] = a * c - b * s;
        out[head + j + kHalf] = b * c + a * s;
      }
    }
    return out;
  }
  static void ExpectNear(const std::vector<float>& got, const std::vector<double>& want) {
    for (std::size_t i = 0; i < kRow; ++i) EXPECT_NEAR(static_cast<double>(got[i]), want[i], 4e-6) << i;
  }

  std::mt19937_64 random_{4};
  std::vector<std::byte> bytes_;
  KvPages pages_;
  std::vector<float> cos_, sin_;
  RopeTable rope_;
};

TEST_P(KvRowsTest, ARowComesBackAsItWasStored) {
  const std::vector<float> k = Random(), v = Random();
  const KvSlot slot{2, 63};
  const std::vector<std::byte> before = bytes_;
  StoreRow(pages_, 1, KvPart::kKey, slot, k);
  StoreRow(pages_, 1, KvPart::kValue, slot, v);
  std::vector<float> k2(kRow), v2(kRow);
  LoadRow(pages_, 1, KvPart::kKey, slot, k2);
  LoadRow(pages_, 1, KvPart::kValue, slot, v2);
  std::size_t changed = 0;
  for (std::size_t i = 0; i < bytes_.size(); ++i) changed += bytes_[i] != before[i] ? 1 : 0;
  EXPECT_LE(changed, 2 * kRow * DTypeBytes(GetParam()));
  if (GetParam() == DType::kF32) {
    EXPECT_EQ(k, k2);
    EXPECT_EQ(v, v2);
    return;
  }
  for (std::size_t i = 0; i < kRow; ++i) {
    EXPECT_NEAR(k[i], k2[i], std::abs(k[i]) * 0x1p-8);
    EXPECT_EQ(std::bit_cast<std::uint32_t>(v2[i]) & 0xffffu, 0u);
  }
  // Ties go to the even neighbour, and no rounding makes a number of NaN.
  std::vector<float> hard(kRow, 1.0f + 0x1p-8f);
  hard[1] = 1.0f + 3 * 0x1p-8f;
  hard[2] = std::bit_cast<float>(0x7f800001u);
  StoreRow(pages_, 0, KvPart::kKey, slot, hard);
  LoadRow(pages_, 0, KvPart::kKey, slot, k2);
  EXPECT_EQ(k2[0], 1.0f);
  EXPECT_EQ(k2[1], 1.0f + 0x1p-6f);
  EXPECT_TRUE(std::isnan(k2[2]));
}

TEST_P(KvRowsTest, CopiesAreByteForByteAndOfTheLayersAsked) {
  for (int layer = 0; layer < 2; ++layer) {
    for (const int offset : {4, 5}) {
      StoreRow(pages_, layer, KvPart::kKey, {0, offset}, Random());
      StoreRow(pages_, layer, KvPart::kValue, {0, offset}, Random());
    }
  }
  const auto row = [&](int layer, KvPart part, KvSlot slot) {
    std::vector<float> out(kRow);
    LoadRow(pages_, layer, part, slot, out);
    return out;
  };
  const std::vector<float> untouched = row(0, KvPart::kKey, {1, 9});
  const KvSlot from[] = {{0, 4}, {0, 5}}, to[] = {{1, 9}, {2, 0}};
  CopyRows(pages_, from, to, 1, 2);
  for (const KvPart part : {KvPart::kKey, KvPart::kValue}) {
    EXPECT_EQ(row(0, part, {1, 9}), untouched);
    for (int i = 0; i < 2; ++i) EXPECT_EQ(row(1, part, to[i]), row(1, part, from[i]));
  }
  CopyRows(pages_, from, to, 0, 1);
  EXPECT_EQ(row(0, KvPart::kValue, {2, 0}), row(0, KvPart::kValue, {0, 5}));
  // In ascending order: a row that is read after it was written gives what was written.
  const KvSlot chain_from[] = {{0, 4}, {0, 5}}, chain_to[] = {{0, 5}, {0, 6}};
  CopyRows(pages_, chain_from, chain_to, 0, 1);
  EXPECT_EQ(row(0, KvPart::kKey, {0, 6}), row(0, KvPart::kKey, {0, 4}));
}

TEST_P(KvRowsTest, KeysTurnAsInDoublePrecision) {
  for (const std::int64_t position : {std::int64_t{0}, std::int64_t{1}, std::int64_t{77}, kPositions - 1}) {
    const std::vector<float> key = Random();
    std::vector<float> stored = key;
    StoredKey(rope_, position, kHeadDim, stored);
    ExpectNear(stored, Turned(key, position, kFactor));
    std::vector<float> back = stored;
    CanonicalKey(rope_, position, kHeadDim, back);
    ExpectNear(back, {key.begin(), key.end()});
    for (const std::int64_t other : {std::int64_t{0}, std::int64_t{500}, kPositions - 1}) {
      std::vector<float> moved = stored;
      MoveKey(rope_, other - position, kHeadDim, moved);
      ExpectNear(moved, Turned(key, other, kFactor));  // the factor once, not twice
    }
  }
}

TEST_P(KvRowsTest, DeviationIsWhatItSays) {
  const std::vector<float> fresh = Random();
  std::vector<std::vector<float>> stored = {fresh, Random(), std::vector<float>(kRow, 0.0f)};
  for (int i = 0; i < 3; ++i) StoreRow(pages_, 1, KvPart::kValue, {1, i}, stored[static_cast<std::size_t>(i)]);
  std::vector<float> rows;
  for (int i = 0; i < 3; ++i) rows.insert(rows.end(), fresh.begin(), fresh.end());
  const MatrixView view{reinterpret_cast<std::byte*>(rows.data()), DType::kF32, 3, kRow, kRow};
  const KvSlot slots[] = {{1, 0}, {1, 1}, {1, 2}};
  RowDeviation out[3];
  ValueDeviation(view, pages_, 1, slots, out);
  for (int i = 0; i < 3; ++i) {
    LoadRow(pages_, 1, KvPart::kValue, slots[i], stored[static_cast<std::size_t>(i)]);
    double squares = 0, dot = 0, a = 0, b = 0;
    for (std::size_t j = 0; j < kRow; ++j) {
      const double x = fresh[j], y = stored[static_cast<std::size_t>(i)][j];
      squares += (x - y) * (x - y);
      dot += x * y;
      a += x * x;
      b += y * y;
    }
    EXPECT_NEAR(out[i].squares, squares, 1e-5 * squares);
    EXPECT_NEAR(out[i].cosine, b > 0 ? dot / std::sqrt(a * b) : 1.0, 1e-6);
  }
  EXPECT_EQ(out[2].cosine, 1.0f);
}

INSTANTIATE_TEST_SUITE_P(DTypes, KvRowsTest, ::testing::Values(DType::kF32, DType::kBf16),
                         [](const auto& test) { return std::string(DTypeName(test.param)); });

}  // namespace
}  // namespace kvshare::kernels

#include "anchors/q8.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace kvshare::anchors {
namespace {

std::vector<Q8Block> Encode(const std::vector<float>& values) {
  // Poison: what is not written shows.
  std::vector<Q8Block> blocks(Q8Blocks(values.size()), Q8Block{.scale = 0x7fff});
  for (Q8Block& block : blocks) block.codes.fill(99);
  EncodeQ8(values, blocks.data());
  return blocks;
}

std::vector<float> Decode(const std::vector<Q8Block>& blocks, std::size_t size) {
  std::vector<float> values(size, 0.0f);
  AddQ8(blocks.data(), 1.0f, values);
  return values;
}

TEST(Q8Test, OffByHalfAScaleOfItsBlock) {
  std::mt19937 rng(1);
  for (const std::size_t size : {1u, 31u, 32u, 33u, 192u, 200u}) {
    for (const float magnitude : {1e-30f, 0.01f, 3.0f, 1e30f}) {
      std::normal_distribution<float> normal(0, magnitude);
      std::vector<float> values(size);
      for (float& value : values) value = normal(rng);
      const std::vector<Q8Block> blocks = Encode(values);
      ASSERT_TRUE(AreQ8(blocks));
      const std::vector<float> decoded = Decode(blocks, size);
      for (std::size_t i = 0; i < size; ++i) {
        const std::size_t begin = i / kQ8Values * kQ8Values, end = std::min(begin + kQ8Values, size);
        double largest = 0;
        for (std::size_t j = begin; j < end; ++j) largest = std::max<double>(largest, std::abs(values[j]));
        // A bfloat16 scale is up to 1/128 larger than it had to be.
        EXPECT_NEAR(decoded[i], values[i], largest / 254 * 1.009) << size << " " << i;
      }
    }
  }
}

TEST(Q8Test, ExtremesZeroesAndTheRowsEnd) {
  const float most = std::numeric_limits<float>::max(), least = std::numeric_limits<float>::denorm_min();
  EXPECT_EQ(Decode(Encode({0, -0.0f, 0}), 3), (std::vector<float>{0, 0, 0}));
  for (const float value : {most, -most, least, -least, 1.0f, -127.0f}) {
    const std::vector<Q8Block> blocks = Encode({0, value});
    ASSERT_TRUE(AreQ8(blocks)) << value;
    EXPECT_EQ(Decode(blocks, 2)[0], 0);
    // What is too small for a scale of its own may vanish.
    EXPECT_NEAR(Decode(blocks, 2)[1], value, std::max(std::abs(value) / 127.0, 4e-37)) << value;
    for (std::size_t j = 2; j < kQ8Values; ++j) EXPECT_EQ(blocks[0].codes[j], 0) << "beyond the row";
  }
}

TEST(Q8Test, SumsAreThoseInDoublePrecision) {
  std::mt19937 rng(2);
  std::normal_distribution<float> normal(0, 1);
  for (const std::size_t size : {1u, 32u, 45u, 192u}) {
    std::vector<float> row(size), values(size);
    for (float& value : row) value = normal(rng);
    for (float& value : values) value = normal(rng);
    const std::vector<Q8Block> blocks = Encode(values);
    const std::vector<float> decoded = Decode(blocks, size);
    double sum = 0, squares = 0;
    for (std::size_t i = 0; i < size; ++i) {
      const double difference = static_cast<double>(row[i]) - decoded[i];
      sum += std::abs(difference);
      squares += difference * difference;
    }
    EXPECT_NEAR(SumOfDifferences(row, blocks.data()), sum, 1e-5 * sum);
    EXPECT_NEAR(SumOfSquaredDifferences(row, blocks.data()), squares, 1e-5 * squares);
    std::vector<float> added = row;
    AddQ8(blocks.data(), -0.25f, added);
    for (std::size_t i = 0; i < size; ++i) EXPECT_NEAR(added[i], row[i] - 0.25 * decoded[i], 1e-6);
  }
}

TEST(Q8Test, InfiniteAndNegativeScalesAreNot) {
  for (const std::uint16_t scale : {0x7f80, 0x7fc0, 0x8000, 0xff80, 0xffff}) {
    EXPECT_FALSE(AreQ8(std::vector<Q8Block>{{}, {.scale = scale}})) << scale;
  }
  EXPECT_TRUE(AreQ8(std::vector<Q8Block>{{}, {.scale = 0x7f7f}}));
}

}  // namespace
}  // namespace kvshare::anchors

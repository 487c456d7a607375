// bfloat16 and binary16 against their definitions.
#include "kernels/half.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/round_weights.h"

namespace kvshare::kernels {
namespace {

TEST(HalfTest, Bf16RoundsToNearestEven) {
  std::mt19937 random(7);
  for (int i = 0; i < 100000; ++i) {
    const auto bits = static_cast<std::uint32_t>(random());
    const float value = std::bit_cast<float>(bits);
    const std::uint32_t got = Bf16Bits(value);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(FromBf16(got)));
      continue;
    }
    const std::uint32_t below = bits & 0xffff0000u, above = below + 0x10000u, rest = bits & 0xffffu;
    const bool up = rest > 0x8000u || (rest == 0x8000u && (below & 0x10000u) != 0);
    ASSERT_EQ(got << 16, up ? above : below) << bits;
  }
}

// Every number of the type from its fields, and what lies half way to the next.
TEST(HalfTest, F16IsIeeesBinary16) {
  const auto value = [](int code) {
    const int exponent = code >> 10, mantissa = code & 0x3ff;
    return exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  };
  for (int code = 0; code < 0x7c00; ++code) {
    const auto bits = static_cast<std::uint32_t>(code);
    const auto x = static_cast<float>(value(code)), next = static_cast<float>(value(code + 1));
    ASSERT_EQ(FromF16(bits), x) << code;
    ASSERT_EQ(std::bit_cast<std::uint32_t>(FromF16(bits | 0x8000u)), std::bit_cast<std::uint32_t>(-x)) << code;
    ASSERT_EQ(F16Bits(x), bits);
    ASSERT_EQ(F16Bits(-x), bits | 0x8000u);
    const float middle = x + (next - x) / 2;  // of the last: 65520, from which on it is infinity
    ASSERT_EQ(F16Bits(middle), bits + (bits & 1u)) << "ties go to the even one";
    ASSERT_EQ(F16Bits(std::nextafter(middle, 0.0f)), bits);
    ASSERT_EQ(F16Bits(std::nextafter(middle, 1e9f)), bits + 1);
  }
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(FromF16(0x7c00), infinity);
  EXPECT_EQ(FromF16(0xfc00), -infinity);
  EXPECT_EQ(F16Bits(infinity), 0x7c00u);
  EXPECT_EQ(F16Bits(-1e9f), 0xfc00u);
  EXPECT_EQ(F16Bits(std::nanf("")), 0x7fffu);
  for (std::uint32_t mantissa = 1; mantissa < 0x400; ++mantissa) ASSERT_TRUE(std::isnan(FromF16(0x7c00u | mantissa)));
}

TEST(HalfTest, AWeightBeyondTheRangeIsFound) {
  std::vector<float> weights = {1.0f, -65519.0f, std::nanf(""), std::numeric_limits<float>::infinity(), 0.3f};
  std::vector<std::uint16_t> rounded(weights.size());
  EXPECT_EQ(RoundWeights(DType::kF16, weights, rounded.data()), nullptr);
  EXPECT_EQ(rounded[1], 0xfbffu);
  EXPECT_EQ(FromF16(rounded[4]), 0.300048828125f);
  weights[4] = -65520.0f;
  EXPECT_EQ(RoundWeights(DType::kF16, weights, rounded.data()), &weights[4]);
  EXPECT_EQ(RoundWeights(DType::kBf16, weights, rounded.data()), nullptr);
  EXPECT_EQ(BeyondRange(DType::kF16, weights[4]).message(),
            "a weight of -65520.000000 is beyond the range of float16; use another dtype");
}

}  // namespace
}  // namespace kvshare::kernels

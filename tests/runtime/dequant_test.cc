#include "runtime/dequant.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <random>

#include "tests/testing/status_matchers.h"

namespace kvshare::runtime {
namespace {

// IEEE binary16 by its definition.
double HalfValue(std::uint16_t bits) {
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

std::vector<float> Decode(const char* type, const std::vector<std::uint8_t>& bytes, std::int64_t cols) {
  for (std::uint32_t id = 0; id < 64; ++id) {
    const TensorType* found = FindGgufType(id);
    if (found == nullptr || std::string(found->name) != type) continue;
    const TensorView view{found, {cols}, std::as_bytes(std::span(bytes))};
    EXPECT_EQ(TensorBytes(*found, view.shape).value(), bytes.size());
    std::vector<float> out(static_cast<std::size_t>(cols));
    DecodeRows(view, 0, 1, out.data());
    return out;
  }
  ADD_FAILURE() << "no type " << type;
  return std::vector<float>(static_cast<std::size_t>(cols));
}

std::vector<std::uint8_t> RandomBytes(std::size_t size, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::uint8_t> bytes(size);
  for (auto& b : bytes) b = static_cast<std::uint8_t>(random());
  return bytes;
}

// A scale that is a finite half: its exponent is kept below 31.
double PutScale(std::vector<std::uint8_t>* bytes, std::size_t at) {
  (*bytes)[at + 1] &= 0xbf;
  return HalfValue(static_cast<std::uint16_t>((*bytes)[at] | ((*bytes)[at + 1] << 8)));
}

TEST(DequantTest, EveryHalfDecodesToItsValue) {
  std::vector<std::uint8_t> bytes;
  for (int h = 0; h < 65536; ++h) {
    bytes.push_back(static_cast<std::uint8_t>(h));
    bytes.push_back(static_cast<std::uint8_t>(h >> 8));
  }
  const std::vector<float> out = Decode("F16", bytes, 65536);
  for (int h = 0; h < 65536; ++h) {
    const double want = HalfValue(static_cast<std::uint16_t>(h));
    const float got = out[static_cast<std::size_t>(h)];
    if (std::isnan(want)) {
      EXPECT_TRUE(std::isnan(got)) << h;
    } else {
      ASSERT_EQ(got, want) << h;
      ASSERT_EQ(std::signbit(got), std::signbit(want)) << h;
    }
  }
}

TEST(DequantTest, PlainTypesAreExact) {
  const std::vector<float> values = {0.0f, -0.0f, 1.5f, -3.25e7f, 0x1p-130f, 3.0e38f};
  std::vector<std::uint8_t> f32(values.size() * 4), bf16;
  std::memcpy(f32.data(), values.data(), f32.size());
  EXPECT_EQ(Decode("F32", f32, 6), values);
  for (std::size_t i = 0; i < values.size(); ++i) bf16.insert(bf16.end(), &f32[4 * i + 2], &f32[4 * i + 2] + 2);
  const std::vector<float> rounded = Decode("BF16", bf16, 6);
  for (std::size_t i = 0; i < values.size(); ++i) {
    EXPECT_EQ(std::bit_cast<std::uint32_t>(rounded[i]), std::bit_cast<std::uint32_t>(values[i]) & 0xffff0000u);
  }
}

// The layouts straight from ggml's struct block_q*; fp32 rounds the product once and the sum once.
TEST(DequantTest, QuantisedBlocksFollowTheirLayout) {
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    std::vector<std::uint8_t> q40 = RandomBytes(36, seed), q41 = RandomBytes(40, seed), q80 = RandomBytes(68, seed);
    std::vector<float> want40(64), want41(64), want80(64);
    for (std::size_t b = 0; b < 2; ++b) {
      const auto d40 = static_cast<float>(PutScale(&q40, 18 * b));
      const auto d41 = static_cast<float>(PutScale(&q41, 20 * b)), m41 = static_cast<float>(PutScale(&q41, 20 * b + 2));
      const auto d80 = static_cast<float>(PutScale(&q80, 34 * b));
      for (std::size_t i = 0; i < 32; ++i) {
        const int shift = i < 16 ? 0 : 4;
        const int n40 = (q40[18 * b + 2 + i % 16] >> shift) & 15, n41 = (q41[20 * b + 4 + i % 16] >> shift) & 15;
        const int n80 = static_cast<std::int8_t>(q80[34 * b + 2 + i]);
        want40[32 * b + i] = d40 * static_cast<float>(n40 - 8);
        const float product = d41 * static_cast<float>(n41);
        want41[32 * b + i] = product + m41;
        want80[32 * b + i] = d80 * static_cast<float>(n80);
      }
    }
    EXPECT_EQ(Decode("Q4_0", q40, 64), want40) << "seed " << seed;
    EXPECT_EQ(Decode("Q4_1", q41, 64), want41) << "seed " << seed;
    EXPECT_EQ(Decode("Q8_0", q80, 64), want80) << "seed " << seed;
  }
}

TEST(DequantTest, RowsDecodeAlone) {
  const std::vector<std::uint8_t> bytes = RandomBytes(5 * 34, 3);
  const TensorView all{FindGgufType(8), {5, 32}, std::as_bytes(std::span(bytes))};
  std::vector<float> whole(160), row(32);
  DecodeRows(all, 0, 5, whole.data());
  for (std::int64_t r = 0; r < 5; ++r) {
    DecodeRows(all, r, r + 1, row.data());
    EXPECT_EQ(std::memcmp(row.data(), whole.data() + 32 * r, 128), 0) << r;
  }
}

// Found by fuzzing: an empty tensor has no memory behind it, and neither has what it decodes to.
TEST(DequantTest, EmptyTensorsTouchNoMemory) {
  for (const std::uint32_t type : {0u, 1u, 8u}) {
    DecodeRows({FindGgufType(type), {0, 32}, {}}, 0, 0, nullptr);
    DecodeRows({FindGgufType(type), {4, 0}, {}}, 0, 4, nullptr);
  }
  float untouched = 7;
  DecodeRows({FindGgufType(0), {0}, {}}, 0, 1, &untouched);
  EXPECT_EQ(untouched, 7);
}

TEST(DequantTest, SizesThatCannotBeAreRefused) {
  const TensorType& q8 = *FindGgufType(8);
  EXPECT_EQ(TensorBytes(q8, std::vector<std::int64_t>{3, 64}).value(), 3u * 2 * 34);
  EXPECT_EQ(TensorBytes(q8, std::vector<std::int64_t>{0, 32}).value(), 0u);
  KVS_EXPECT_FAILS(TensorBytes(q8, std::vector<std::int64_t>{3, 33}), StatusCode::kInvalidArgument, "blocks");
  KVS_EXPECT_FAILS(TensorBytes(q8, std::vector<std::int64_t>{-1, 32}), StatusCode::kInvalidArgument, "negative");
  const std::int64_t big = std::int64_t{1} << 31;
  KVS_EXPECT_FAILS(TensorBytes(q8, std::vector<std::int64_t>{big, big}), StatusCode::kInvalidArgument, "memory");
  KVS_EXPECT_FAILS(TensorBytes(*FindGgufType(0), std::vector<std::int64_t>{big, big, big}),
                   StatusCode::kInvalidArgument, "memory");
}

}  // namespace
}  // namespace kvshare::runtime

#include "anchors/q8.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace kvshare::anchors {
namespace {

constexpr float kLargestCode = 127;

float Widen(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

// The least bfloat16 that is not below `value`, so that no code passes 127; `value` finite, not negative.
std::uint16_t NarrowUp(float value) {
  return static_cast<std::uint16_t>((std::bit_cast<std::uint32_t>(value) + 0xffffu) >> 16);
}

// Side by side: what compilers turn into vectors.
constexpr std::size_t kSums = 8;
static_assert(kQ8Values % kSums == 0);

template <typename Term>
double SumOverRow(std::span<const float> row, const Q8Block* blocks, Term term) {
  float sums[kSums] = {};
  std::size_t i = 0;
  for (; i + kQ8Values <= row.size(); i += kQ8Values, ++blocks) {
    const float scale = Widen(blocks->scale);
    for (std::size_t j = 0; j < kQ8Values; ++j) {
      sums[j % kSums] += term(row[i + j] - scale * static_cast<float>(blocks->codes[j]));
    }
  }
  double sum = 0;
  for (const float part : sums) sum += part;
  for (std::size_t j = 0; i + j < row.size(); ++j) {
    sum += term(row[i + j] - Widen(blocks->scale) * static_cast<float>(blocks->codes[j]));
  }
  return sum;
}

}  // namespace

void EncodeQ8(std::span<const float> values, Q8Block* blocks) {
  for (; !values.empty(); values = values.subspan(std::min(values.size(), kQ8Values)), ++blocks) {
    std::array<float, kQ8Values> block{};
    std::copy_n(values.begin(), std::min(values.size(), kQ8Values), block.begin());
    std::int32_t largest = 0;  // magnitudes are in the order of their bits
    for (const float value : block) largest = std::max(largest, std::bit_cast<std::int32_t>(std::abs(value)));
    *blocks = {.scale = NarrowUp(std::bit_cast<float>(largest) / kLargestCode)};
    const float inverse = 1 / Widen(blocks->scale);
    if (!(inverse <=
          std::numeric_limits<float>::max())) {  // the scale is 0, or so small that the values may as well be
      blocks->scale = 0;
      continue;
    }
    // Added to 1.5 * 2^23, a number is rounded to nearest, ties to even, and its last bits are those of the integer.
    for (std::size_t j = 0; j < kQ8Values; ++j) {
      blocks->codes[j] = static_cast<std::int8_t>(std::bit_cast<std::int32_t>(block[j] * inverse + 12582912.0f));
    }
  }
}

void AddQ8(const Q8Block* blocks, float weight, std::span<float> row) {
  for (; !row.empty(); row = row.subspan(std::min(row.size(), kQ8Values)), ++blocks) {
    const float scale = weight * Widen(blocks->scale);
    const std::size_t count = std::min(row.size(), kQ8Values);
    for (std::size_t j = 0; j < count; ++j) row[j] += scale * static_cast<float>(blocks->codes[j]);
  }
}

double SumOfDifferences(std::span<const float> row, const Q8Block* blocks) {
  return SumOverRow(row, blocks, [](float difference) { return std::abs(difference); });
}

double SumOfSquaredDifferences(std::span<const float> row, const Q8Block* blocks) {
  return SumOverRow(row, blocks, [](float difference) { return difference * difference; });
}

bool AreQ8(std::span<const Q8Block> blocks) {
  constexpr std::uint16_t kInfinity = 0x7f80;
  return std::all_of(blocks.begin(), blocks.end(), [](const Q8Block& block) { return block.scale < kInfinity; });
}

}  // namespace kvshare::anchors

// Values of a byte each, in blocks of 32 that share a scale: the form in which anchors are kept.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kvshare::anchors {

inline constexpr std::size_t kQ8Values = 32;

// Value i is scale times codes[i], codes within -127 to 127: off by half a scale at most, 0.4 % of the block's largest
// magnitude.
struct Q8Block {
  std::uint16_t scale = 0;  // bfloat16, finite, not negative
  std::array<std::int8_t, kQ8Values> codes{};

  bool operator==(const Q8Block&) const = default;
};
static_assert(sizeof(Q8Block) == 34, "blocks are saved as they lie in memory");

// Blocks of a row; the codes beyond its end are 0.
constexpr std::size_t Q8Blocks(std::size_t values) { return (values + kQ8Values - 1) / kQ8Values; }

// `values` finite, in blocks[0 .. Q8Blocks(values.size())). The same on every machine.
void EncodeQ8(std::span<const float> values, Q8Block* blocks);

// row[i] += weight * value i.
void AddQ8(const Q8Block* blocks, float weight, std::span<float> row);

// Sums of |row[i] - value i|, and of its square: fp32 in eight sums side by side, added up in order in double
// precision.
double SumOfDifferences(std::span<const float> row, const Q8Block* blocks);
double SumOfSquaredDifferences(std::span<const float> row, const Q8Block* blocks);

// Whether every scale is one that EncodeQ8 could have written.
bool AreQ8(std::span<const Q8Block> blocks);

}  // namespace kvshare::anchors

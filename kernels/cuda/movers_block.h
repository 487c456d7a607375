// Kernels that move KV, code it in bytes and choose rows: each one block of kRowThreads threads.
#pragma once

#include "kernels/cuda/mover_args.h"
#include "kernels/cuda/row_ops_block.h"

namespace kvshare::kernels::cuda {

template <class Lane>
KVS_DEV void CopyRowsBlock(const CopyRowsArgs& a, Lane& lane) {
  const SlotView from = a.from[lane.block_x()], to = a.to[lane.block_x()];
  const std::int64_t layer = (a.layer_begin + lane.block_y()) * std::int64_t{a.slabs_per_layer} * a.slab_bytes;
  const std::byte* source = a.pages + from.page * a.page_bytes + layer + from.offset * a.row_bytes;
  std::byte* target = a.pages + to.page * a.page_bytes + layer + to.offset * a.row_bytes;
  const std::int64_t chunks = a.row_bytes / 16;
  for (std::int64_t i = lane.thread(); i < a.slabs_per_layer * chunks; i += kRowThreads) {
    const std::int64_t at = i / chunks * a.slab_bytes + i % chunks * 16;
    CopyChunk(target + at, source + at);
  }
}

template <class Lane>
KVS_DEV void CopyPagesBlock(const CopyPagesArgs& a, Lane& lane) {
  const std::int64_t piece = lane.block_y() * kPieceBytes;
  const std::int64_t bytes = a.page_bytes - piece < kPieceBytes ? a.page_bytes - piece : kPieceBytes;
  std::byte* page = a.pages + a.index[lane.block_x()] * a.page_bytes + piece;
  std::byte* block = a.block + lane.block_x() * a.page_bytes + piece;
  CopyChunks(a.gather ? block : page, a.gather ? page : block, bytes, lane.thread(), kRowThreads);
}

// A row's scale is its greatest |x| over the greatest code; a row of zeros has the scale 0.
template <class Lane>
KVS_DEV void QuantizeRow(const CodePagesArgs& a, const std::uint16_t* row, std::uint8_t* codes, float* scale,
                         Lane& lane) {
  const int l = lane.thread() % 32;
  float top = 0;
  bool whole = true;  // no infinity, no NaN
  for (int j = l; j < a.head_dim; j += 32) {
    const float x = FromHalf(a.dtype, row[j]);
    const float size = x < 0 ? -x : x;
    whole = whole && (row[j] & HalfExponent(a.dtype)) != HalfExponent(a.dtype);
    if (size > top) top = size;
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = lane.ShuffleXor(top, mask);
    if (other > top) top = other;
  }
  const bool bad = lane.Any(!whole);
  const float greatest = a.fp8 ? kGreatestFp8 : kGreatestInt8;
  const float unit = top / greatest;
  if (l == 0) *scale = bad ? __builtin_nanf("") : unit;
  for (int j = l; j < a.head_dim; j += 32) {
    // Divided, not multiplied by the inverse: of tiny rows that would be infinite.
    float x = bad || unit == 0 ? 0.0f : FromHalf(a.dtype, row[j]) / unit;
    if (x > greatest) x = greatest;
    if (x < -greatest) x = -greatest;
    codes[j] = a.fp8 ? Fp8Bits(x) : static_cast<std::uint8_t>(static_cast<std::int8_t>(RoundEven(x)));
  }
}

template <class Lane>
KVS_DEV void CodePagesBlock(const CodePagesArgs& a, Lane& lane) {
  const std::int64_t slab_codes = kPageRows * (a.head_dim + std::int64_t{sizeof(float)});
  std::byte* slab = a.pages + a.index[lane.block_x()] * a.page_bytes + lane.block_y() * a.slab_bytes;
  std::byte* coded = a.block + (static_cast<std::int64_t>(lane.block_x()) * a.slabs + lane.block_y()) * slab_codes;
  float* scales = reinterpret_cast<float*>(coded + kPageRows * a.head_dim);
  for (int token = lane.thread() / 32; token < kPageRows; token += kRowThreads / 32) {
    auto* row = reinterpret_cast<std::uint16_t*>(slab) + token * a.head_dim;
    auto* codes = reinterpret_cast<std::uint8_t*>(coded) + token * a.head_dim;
    if (a.quantize) {
      QuantizeRow(a, row, codes, scales + token, lane);
      continue;
    }
    for (int j = lane.thread() % 32; j < a.head_dim; j += 32) {
      const float x = a.fp8 ? FromFp8(codes[j]) : static_cast<float>(static_cast<std::int8_t>(codes[j]));
      row[j] = static_cast<std::uint16_t>(HalfBits(a.dtype, x * scales[token]));
    }
  }
}

// Four sums over a row, each thread every kRowThreads-th element, added as RmsNormBlock adds its one.
template <class Lane>
KVS_DEV void DeviationBlock(const DeviationArgs& a, Lane& lane) {
  const std::int64_t row = lane.block_x();
  const SlotView slot = a.stored[row];
  float sums[4] = {0, 0, 0, 0};  // (fresh - stored)^2, fresh stored, fresh^2, stored^2
  for (int i = lane.thread(); i < a.pages.kv_heads * a.head_dim; i += kRowThreads) {
    const auto* slab = reinterpret_cast<const std::uint16_t*>(a.pages.Slab(slot.page, 1, i / a.head_dim));
    const float x = a.fresh[row * a.fresh_stride + i];
    const float y = FromHalf(a.pages.dtype, slab[slot.offset * a.head_dim + i % a.head_dim]);
    sums[0] = lane.Fma(x - y, x - y, sums[0]);
    sums[1] = lane.Fma(x, y, sums[1]);
    sums[2] = lane.Fma(x, x, sums[2]);
    sums[3] = lane.Fma(y, y, sums[3]);
  }
  float* warps = reinterpret_cast<float*>(lane.shared());  // [4 warps][4]
  for (int k = 0; k < 4; ++k) {
    sums[k] = WarpSum(lane, sums[k]);
    if (lane.thread() % 32 == 0) warps[lane.thread() / 32 * 4 + k] = sums[k];
  }
  lane.Sync();
  if (lane.thread() != 0) return;
  for (int k = 0; k < 4; ++k) sums[k] = (warps[k] + warps[4 + k]) + (warps[8 + k] + warps[12 + k]);
  a.out[2 * row] = sums[0];
  a.out[2 * row + 1] = sums[2] > 0 && sums[3] > 0 ? sums[1] / (lane.Sqrt(sums[2]) * lane.Sqrt(sums[3])) : 1.0f;
}
inline constexpr int kDeviationShared = 64;

template <class Lane>
KVS_DEV void ScoreBlock(const ScoreArgs& a, Lane& lane) {
  const std::int64_t i = static_cast<std::int64_t>(lane.block_x()) * kRowThreads + lane.thread();
  if (i < a.n) a.scores[i] = lane.Sqrt(a.deviations[2 * i]) * a.mass[i];
}

// Ascending with the value; a NaN beyond all.
KVS_HD float ChooseKey(float score) { return score == score ? score : __builtin_inff(); }

// Counting who is before it takes n steps a row: for the tens of thousands of rows of a prompt less than one launch
// more would cost, and the order of equals is plain.
template <class Lane>
KVS_DEV void RankBlock(const ChooseArgs& a, Lane& lane) {
  const std::int64_t i = static_cast<std::int64_t>(lane.block_x()) * kRowThreads + lane.thread();
  if (i >= a.n) return;
  const float mine = ChooseKey(a.scores[i * a.stride]);
  std::int64_t before = 0;
  for (std::int64_t j = 0; j < a.n; ++j) {
    const float other = ChooseKey(a.scores[j * a.stride]);
    before += other > mine || (other == mine && j < i);
  }
  a.chosen[i] = before < a.count ? 1 : 0;
}

template <class Lane>
KVS_DEV void PlaceBlock(const ChooseArgs& a, Lane& lane) {
  const std::int64_t i = static_cast<std::int64_t>(lane.block_x()) * kRowThreads + lane.thread();
  if (i >= a.n || a.chosen[i] == 0) return;
  std::int64_t at = 0;
  for (std::int64_t j = 0; j < i; ++j) at += a.chosen[j];
  a.out[at] = static_cast<std::int32_t>(i);
}

}  // namespace kvshare::kernels::cuda

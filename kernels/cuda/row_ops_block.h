// The row-local operations, each one block of kRowThreads threads. Sums inside a row have one order: each thread every
// kRowThreads-th element ascending, a tree over the warp, then the warps pairwise.
#pragma once

#include "kernels/cuda/row_ops_args.h"

namespace kvshare::kernels::cuda {

inline constexpr int kRowThreads = 128;
inline constexpr int kRowShared = 16;  // bytes of shared memory

KVS_DEV void CopyChunks(std::byte* to, const std::byte* from, std::int64_t bytes, int thread, int threads) {
  for (std::int64_t i = thread; i < bytes / 16; i += threads) {
    CopyChunk(to + 16 * i, from + 16 * i);
  }
}

KVS_DEV void StoreElement(void* out, DType dtype, std::int64_t i, float x) {
  if (dtype == DType::kF32) {
    static_cast<float*>(out)[i] = x;
  } else {
    static_cast<std::uint16_t*>(out)[i] = static_cast<std::uint16_t>(HalfBits(dtype, x));
  }
}

template <class Lane>
KVS_DEV float WarpSum(Lane& lane, float x) {
  for (int mask = 16; mask > 0; mask /= 2) x += lane.ShuffleXor(x, mask);
  return x;
}

template <class Lane>
KVS_DEV void EmbedBlock(const EmbedArgs& a, Lane& lane) {
  const std::int64_t row = lane.block_x();
  const std::int64_t from = static_cast<std::int64_t>(a.ids[row]) * a.table_stride;
  for (std::int64_t c = lane.thread(); c < a.cols; c += kRowThreads) {
    a.out[row * a.out_stride + c] = a.table_dtype == DType::kF32
                                        ? static_cast<const float*>(a.table)[from + c]
                                        : FromHalf(a.table_dtype, static_cast<const std::uint16_t*>(a.table)[from + c]);
  }
}

template <class Lane>
KVS_DEV void RmsNormBlock(const RmsNormArgs& a, Lane& lane) {
  const float* x = a.x + lane.block_x() * a.x_stride;
  float sum = 0;
  for (std::int64_t c = lane.thread(); c < a.cols; c += kRowThreads) sum = lane.Fma(x[c], x[c], sum);
  sum = WarpSum(lane, sum);
  float* warps = reinterpret_cast<float*>(lane.shared());
  if (lane.thread() % 32 == 0) warps[lane.thread() / 32] = sum;
  lane.Sync();
  const float mean = ((warps[0] + warps[1]) + (warps[2] + warps[3])) / static_cast<float>(a.cols);
  const float scale = 1.0f / lane.Sqrt(mean + a.eps);
  const std::int64_t out = lane.block_x() * a.out_stride;
  for (std::int64_t c = lane.thread(); c < a.cols; c += kRowThreads) {
    StoreElement(a.out, a.out_dtype, out + c, x[c] * scale * a.weight[c]);
  }
}

// What x is multiplied with in the norm of one head, by a whole warp.
template <class Lane>
KVS_DEV float HeadScale(const float* x, int head_dim, float eps, Lane& lane) {
  float sum = 0;
  for (int j = lane.thread() % 32; j < head_dim; j += 32) sum = lane.Fma(x[j], x[j], sum);
  return 1.0f / lane.Sqrt(WarpSum(lane, sum) / static_cast<float>(head_dim) + eps);
}

template <class Lane>
KVS_DEV void StoreKvBlock(const StoreKvArgs& a, Lane& lane) {
  const std::int64_t row = lane.block_x();
  const int d = a.head_dim, half = a.rope.half, l = lane.thread() % 32;
  const int first_warp = lane.thread() / 32, warps = kRowThreads / 32;
  float* q = a.qkv + row * a.qkv_stride;
  float* keys = q + static_cast<std::int64_t>(a.num_heads) * d;
  const float* values = keys + static_cast<std::int64_t>(a.pages.kv_heads) * d;
  for (int h = first_warp; a.q_norm != nullptr && h < a.num_heads; h += warps) {
    float* x = q + static_cast<std::int64_t>(h) * d;
    const float scale = HeadScale(x, d, a.eps, lane);
    for (int j = l; j < d; j += 32) x[j] = x[j] * scale * a.q_norm[j];
  }
  const SlotView slot = a.slots[row];
  const std::int64_t position = a.positions[row];
  const auto rounded = [&](float x) { return static_cast<std::uint16_t>(HalfBits(a.pages.dtype, x)); };
  for (int h = first_warp; h < a.pages.kv_heads; h += warps) {
    float* k = keys + static_cast<std::int64_t>(h) * d;
    float scale = 1;
    if (a.k_norm != nullptr) scale = HeadScale(k, d, a.eps, lane);
    std::uint16_t* to_k = nullptr;
    if (slot.page != kNoPage) {
      to_k = reinterpret_cast<std::uint16_t*>(a.pages.Slab(slot.page, 0, h)) + slot.offset * d;
      auto* to_v = reinterpret_cast<std::uint16_t*>(a.pages.Slab(slot.page, 1, h)) + slot.offset * d;
      const float* v = values + static_cast<std::int64_t>(h) * d;
      for (int j = l; j < d; j += 32) to_v[j] = rounded(v[j]);
    }
    const auto normed = [&](int j) {
      if (a.k_norm == nullptr) return k[j];
      return k[j] = k[j] * scale * a.k_norm[j];
    };
    for (int j = l; j < half; j += 32) {  // each element is one lane's: nothing to wait for
      const float low = normed(j), high = normed(j + half);
      if (to_k == nullptr) continue;
      const float c = a.rope.cos[position * half + j], s = a.rope.sin[position * half + j];
      to_k[j] = rounded(low * c - high * s);
      to_k[j + half] = rounded(high * c + low * s);
    }
    for (int j = 2 * half + l; j < d; j += 32) {
      const float x = normed(j);
      if (to_k != nullptr) to_k[j] = rounded(x);
    }
  }
}

template <class Lane>
KVS_DEV void SwiGluBlock(const SwiGluArgs& a, Lane& lane) {
  const float* gate = a.gate_up + lane.block_x() * a.stride;
  const float* up = gate + a.cols;
  const std::int64_t out = lane.block_x() * a.out_stride;
  for (std::int64_t c = lane.thread(); c < a.cols; c += kRowThreads) {
    StoreElement(a.out, a.out_dtype, out + c, gate[c] / (1.0f + lane.Exp(-gate[c])) * up[c]);
  }
}

template <class Lane>
KVS_DEV void AddBiasBlock(const AddBiasArgs& a, Lane& lane) {
  float* out = a.out + lane.block_x() * a.out_stride;
  for (std::int64_t c = lane.thread(); c < a.cols; c += kRowThreads) out[c] += a.bias[c];
}

template <class Lane>
KVS_DEV void CopyPageRowsBlock(const CopyPageRowsArgs& a, Lane& lane) {
  const std::int64_t slab = lane.block_x() * a.slab_bytes;
  CopyChunks(a.to + slab, a.from + slab, a.bytes, lane.thread(), kRowThreads);
}

}  // namespace kvshare::kernels::cuda

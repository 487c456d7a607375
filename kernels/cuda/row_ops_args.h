// What the row-local CUDA kernels are handed. Pointers are the device's; strides and widths in elements.
#pragma once

#include "kernels/cuda/attention_args.h"

namespace kvshare::kernels::cuda {

// out[r] = table[ids[r]], widened to fp32. One block a row.
struct EmbedArgs {
  const std::int32_t* ids = nullptr;
  const void* table = nullptr;
  std::int64_t table_stride = 0;
  DType table_dtype = DType::kBf16;
  float* out = nullptr;
  std::int64_t out_stride = 0;
  std::int64_t cols = 0;
  std::int64_t rows = 0;
};

// out = x / sqrt(mean(x^2) + eps) * weight. One block a row.
struct RmsNormArgs {
  const float* x = nullptr;
  std::int64_t x_stride = 0;
  const float* weight = nullptr;
  float eps = 0;
  void* out = nullptr;
  std::int64_t out_stride = 0;
  DType out_dtype = DType::kBf16;
  std::int64_t cols = 0;
  std::int64_t rows = 0;
};

// KvSlot as the device reads it; page kNoPage: the row is not stored.
inline constexpr std::uint32_t kNoPage = ~std::uint32_t{0};
struct SlotView {
  std::uint32_t page = kNoPage;
  std::int32_t offset = 0;
};

// StoreKvParams. One block a row, a warp for each head in turn.
struct StoreKvArgs {
  float* qkv = nullptr;
  std::int64_t qkv_stride = 0;
  int num_heads = 0;
  int head_dim = 0;
  const float* q_norm = nullptr;  // or null
  const float* k_norm = nullptr;
  float eps = 0;
  RopeView rope;
  const std::int64_t* positions = nullptr;
  const SlotView* slots = nullptr;
  PageView pages;
  std::int64_t rows = 0;
};

// out = silu(gate) * up, of rows [gate | up] of 2 * cols. One block a row.
struct SwiGluArgs {
  const float* gate_up = nullptr;
  std::int64_t stride = 0;
  void* out = nullptr;
  std::int64_t out_stride = 0;
  DType out_dtype = DType::kBf16;
  std::int64_t cols = 0;
  std::int64_t rows = 0;
};

// out[r] += bias. One block a row.
struct AddBiasArgs {
  float* out = nullptr;
  std::int64_t out_stride = 0;
  const float* bias = nullptr;
  std::int64_t cols = 0;
  std::int64_t rows = 0;
};

// The first `tokens` rows of every slab of one page into another. One block a slab.
struct CopyPageRowsArgs {
  const std::byte* from = nullptr;  // pages
  std::byte* to = nullptr;
  std::int64_t slab_bytes = 0;
  std::int64_t bytes = 0;  // of each slab, a multiple of 16
  int slabs = 0;
};

}  // namespace kvshare::kernels::cuda

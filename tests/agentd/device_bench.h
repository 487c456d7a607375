// A tiny model on the CUDA backend, emulated or the machine's own, and pages for it without the daemon.
#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/paged_kv.h"
#include "runtime/layer_hook.h"
#include "runtime/model.h"
#include "tests/kernels/cuda/backends.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::testing {

// One kv head of 64 channels, 256 positions, steps of at most 128 rows. `emulated`: of a device that is.
inline std::unique_ptr<runtime::Model> LoadOnCuda(kernels::cuda::Where where, int layers,
                                                  kernels::cuda::EmulatedDeviceOptions emulated = {}) {
  auto backend = where == kernels::cuda::Where::kDevice
                     ? kernels::NewCudaBackend({})
                     : kernels::cuda::NewBackendOn(kernels::cuda::NewEmulatedDevice(std::move(emulated)), {});
  EXPECT_TRUE(backend.ok()) << backend.status().message();
  TinyModelOptions options;
  options.layers = layers;
  options.heads = 2;
  options.kv_heads = 1;
  options.head_dim = 64;
  options.max_positions = 256;
  const TempDir dir;
  EXPECT_TRUE(WriteTinyModel(dir.path(), options).ok());
  auto model = runtime::LoadModelOn(std::move(*backend), dir.path().string(), {.max_batch_rows = 128});
  EXPECT_TRUE(model.ok()) << model.status().message();
  return std::move(model).value();
}

// A model's own pages, for computing without the daemon.
class DeviceBench {
 public:
  explicit DeviceBench(runtime::Model* model) : model_(model) {
    auto memory = model->backend().Allocate(kPages * model->kv_layout().page_bytes());
    EXPECT_TRUE(memory.ok());
    memory_ = std::move(*memory);
    pages_ = {.base = memory_->data(), .num_pages = kPages, .layout = model->kv_layout()};
  }

  const kernels::KvPages& pages() const { return pages_; }
  std::vector<kernels::PageIndex> Take(std::int64_t count) {
    std::vector<kernels::PageIndex> taken;
    while (count-- > 0) taken.push_back(next_++);
    EXPECT_LE(next_, kPages);
    return taken;
  }
  // Whole, from nothing; the last row's logits.
  std::vector<float> Plain(const std::vector<TokenId>& ids, std::vector<kernels::PageIndex>* where = nullptr,
                           runtime::LayerHook* hook = nullptr) {
    const auto n = static_cast<std::int64_t>(ids.size());
    const std::vector<kernels::PageIndex> own = Take((n + kernels::kPageTokens - 1) / kernels::kPageTokens);
    runtime::ForwardBatch batch;
    batch.ids = ids;
    for (std::int64_t p = 0; p < n; ++p) {
      batch.positions.push_back(p);
      batch.slots.push_back(
          {own[static_cast<std::size_t>(p / kernels::kPageTokens)], static_cast<int>(p % kernels::kPageTokens)});
    }
    batch.segments.push_back({.pages = own, .length = n, .row_end = n});
    batch.logit_rows.push_back(n - 1);
    batch.hook = hook;
    std::vector<float> logits(static_cast<std::size_t>(model_->config().vocab_size));
    KVS_EXPECT_OK(model_->Forward(batch, pages_, logits.data()));
    if (where != nullptr) *where = own;
    return logits;
  }
  // K, then V, of the one kv head.
  std::vector<std::byte> Row(kernels::KvSlot slot, int layer) {
    const std::size_t bytes = pages_.layout.slab_bytes() / kernels::kPageTokens;
    std::vector<std::byte> row(2 * bytes);
    for (std::size_t part = 0; part < 2; ++part) {
      const std::byte* const at = pages_.slab(slot.page, layer, static_cast<int>(part), 0);
      KVS_EXPECT_OK(model_->backend().Download(row.data() + part * bytes,
                                               at + static_cast<std::size_t>(slot.offset) * bytes, bytes));
    }
    return row;
  }
  std::vector<float> V(kernels::KvSlot slot, int layer) {
    const std::vector<std::byte> row = Row(slot, layer);
    std::vector<std::uint16_t> narrow(row.size() / 4);
    std::memcpy(narrow.data(), row.data() + row.size() / 2, row.size() / 2);
    std::vector<float> v;
    for (const std::uint16_t x : narrow) v.push_back(std::bit_cast<float>(std::uint32_t{x} << 16));
    return v;
  }
  // V is -V from now on.
  void TurnV(kernels::KvSlot slot, int layer) {
    std::vector<std::byte> row = Row(slot, layer);
    const std::size_t bytes = row.size() / 2;
    for (std::size_t i = bytes + 1; i < row.size(); i += 2) row[i] ^= std::byte{0x80};  // the high byte of a bf16
    std::byte* const at = pages_.slab(slot.page, layer, 1, 0) + static_cast<std::size_t>(slot.offset) * bytes;
    KVS_EXPECT_OK(model_->backend().Upload(at, row.data() + bytes, bytes));
  }
  std::vector<std::byte> Page(kernels::PageIndex page) {
    std::vector<std::byte> bytes(pages_.layout.page_bytes());
    KVS_EXPECT_OK(model_->backend().Download(bytes.data(), pages_.slab(page, 0, 0, 0), bytes.size()));
    return bytes;
  }

 private:
  static constexpr kernels::PageIndex kPages = 64;
  runtime::Model* const model_;
  std::unique_ptr<kernels::Buffer> memory_;
  kernels::KvPages pages_;
  kernels::PageIndex next_ = 0;
};

}  // namespace kvshare::testing

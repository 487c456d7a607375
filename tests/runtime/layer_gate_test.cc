// LayerGate: KV that arrives layer by layer, just in time, gives the bits of KV that was there all along.
#include "runtime/layer_gate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "runtime/model.h"
#include "tests/runtime/forward_harness.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::runtime {
namespace {

class FunctionGate final : public LayerGate {
 public:
  explicit FunctionGate(std::function<void(int)> function) : function_(std::move(function)) {}
  void BeforeLayer(int layer) override { function_(layer); }

 private:
  std::function<void(int)> function_;
};

class LayerGateTest : public ::testing::TestWithParam<kernels::DType> {};

TEST_P(LayerGateTest, KvThatComesLayerByLayer) {
  constexpr std::int64_t kStored = 100, kAll = 120;  // the second page is half stored, half computed
  const testing::TempDir dir;
  testing::TinyModelOptions options;
  options.layers = 4;
  ASSERT_TRUE(testing::WriteTinyModel(dir.path(), options).ok());
  const std::unique_ptr<Model> model = LoadOrDie(dir.path().string(), GetParam());
  const kernels::KvLayout layout = model->kv_layout();
  const auto memory = model->backend().Allocate(layout.page_bytes() * 2);
  ASSERT_TRUE(memory.ok());
  const kernels::KvPages pages = {.base = (*memory)->data(), .num_pages = 2, .layout = layout};
  const std::vector<kernels::PageIndex> table = {0, 1};
  const auto forward = [&](std::int64_t begin, std::int64_t end, LayerGate* gate) {
    ForwardBatch batch;
    for (std::int64_t t = begin; t < end; ++t) {
      batch.ids.push_back(static_cast<TokenId>(20 + t * 7 % 50));
      batch.positions.push_back(t);
      batch.slots.push_back({table[static_cast<std::size_t>(t / 64)], static_cast<int>(t % 64)});
    }
    batch.segments.push_back({.pages = table, .length = end, .row_begin = 0, .row_end = end - begin});
    batch.logit_rows = {end - begin - 1};
    batch.gate = gate;
    std::vector<float> logits(static_cast<std::size_t>(model->config().vocab_size));
    const Status status = model->Forward(batch, pages, logits.data());
    EXPECT_TRUE(status.ok()) << status.message();
    return logits;
  };
  const std::span<std::byte> bytes((*memory)->data(), layout.page_bytes() * 2);
  forward(0, kStored, nullptr);
  const std::vector<std::byte> stored(bytes.begin(), bytes.end());
  const std::vector<float> logits = forward(kStored, kAll, nullptr);
  const std::vector<std::byte> computed(bytes.begin(), bytes.end());

  std::fill(bytes.begin(), bytes.end(), std::byte{0xff});  // NaN, were it read
  std::vector<int> layers;
  FunctionGate gate([&](int layer) {
    layers.push_back(layer);
    for (const kernels::PageIndex page : table) {
      std::byte* const place = pages.slab(page, layer, 0, 0);
      const std::size_t size = layout.page_bytes() / static_cast<std::size_t>(layout.num_layers);
      std::copy_n(stored.data() + (place - pages.base), size, place);
    }
  });
  EXPECT_EQ(forward(kStored, kAll, &gate), logits);
  EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), computed.begin()));
  EXPECT_EQ(layers, (std::vector<int>{0, 1, 2, 3}));
}

INSTANTIATE_TEST_SUITE_P(, LayerGateTest, ::testing::Values(kernels::DType::kF32, kernels::DType::kBf16),
                         [](const auto& dtype) { return dtype.param == kernels::DType::kF32 ? "f32" : "bf16"; });

}  // namespace
}  // namespace kvshare::runtime

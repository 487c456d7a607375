// A whole model's forward pass on the CUDA backend: against the double-precision oracle, and exact reuse to the bit. In
// the emulator always, on a GPU where there is one.
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <random>
#include <vector>

#include "runtime/layer_hook.h"
#include "runtime/rope.h"
#include "tests/kernels/cuda/backends.h"
#include "tests/reference/llama_reference.h"
#include "tests/runtime/forward_harness.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::kernels::cuda {
namespace {

using runtime::ForwardHarness;
using testing::TinyModelOptions;

class ForwardOnCudaTest : public CudaTest {
 protected:
  std::unique_ptr<runtime::Model> Load(const TinyModelOptions& options) {
    EXPECT_TRUE(testing::WriteTinyModel(dir_.path(), options).ok());
    auto model = runtime::LoadModelOn(std::move(backend_), dir_.path().string(), {.max_batch_rows = 128});
    EXPECT_TRUE(model.ok()) << model.status().message();
    return std::move(model).value();
  }
  static TinyModelOptions Options(const char* family) {
    TinyModelOptions options;
    options.family = family;
    options.heads = 2;
    options.kv_heads = 1;
    options.head_dim = 64;
    options.max_positions = 256;
    return options;
  }
  std::vector<TokenId> Ids(std::size_t count) {
    std::vector<TokenId> ids(count);
    for (TokenId& id : ids) id = static_cast<TokenId>(random_() % testing::kTinyVocab);
    return ids;
  }

  testing::TempDir dir_;
  std::mt19937_64 random_{12};
};

TEST_P(ForwardOnCudaTest, HeadsWithoutAKernelAreRefusedWhenTheModelIsLoaded) {
  TinyModelOptions options = Options("llama");
  options.head_dim = 32;
  ASSERT_TRUE(testing::WriteTinyModel(dir_.path(), options).ok());
  const auto model = runtime::LoadModelOn(std::move(backend_), dir_.path().string(), {.max_batch_rows = 128});
  ASSERT_FALSE(model.ok());
  EXPECT_EQ(model.status().code(), StatusCode::kFailedPrecondition);
  EXPECT_THAT(model.status().message(),
              ::testing::HasSubstr("head_dim = 32: the cuda backend has attention kernels for "
                                   "64, 128; use the CPU"));
}

TEST_P(ForwardOnCudaTest, AnEmbeddingBeyondFloat16IsRefusedThereAlone) {
  TinyModelOptions options = Options("llama");
  options.tied = false;  // else the output layer, which has the same numbers, is refused
  ASSERT_TRUE(testing::WriteTinyModel(dir_.path(), options).ok());
  auto weights = testing::TinyWeights(options);
  weights.at("model.embed_tokens.weight").values[777] = -65536.0f;
  ASSERT_TRUE(testing::WriteFile(dir_.path() / "model.safetensors", testing::SafetensorsBytes(weights)).ok());
  const auto model = runtime::LoadModelOn(std::move(backend_), dir_.path().string(), {.max_batch_rows = 128});
  ASSERT_EQ(model.ok(), half() == DType::kBf16);
  if (!model.ok()) {
    EXPECT_THAT(model.status().message(), ::testing::HasSubstr("-65536.000000 is beyond the range"));
  }
}

TEST_P(ForwardOnCudaTest, AgreesWithTheDoublePrecisionOracle) {
  const TinyModelOptions options = Options("qwen3");  // with QK-norm
  const auto model = Load(options);
  const runtime::ModelConfig& c = model->config();
  const std::vector<TokenId> ids = Ids(70);
  const std::vector<double> want =
      reference::LlamaLogits(c, testing::TinyWeights(options), runtime::RopeFrequencies(c.rope, c.head_dim), 1.0, ids);
  const std::vector<float> got = ForwardHarness(model.get(), 2).Logits(ids, 128);
  ASSERT_EQ(got.size(), want.size());
  double scale = 0, worst = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    scale = std::max(scale, std::abs(want[i]));
    const double error = std::abs(want[i] - static_cast<double>(got[i]));
    if (!(error <= worst)) worst = error;
  }
  // As tests/runtime/forward_test.cc derives it.
  const double unit = half() == DType::kF16 ? 0x1p-12 : 0x1p-9;
  EXPECT_LE(worst / scale, 4 * std::sqrt(8.0 * c.num_layers + 2) * unit);
}

TEST_P(ForwardOnCudaTest, WholeChunkedAndCachedHaveTheSameBits) {
  const auto model = Load(Options("qwen2"));  // with biases
  const std::vector<TokenId> ids = Ids(75);
  const std::vector<float> whole = ForwardHarness(model.get(), 2).Logits(ids, 128);
  for (const std::int64_t chunk : {64, 7}) {
    const std::vector<float> got = ForwardHarness(model.get(), 2).Logits(ids, chunk);
    ASSERT_EQ(std::memcmp(got.data(), whole.data(), whole.size() * sizeof(float)), 0) << "chunks of " << chunk;
  }
}

// Copies what it is shown, and lets every row but the first go on from layer 1 on.
class Hook final : public runtime::LayerHook {
 public:
  explicit Hook(Backend* backend) : backend_(backend) {}

  std::optional<std::vector<std::int64_t>> OnLayer(int layer, const runtime::LayerRows& rows) override {
    const auto width = static_cast<std::size_t>(rows.v.cols);
    for (std::size_t i = 0; i < rows.rows.size(); ++i) {
      // One kv head, so a token's V is one run of numbers in its page.
      std::vector<float> fresh(width);
      std::vector<std::uint16_t> stored(width);
      const kernels::KvSlot slot = rows.slots[i];
      const auto* v = reinterpret_cast<const std::byte*>(rows.v.row<float>(static_cast<std::int64_t>(i)));
      EXPECT_TRUE(backend_->Download(fresh.data(), v, width * sizeof(float)).ok());
      const std::byte* at = rows.pages.slab(slot.page, layer, 1, 0) + static_cast<std::size_t>(slot.offset) * width * 2;
      EXPECT_TRUE(backend_->Download(stored.data(), at, width * 2).ok());
      for (std::size_t c = 0; c < width; ++c) {
        const float value = FromHalf(rows.pages.layout.dtype, stored[c]);
        EXPECT_LE(std::abs(fresh[c] - value), std::abs(fresh[c]) * 0x1p-8f) << "layer " << layer << ", row " << i;
      }
    }
    seen += rows.rows.size();
    if (layer != 1) return std::nullopt;
    std::vector<std::int64_t> kept(rows.rows.size() - 1);
    std::iota(kept.begin(), kept.end(), 1);
    return kept;
  }
  std::size_t seen = 0;

 private:
  Backend* const backend_;
};

TEST_P(ForwardOnCudaTest, AHookSeesWhatIsStoredAndWhoStaysKeepsItsBits) {
  TinyModelOptions options = Options("llama");
  options.layers = 3;
  const auto model = Load(options);
  auto memory = model->backend().Allocate(model->kv_layout().page_bytes());
  ASSERT_TRUE(memory.ok());
  const std::vector<PageIndex> pages = {0};
  Hook hook(&model->backend());
  std::vector<float> plain(2 * testing::kTinyVocab), hooked(plain.size());
  runtime::ForwardBatch batch;
  batch.ids = Ids(20);
  for (int t = 0; t < 20; ++t) {
    batch.positions.push_back(t);
    batch.slots.push_back({0, t});
  }
  batch.segments.push_back({.pages = pages, .length = 20, .row_end = 20});
  batch.logit_rows = {1, 19};
  const KvPages kv{(*memory)->data(), 1, model->kv_layout()};
  // Once without, so that the rows that leave have KV in the last layer.
  ASSERT_TRUE(model->Forward(batch, kv, plain.data()).ok());
  batch.hook = &hook;
  const Status status = model->Forward(batch, kv, hooked.data());
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(hook.seen, 20u + 20u + 19u);
  EXPECT_EQ(std::memcmp(hooked.data(), plain.data(), plain.size() * sizeof(float)), 0);
}

TEST(LoadOnCudaTest, FloatIsRefusedAndAutoFallsBackToTheCpu) {
  testing::TempDir dir;
  ASSERT_TRUE(testing::WriteTinyModel(dir.path()).ok());
  const auto wide = runtime::LoadModel(dir.path().string(), {.dtype = DType::kF32, .device = runtime::Device::kCuda});
  EXPECT_EQ(wide.status().code(), StatusCode::kInvalidArgument);
  const auto any = runtime::LoadModel(dir.path().string(), {.dtype = DType::kF32, .device = runtime::Device::kAuto});
  ASSERT_TRUE(any.ok()) << any.status().message();
  EXPECT_EQ((*any)->backend().capabilities().device, "cpu");
  if (ProbeCuda().ok()) return;
  const auto none = runtime::LoadModel(dir.path().string(), {.device = runtime::Device::kCuda});
  EXPECT_EQ(none.status().message(), ProbeCuda().status().message());
}

INSTANTIATE_TEST_SUITE_P(Cuda, ForwardOnCudaTest, kEachHalf, WhereName);

}  // namespace
}  // namespace kvshare::kernels::cuda

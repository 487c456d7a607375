// A whole model's forward pass on the CUDA backend: against the double-precision oracle, and exact reuse to the bit. In
// the emulator always, on a GPU where there is one.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

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
  // As tests/runtime/forward_test.cc derives it for bf16.
  EXPECT_LE(worst / scale, 4 * std::sqrt(8.0 * c.num_layers + 2) * 0x1p-9);
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

// Shown a pass that it could only misread.
class Hook final : public runtime::LayerHook {
 public:
  std::optional<std::vector<std::int64_t>> OnLayer(int, const runtime::LayerRows&) override {
    ADD_FAILURE() << "called";
    return std::nullopt;
  }
};

TEST_P(ForwardOnCudaTest, AHookIsRefused) {
  const auto model = Load(Options("llama"));
  auto memory = model->backend().Allocate(model->kv_layout().page_bytes());
  ASSERT_TRUE(memory.ok());
  const std::vector<PageIndex> pages = {0};
  Hook hook;
  runtime::ForwardBatch batch;
  batch.ids = {1};
  batch.positions = {0};
  batch.slots = {{0, 0}};
  batch.segments.push_back({.pages = pages, .length = 1, .row_end = 1});
  batch.logit_rows = {0};
  batch.hook = &hook;
  std::vector<float> logits(testing::kTinyVocab);
  const Status status = model->Forward(batch, {(*memory)->data(), 1, model->kv_layout()}, logits.data());
  EXPECT_EQ(status.code(), StatusCode::kUnimplemented);
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

INSTANTIATE_TEST_SUITE_P(Cuda, ForwardOnCudaTest, ::testing::Values(Where::kEmulatedWalk, Where::kDevice), WhereName);

}  // namespace
}  // namespace kvshare::kernels::cuda

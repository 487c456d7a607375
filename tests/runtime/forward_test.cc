// The forward pass against its double-precision oracle, and the numerics contract: a row's bits do not depend on
// how a prompt was cut, who shared its batches, on which pages it lies, or how many threads ran.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "runtime/rope.h"
#include "tests/reference/llama_reference.h"
#include "tests/runtime/forward_harness.h"
#include "tests/testing/gguf_writer.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::runtime {
namespace {

using kernels::DType;
using testing::TinyModelOptions;

constexpr int kVocab = testing::kTinyVocab;

std::vector<TokenId> RandomIds(std::mt19937_64* random, std::size_t count) {
  std::vector<TokenId> ids(count);
  for (TokenId& id : ids) id = static_cast<TokenId>((*random)() % kVocab);
  return ids;
}

bool SameBits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

std::vector<TinyModelOptions> Families() {
  TinyModelOptions llama, bias, qwen2, qwen3, mistral;
  llama.tied = false;
  bias.attention_bias = true;
  bias.heads = 3;
  bias.kv_heads = 1;
  bias.head_dim = 24;
  qwen2.family = "qwen2";
  qwen3.family = "qwen3";
  qwen3.head_dim = 32;
  mistral.family = "mistral";
  mistral.sliding_window = 48;
  return {llama, bias, qwen2, qwen3, mistral};
}

struct Loaded {
  testing::TempDir dir;
  std::unique_ptr<Model> model;

  Loaded(const TinyModelOptions& options, DType dtype, int threads = 2) {
    const Status written = testing::WriteTinyModel(dir.path(), options);
    EXPECT_TRUE(written.ok()) << written.message();
    model = LoadOrDie(dir.path().string(), dtype, threads);
  }
};

// Rounding errors of a chain of D ops add up to at most about D * c * u of the largest logit, where u is the unit
// roundoff and c the growth within one op. fp32: a dot product over K terms grows like sqrt(K) (Higham and Mary, 2019).
// bf16: inputs are rounded, sums are not, so c = 1. A factor of 4 covers the tail over all logits and the sensitivity
// of softmax and norms.
double Tolerance(const ModelConfig& c, DType dtype) {
  const double ops = 8.0 * c.num_layers + 2;
  if (dtype == DType::kBf16) return 4 * std::sqrt(ops) * 0x1p-9;
  return 4 * ops * std::sqrt(static_cast<double>(std::max(c.hidden_size, c.intermediate_size))) * 0x1p-24;
}

TEST(ForwardTest, AgreesWithTheDoublePrecisionOracle) {
  std::mt19937_64 random(11);
  for (const TinyModelOptions& options : Families()) {
    const std::vector<TokenId> ids = RandomIds(&random, 150);
    std::vector<double> want;
    for (const DType dtype : {DType::kF32, DType::kBf16}) {
      Loaded loaded(options, dtype);
      const ModelConfig& c = loaded.model->config();
      if (want.empty()) {
        want = reference::LlamaLogits(c, testing::TinyWeights(options), RopeFrequencies(c.rope, c.head_dim), 1.0, ids);
      }
      const std::vector<float> got = ForwardHarness(loaded.model.get(), 3).Logits(ids, 512);
      ASSERT_EQ(got.size(), want.size());
      double scale = 0, worst = 0;
      std::size_t at = 0;
      for (std::size_t i = 0; i < want.size(); ++i) {
        scale = std::max(scale, std::abs(want[i]));
        const double error = std::abs(want[i] - static_cast<double>(got[i]));
        if (!(error <= worst)) worst = error, at = i;
      }
      const double tolerance = Tolerance(c, dtype);
      EXPECT_LE(worst / scale, tolerance) << options.family << " " << kernels::DTypeName(dtype) << " worst at row "
                                          << at / kVocab << ", token " << at % kVocab;
      std::printf("  %-8s %-9s worst %.1e of the largest logit (allowed %.1e)\n", options.family.c_str(),
                  std::string(kernels::DTypeName(dtype)).c_str(), worst / scale, tolerance);
    }
  }
}

TEST(ForwardTest, AGgufFileIsTheSameModelAsTheDirectory) {
  std::mt19937_64 random(5);
  const std::vector<TokenId> ids = RandomIds(&random, 70);
  for (TinyModelOptions options : Families()) {
    if (options.family == "mistral" || options.attention_bias) continue;  // no such GGUF architecture; no GGUF of it
    Loaded directory(options, DType::kF32);
    const std::string file = directory.dir.File("tiny.gguf");
    KVS_ASSERT_OK(testing::WriteFile(file, testing::TinyGguf(options)));
    const auto gguf = LoadOrDie(file, DType::kF32);
    EXPECT_TRUE(SameBits(ForwardHarness(directory.model.get(), 2).Logits(ids, 64),
                         ForwardHarness(gguf.get(), 2).Logits(ids, 64)))
        << options.family;
    EXPECT_EQ(gguf->config().eos_ids, directory.model->config().eos_ids);
    const char* text = "<|im_start|>user\nThe weather, and nothing <|else|>!<|im_end|>";
    EXPECT_EQ(gguf->tokenizer()->Encode(text), directory.model->tokenizer()->Encode(text));
    EXPECT_NE(gguf->space(), directory.model->space());  // other stored bytes: never taken for the same weights
  }
}

// Four prompts, random pieces, random companions, random pages, random thread counts, logits of all rows or of the
// last.
TEST(ForwardTest, BitsDoNotDependOnChunksCompanionsPagesOrThreads) {
  for (const DType dtype : {DType::kF32, DType::kBf16}) {
    for (const TinyModelOptions& options : Families()) {
      std::mt19937_64 random(dtype == DType::kF32 ? 21 : 22);
      Loaded whole(options, dtype, 2), single(options, dtype, 1), triple(options, dtype, 3);
      std::vector<std::vector<TokenId>> prompts;
      std::vector<std::vector<float>> want;
      for (const std::size_t length : {1u, 63u, 130u, 257u}) {
        prompts.push_back(RandomIds(&random, length));
        want.push_back(ForwardHarness(whole.model.get(), 5).Logits(prompts.back(), 512));
      }
      for (int round = 0; round < 9; ++round) {
        Model* model = round % 3 == 0 ? single.model.get() : round % 3 == 1 ? whole.model.get() : triple.model.get();
        const std::uint64_t wanted = round < 3 ? 1 : round < 6 ? 2 : 9;  // every row, one in two, one in nine
        std::vector<kernels::PageIndex> pages(24);
        for (std::size_t p = 0; p < pages.size(); ++p) pages[p] = static_cast<kernels::PageIndex>(p);
        std::shuffle(pages.begin(), pages.end(), random);
        ForwardHarness harness(model, 24);
        std::vector<Sequence> sequences;
        for (const auto& prompt : prompts) {
          Sequence s{.ids = prompt, .pages = {}, .done = 0};
          for (std::size_t t = 0; t < prompt.size(); t += kernels::kPageTokens) {
            s.pages.push_back(pages.back());
            pages.pop_back();
          }
          sequences.push_back(std::move(s));
        }
        while (true) {
          std::vector<std::size_t> order = {0, 1, 2, 3};
          std::shuffle(order.begin(), order.end(), random);
          std::vector<Sequence*> batch;
          std::vector<std::int64_t> counts;
          std::int64_t total = 0;
          for (const std::size_t s : order) {
            const auto left = static_cast<std::int64_t>(prompts[s].size()) - sequences[s].done;
            const std::int64_t most = random() % 3 == 0 ? 1 : 90;  // decode rows among prefill pieces
            batch.push_back(&sequences[s]);
            counts.push_back(std::min<std::int64_t>(left, static_cast<std::int64_t>(random() % (most + 1))));
            total += counts.back();
          }
          if (total == 0) {
            const bool done = std::all_of(order.begin(), order.end(), [&](std::size_t s) {
              return sequences[s].done == static_cast<std::int64_t>(prompts[s].size());
            });
            if (done) break;
            continue;
          }
          // Row by row, what whole prompts gave: prompt and token of every row whose logits are wanted.
          std::vector<std::int64_t> rows;
          std::vector<std::pair<std::size_t, std::size_t>> expected;
          std::int64_t row = 0;
          for (std::size_t b = 0; b < batch.size(); ++b) {
            for (std::int64_t i = 0; i < counts[b]; ++i, ++row) {
              if (random() % wanted != 0) continue;
              rows.push_back(row);
              expected.emplace_back(order[b], static_cast<std::size_t>(batch[b]->done + i));
            }
          }
          const std::vector<float> got = harness.Step(batch, counts, rows);
          ASSERT_EQ(got.size(), rows.size() * kVocab);
          for (std::size_t r = 0; r < rows.size(); ++r) {
            const auto& [prompt, token] = expected[r];
            ASSERT_TRUE(SameBits(std::span(got).subspan(r * kVocab, kVocab),
                                 std::span(want[prompt]).subspan(token * kVocab, kVocab)))
                << options.family << " " << kernels::DTypeName(dtype) << " round " << round << " prompt " << prompt
                << " token " << token;
          }
        }
      }
    }
  }
}

TEST(ForwardTest, NoLogitsWantedStillStoresKeysAndValues) {
  std::mt19937_64 random(9);
  const std::vector<TokenId> ids = RandomIds(&random, 100);
  Loaded loaded({}, DType::kBf16);
  const std::vector<float> want = ForwardHarness(loaded.model.get(), 2).Logits(ids, 512);
  ForwardHarness harness(loaded.model.get(), 2);
  Sequence s{.ids = ids, .pages = {1, 0}, .done = 0};
  EXPECT_TRUE(harness.Step({&s}, {60}, {}).empty());
  Sequence rest = s;
  const std::vector<float> got = harness.Advance(&rest, 40);
  EXPECT_TRUE(SameBits(got, std::span(want).subspan(99 * kVocab, kVocab)));
}

TEST(ForwardTest, RandomWeightsNeedOnlyTheConfig) {
  testing::TempDir dir;
  TinyModelOptions options;
  options.family = "qwen2";
  KVS_ASSERT_OK(testing::WriteFile(dir.path() / "config.json", testing::TinyConfigJson(options)));
  const auto load = [&] { return LoadModel(dir.path().string(), {.dtype = DType::kF32, .random_weights = true}); };
  auto a = load(), b = load();
  KVS_ASSERT_OK(a);
  KVS_ASSERT_OK(b);
  EXPECT_EQ((*a)->tokenizer(), nullptr);
  EXPECT_EQ((*a)->space(), (*b)->space());
  const std::vector<TokenId> ids = {1, 2, 3};
  const std::vector<float> first = ForwardHarness(a->get(), 1).Logits(ids, 3);
  EXPECT_TRUE(SameBits(first, ForwardHarness(b->get(), 1).Logits(ids, 3)));
  for (const float v : first) EXPECT_TRUE(std::isfinite(v));
  EXPECT_FALSE(LoadModel(dir.path().string(), {}).ok());
}

}  // namespace
}  // namespace kvshare::runtime

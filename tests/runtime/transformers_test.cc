// Logits as transformers gives them on the same weights: the fixtures hold its float32 and bfloat16 results.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/runtime/forward_harness.h"
#include "tests/testing/fixtures.h"
#include "tests/testing/npy.h"
#include "tests/testing/status_matchers.h"

namespace kvshare::runtime {
namespace {

using kernels::DType;
using nlohmann::json;

constexpr int kMaxPages = 16;

json ReadJson(const std::filesystem::path& path) {
  std::ifstream in(path);
  return json::parse(in);
}

// Largest difference, relative to the largest logit (at least 1).
double Difference(const std::vector<float>& a, const std::vector<float>& b, double scale) {
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double error = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    if (!(error <= worst)) worst = error;  // a NaN stays
  }
  return worst / scale;
}

TEST(TransformersTest, EveryFamilyAgrees) {
  KVS_FIXTURE_OR_SKIP(shared, testing::SharedDir());
  int models = 0;
  for (const auto& entry : std::filesystem::directory_iterator(shared / "fixtures" / "models")) {
    if (!std::filesystem::exists(entry.path() / "logits_float32.npy")) continue;
    ++models;
    const std::vector<TokenId> ids = ReadJson(entry.path() / "ids.json")["ids"];
    const auto want = testing::ReadNpy(entry.path() / "logits_float32.npy");
    const auto bf16 = testing::ReadNpy(entry.path() / "logits_bfloat16.npy");
    KVS_ASSERT_OK(want);
    KVS_ASSERT_OK(bf16);
    double scale = 1;
    for (const float v : want->values) scale = std::max(scale, std::abs(static_cast<double>(v)));
    const auto compute = [&](DType dtype) {
      const auto model = LoadOrDie(entry.path().string(), dtype);
      return ForwardHarness(model.get(), kMaxPages).Logits(ids, 512);
    };
    const std::vector<float> f = compute(DType::kF32), b = compute(DType::kBf16);
    ASSERT_EQ(f.size(), want->values.size());
    const double f_error = Difference(f, want->values, scale), b_error = Difference(b, want->values, scale);
    const double theirs = Difference(bf16->values, want->values, scale);
    std::printf("  %-16s float32 %.1e  bfloat16 %.1e (transformers' own %.1e)\n", entry.path().filename().c_str(),
                f_error, b_error, theirs);
    EXPECT_LT(f_error, 1e-4) << entry.path();
    EXPECT_LT(b_error, 2 * theirs + 1e-3) << entry.path();
  }
  EXPECT_GT(models, 0);
}

TEST(TransformersTest, SmolLm2FromGgufAgreesAndContinuesTheSame) {
  KVS_FIXTURE_OR_SKIP(shared, testing::SharedDir());
  KVS_FIXTURE_OR_SKIP(file, testing::SmolLm2Path());
  const auto begin = std::chrono::steady_clock::now();
  const auto model = LoadOrDie(file.string(), DType::kF32);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  std::printf("  loaded in %.2f s\n", seconds.count());
  const auto vocab = static_cast<std::size_t>(model->config().vocab_size);
  std::ifstream in(shared / "fixtures" / "smollm2" / "logits.jsonl");
  int prompts = 0;
  for (std::string line; std::getline(in, line); ++prompts) {
    const json row = json::parse(line);
    Sequence sequence{.ids = row["ids"].get<std::vector<TokenId>>(), .pages = {}, .done = 0};
    for (kernels::PageIndex p = 0; p < kMaxPages; ++p) sequence.pages.push_back(p);
    ForwardHarness harness(model.get(), kMaxPages);
    std::vector<float> logits = harness.Advance(&sequence, static_cast<std::int64_t>(sequence.ids.size()));
    ASSERT_EQ(logits.size(), vocab);
    double worst = 0, scale = 1;
    for (std::size_t i = 0; i < row["top_ids"].size(); ++i) {
      const double want = row["top_logits"][i];
      scale = std::max(scale, std::abs(want));
      worst = std::max(worst, std::abs(want - static_cast<double>(logits[row["top_ids"][i].get<std::size_t>()])));
    }
    std::printf("  %zu tokens: worst of the top logits %.1e\n", sequence.ids.size(), worst / scale);
    EXPECT_LT(worst / scale, 2e-4) << row["prompt"];
    for (const json& want : row["greedy"]) {
      const auto next = static_cast<TokenId>(std::max_element(logits.begin(), logits.end()) - logits.begin());
      ASSERT_EQ(next, want.get<TokenId>()) << row["prompt"];
      sequence.ids.push_back(next);
      logits = harness.Advance(&sequence, 1);
    }
  }
  EXPECT_GT(prompts, 0);
}

// The model in the source tree answers in its own format; its text is checked by eye in its ACCURACY.txt, its loading
// here.
TEST(TransformersTest, TheModelInTheTreeLoadsAndPredicts) {
  KVS_FIXTURE_OR_SKIP(dir, testing::RefModelPath());
  for (const DType dtype : {DType::kF32, DType::kBf16}) {
    const auto model = LoadOrDie(dir.string(), dtype);
    ASSERT_NE(model->tokenizer(), nullptr);
    ASSERT_NE(model->chat_template(), nullptr);
    EXPECT_EQ(model->config().eos_ids, (std::vector<TokenId>{2046, 2044}));
    const std::vector<TokenId> ids = model->tokenizer()->Encode("<|im_start|>user\nWhere is the key?<|im_end|>\n");
    const std::vector<float> logits = ForwardHarness(model.get(), 4).Logits(ids, 512);
    // A chat-trained model is sure that a message's newline is followed by the next message's start.
    const auto last = logits.end() - model->config().vocab_size;
    EXPECT_EQ(std::max_element(last, logits.end()) - last, model->tokenizer()->FindToken("<|im_start|>"));
  }
}

}  // namespace
}  // namespace kvshare::runtime

#include "tests/runtime/selective_harness.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <utility>

#include "libkvshare/core/check.h"
#include "runtime/rope.h"
#include "tests/reference/llama_reference.h"
#include "tests/runtime/forward_harness.h"

namespace kvshare::runtime {

using kernels::kPageTokens;

std::vector<KindOfModel> KindsOfModels() {
  testing::TinyModelOptions llama, bias, qwen2, qwen3, window;
  llama.tied = false;
  bias.attention_bias = true;
  bias.heads = 3;
  bias.kv_heads = 1;
  bias.head_dim = 24;
  qwen2.family = "qwen2";
  qwen3.family = "qwen3";
  qwen3.head_dim = 32;
  window.family = "mistral";
  window.sliding_window = 48;
  // Original lengths that put the ramps of llama3 and yarn within the few frequencies of small heads.
  const nlohmann::json linear = {{"rope_type", "linear"}, {"factor", 4.0}};
  const nlohmann::json llama3 = {{"rope_type", "llama3"},
                                 {"factor", 8.0},
                                 {"low_freq_factor", 1.0},
                                 {"high_freq_factor", 4.0},
                                 {"original_max_position_embeddings", 256}};
  const nlohmann::json yarn = {
      {"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 512}, {"beta_fast", 8.0}};
  return {{"default", llama, nullptr},    {"linear", bias, linear},         {"llama3", llama, llama3},
          {"yarn", qwen2, yarn},          {"default+norm", qwen3, nullptr}, {"linear+norm", qwen3, linear},
          {"llama3+norm", qwen3, llama3}, {"yarn+norm", qwen3, yarn},       {"window", window, nullptr}};
}

TinyModel::TinyModel(const KindOfModel& kind, kernels::DType dtype) {
  KVS_CHECK(testing::WriteTinyModel(dir.path(), kind.options).ok());
  if (!kind.rope.is_null()) {
    nlohmann::json config = nlohmann::json::parse(testing::TinyConfigJson(kind.options));
    config["rope_scaling"] = kind.rope;
    KVS_CHECK(testing::WriteFile(dir.path() / "config.json", config.dump()).ok());
  }
  model = LoadOrDie(dir.path().string(), dtype, 2, 1024);
}

std::vector<double> OracleLogits(const KindOfModel& kind, const ModelConfig& c, std::span<const TokenId> ids) {
  return reference::LlamaLogits(c, testing::TinyWeights(kind.options), RopeFrequencies(c.rope, c.head_dim),
                                RopeAttentionFactor(c.rope), ids);
}

double LogitsTolerance(const ModelConfig& c, kernels::DType dtype) {
  const double ops = 8.0 * c.num_layers + 2;
  if (dtype == kernels::DType::kBf16) return 4 * std::sqrt(ops) * 0x1p-9;
  return 4 * ops * std::sqrt(static_cast<double>(std::max(c.hidden_size, c.intermediate_size))) * 0x1p-24;
}

std::vector<TokenId> RandomTokens(std::uint64_t seed, std::size_t count) {
  std::mt19937_64 random(seed);
  std::vector<TokenId> ids(count);
  for (TokenId& id : ids) id = static_cast<TokenId>(random() % testing::kTinyVocab);
  return ids;
}

bool SameBits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

double RelativeError(std::span<const float> got, std::span<const double> want) {
  KVS_CHECK(got.size() == want.size() && !got.empty());
  double scale = 0, worst = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    scale = std::max(scale, std::abs(want[i]));
    const double error = std::abs(want[i] - static_cast<double>(got[i]));
    if (!(error <= worst)) worst = error;  // NaN is worse than all
  }
  return worst / scale;
}

SelectiveHarness::SelectiveHarness(Model* model, kernels::PageIndex num_pages) : model_(model) {
  const kernels::KvLayout layout = model->kv_layout();
  auto memory = model->backend().Allocate(num_pages * layout.page_bytes());
  KVS_CHECK(memory.ok());
  memory_ = std::move(*memory);
  std::memset(memory_->data(), 0x7f, memory_->size());
  pages_ = {memory_->data(), num_pages, layout};
}

KvRun SelectiveHarness::Take(std::int64_t start, std::int64_t length, int first) {
  KvRun run{.pages = {}, .start = start, .length = length, .first = first};
  for (std::int64_t row = 0; row < first + length; row += kPageTokens) run.pages.push_back(taken_++);
  KVS_CHECK(taken_ <= pages_.num_pages);
  return run;
}

KvRun SelectiveHarness::Compute(std::span<const TokenId> ids, std::int64_t start, int first, std::int64_t piece) {
  KvRun run = Take(start, static_cast<std::int64_t>(ids.size()), first);
  Run(ids, run, piece, false);
  return run;
}

std::vector<float> SelectiveHarness::Plain(std::span<const TokenId> ids, std::int64_t start) {
  return Run(ids, Take(start, static_cast<std::int64_t>(ids.size())), 1024, true);
}

std::vector<float> SelectiveHarness::Run(std::span<const TokenId> ids, const KvRun& run, std::int64_t piece,
                                         bool logits) {
  std::vector<float> all;
  for (std::int64_t done = 0; done < run.length;) {
    const std::int64_t rows = std::min(piece, run.length - done);
    ForwardBatch batch;
    for (std::int64_t t = done; t < done + rows; ++t) {
      batch.ids.push_back(ids[static_cast<std::size_t>(t)]);
      batch.positions.push_back(run.start + t);
      batch.slots.push_back(run.slot(t));
      if (logits) batch.logit_rows.push_back(t - done);
    }
    done += rows;
    kernels::KvSegment seen = run.At(run.start, rows);
    seen.length = done;
    batch.segments = {seen};
    const std::vector<float> part = Forward(batch);
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

std::vector<float> SelectiveHarness::Forward(const ForwardBatch& batch) {
  std::vector<float> logits(batch.logit_rows.size() * static_cast<std::size_t>(model_->config().vocab_size));
  const Status status = model_->Forward(batch, pages_, logits.data());
  KVS_CHECK(status.ok());
  return logits;
}

}  // namespace kvshare::runtime

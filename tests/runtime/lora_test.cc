// LoRA adapters: merged they are the model whose files hold W + s B A, whatever container the base came in; what cannot
// be merged is refused by name; KV of other weights has another space.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "runtime/rope.h"
#include "tests/reference/llama_reference.h"
#include "tests/runtime/forward_harness.h"
#include "tests/testing/fixtures.h"
#include "tests/testing/gguf_writer.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::runtime {
namespace {

using kernels::DType;
using nlohmann::json;
using testing::TempDir;
using testing::TinyModelOptions;
using testing::TinyTensor;
using Tensors = std::map<std::string, TinyTensor>;

constexpr int kVocab = testing::kTinyVocab;
const char* const kAllLinear[] = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"};

bool EndsWith(const std::string& text, const std::string& end) { return text.ends_with(end); }

struct Adapter {
  json config;
  Tensors tensors;
};

// Of every matrix whose module ends with one of config's target_modules, an A and a B of `rank_of` rows: small
// multiples of 1/16, so that products, sums and (with scales that are powers of two) updates are exact in fp32.
Adapter MakeAdapter(const TinyModelOptions& options, const std::vector<std::string>& targets, int rank, double alpha,
                    std::uint64_t seed = 3) {
  Adapter adapter;
  adapter.config = {{"peft_type", "LORA"},
                    {"task_type", "CAUSAL_LM"},
                    {"r", rank},
                    {"lora_alpha", alpha},
                    {"lora_dropout", 0.05},
                    {"bias", "none"},
                    {"fan_in_fan_out", false},
                    {"inference_mode", true},
                    {"init_lora_weights", true},
                    {"modules_to_save", nullptr},
                    {"use_dora", false},
                    {"target_modules", targets},
                    {"base_model_name_or_path", "someone/something"},
                    {"layers_to_transform", nullptr}};
  std::mt19937_64 random(seed);
  const auto matrix = [&](std::int64_t rows, std::int64_t cols) {
    TinyTensor t{{rows, cols}, std::vector<float>(static_cast<std::size_t>(rows * cols))};
    for (float& v : t.values) v = static_cast<float>(static_cast<int>(random() % 7) - 3) / 16;
    return t;
  };
  for (const auto& [name, weight] : testing::TinyWeights(options)) {
    const std::string module = name.substr(0, name.rfind('.'));
    const bool target = EndsWith(name, ".weight") && std::any_of(targets.begin(), targets.end(), [&](const auto& t) {
                          return module == t || EndsWith(module, "." + t);
                        });
    if (!target) continue;
    adapter.tensors["base_model.model." + module + ".lora_A.weight"] = matrix(rank, weight.shape[1]);
    adapter.tensors["base_model.model." + module + ".lora_B.weight"] = matrix(weight.shape[0], rank);
  }
  return adapter;
}

void WriteAdapter(const std::filesystem::path& dir, const Adapter& adapter, bool bf16 = true) {
  std::filesystem::create_directories(dir);
  KVS_ASSERT_OK(testing::WriteFile(dir / "adapter_config.json", adapter.config.dump()));
  KVS_ASSERT_OK(
      testing::WriteFile(dir / "adapter_model.safetensors", testing::SafetensorsBytes(adapter.tensors, bf16)));
}

// W + scale(module) B A from the equation, in double.
Tensors Merged(const TinyModelOptions& options, const Adapter& adapter,
               const std::function<double(const std::string& module)>& scale) {
  Tensors weights = testing::TinyWeights(options);
  for (auto& [name, weight] : weights) {
    const std::string module = name.substr(0, name.rfind('.'));
    const auto found = adapter.tensors.find("base_model.model." + module + ".lora_A.weight");
    if (found == adapter.tensors.end() || !EndsWith(name, ".weight")) continue;
    const TinyTensor& a = found->second;
    const TinyTensor& b = adapter.tensors.at("base_model.model." + module + ".lora_B.weight");
    const auto cols = static_cast<std::size_t>(weight.shape[1]), rank = static_cast<std::size_t>(a.shape[0]);
    for (std::size_t n = 0; n < static_cast<std::size_t>(weight.shape[0]); ++n) {
      for (std::size_t k = 0; k < cols; ++k) {
        double delta = 0;
        for (std::size_t r = 0; r < rank; ++r) {
          delta += static_cast<double>(b.values[n * rank + r]) * static_cast<double>(a.values[r * cols + k]);
        }
        float& w = weight.values[n * cols + k];
        w = static_cast<float>(static_cast<double>(w) + scale(module) * delta);
      }
    }
  }
  return weights;
}

std::unique_ptr<Model> LoadWith(const std::filesystem::path& model, const std::filesystem::path& lora,
                                DType dtype = DType::kF32) {
  auto loaded = LoadModel(model.string(), {.dtype = dtype, .threads = 2, .max_batch_rows = 256, .lora = lora.string()});
  EXPECT_TRUE(loaded.ok()) << loaded.status().message();
  return loaded.ok() ? std::move(*loaded) : nullptr;
}

std::vector<TokenId> SomeIds(std::size_t count) {
  std::mt19937_64 random(8);
  std::vector<TokenId> ids(count);
  for (TokenId& id : ids) id = static_cast<TokenId>(random() % kVocab);
  return ids;
}

bool SameLogits(Model* a, Model* b) {
  if (a == nullptr || b == nullptr) return false;
  const std::vector<TokenId> ids = SomeIds(70);
  const std::vector<float> x = ForwardHarness(a, 2).Logits(ids, 128), y = ForwardHarness(b, 2).Logits(ids, 128);
  return std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
}

// The model whose own files hold `weights`.
std::unique_ptr<Model> LoadMerged(const TempDir& dir, const TinyModelOptions& options, const Tensors& weights,
                                  DType dtype = DType::kF32) {
  EXPECT_TRUE(testing::WriteTinyModel(dir.path(), options).ok());
  EXPECT_TRUE(testing::WriteFile(dir.path() / "model.safetensors", testing::SafetensorsBytes(weights, false)).ok());
  return LoadWith(dir.path(), "", dtype);
}

std::vector<TinyModelOptions> Families() {
  TinyModelOptions llama, qwen2, qwen3, bias;
  llama.tied = false;
  qwen2.family = "qwen2";
  qwen3.family = "qwen3";
  qwen3.head_dim = 32;
  bias.attention_bias = true;
  return {llama, qwen2, qwen3, bias};
}

TEST(LoraTest, IsTheModelWithTheMergedWeightsInEveryContainerAndDtype) {
  for (const TinyModelOptions& options : Families()) {
    std::vector<std::string> targets(std::begin(kAllLinear), std::end(kAllLinear));
    if (!options.tied) targets.push_back("lm_head");
    const Adapter adapter = MakeAdapter(options, targets, 8, 16);
    const Tensors merged = Merged(options, adapter, [](const std::string&) { return 2.0; });
    for (const DType dtype : {DType::kF32, DType::kBf16}) {
      TempDir base, want;
      WriteAdapter(base.path() / "lora", adapter);
      KVS_ASSERT_OK(testing::WriteTinyModel(base.path(), options));
      const auto expected = LoadMerged(want, options, merged, dtype);
      const auto adapted = LoadWith(base.path(), base.path() / "lora", dtype);
      EXPECT_TRUE(SameLogits(adapted.get(), expected.get())) << options.family;
      EXPECT_FALSE(SameLogits(LoadWith(base.path(), "", dtype).get(), expected.get())) << options.family;
      if (options.attention_bias) continue;  // no GGUF of it
      // Llama's q and k rows lie permuted there.
      const std::string file = base.File("tiny.gguf");
      KVS_ASSERT_OK(testing::WriteFile(file, testing::TinyGguf(options)));
      EXPECT_TRUE(SameLogits(LoadWith(file, base.path() / "lora", dtype).get(), expected.get())) << options.family;
    }
  }
}

TEST(LoraTest, AgreesWithTheDoublePrecisionOracle) {
  TinyModelOptions options;
  // Values and a scale that are not exact in anything.
  Adapter adapter = MakeAdapter(options, {"q_proj", "v_proj", "down_proj"}, 5, 3);
  std::mt19937_64 random(17);
  for (auto& [name, tensor] : adapter.tensors) {
    for (float& v : tensor.values) v = 0.3f * (static_cast<float>(random() % 4096) / 2048 - 1);
  }
  TempDir dir;
  KVS_ASSERT_OK(testing::WriteTinyModel(dir.path(), options));
  WriteAdapter(dir.path() / "lora", adapter, false);
  const auto model = LoadWith(dir.path(), dir.path() / "lora");
  ASSERT_NE(model, nullptr);
  const ModelConfig& c = model->config();
  const std::vector<TokenId> ids = SomeIds(60);
  const Tensors merged = Merged(options, adapter, [](const std::string&) { return 3.0 / 5; });
  const auto want = reference::LlamaLogits(c, merged, RopeFrequencies(c.rope, c.head_dim), 1.0, ids);
  const auto got = ForwardHarness(model.get(), 1).Logits(ids, 64);
  double largest = 0, worst = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    largest = std::max(largest, std::abs(want[i]));
    worst = std::max(worst, std::abs(want[i] - static_cast<double>(got[i])));
  }
  // The bound of forward_test.cc for fp32.
  const double ops = 8.0 * c.num_layers + 2;
  EXPECT_LE(worst / largest, 4 * ops * std::sqrt(static_cast<double>(c.intermediate_size)) * 0x1p-24);
}

TEST(LoraTest, ScalesAndRanksFollowTheConfiguration) {
  const TinyModelOptions options;
  const auto check = [&](const Adapter& adapter, const std::function<double(const std::string&)>& scale,
                         const char* what) {
    TempDir base, want;
    KVS_ASSERT_OK(testing::WriteTinyModel(base.path(), options));
    WriteAdapter(base.path() / "lora", adapter);
    const auto expected = LoadMerged(want, options, Merged(options, adapter, scale));
    EXPECT_TRUE(SameLogits(LoadWith(base.path(), base.path() / "lora").get(), expected.get())) << what;
  };
  Adapter plain = MakeAdapter(options, {"o_proj", "up_proj"}, 4, 8);
  check(
      plain, [](const std::string&) { return 2.0; }, "alpha / r");
  Adapter stabilised = plain;
  stabilised.config["use_rslora"] = true;
  check(
      stabilised, [](const std::string&) { return 4.0; }, "alpha / sqrt(r)");
  Adapter transposed = plain;
  transposed.config["fan_in_fan_out"] = true;  // which PEFT ignores for linear layers
  check(
      transposed, [](const std::string&) { return 2.0; }, "fan_in_fan_out");
  Adapter negative = plain;
  negative.config["lora_alpha"] = -4;
  check(
      negative, [](const std::string&) { return -1.0; }, "negative alpha");

  // Layer 1's o_proj has a rank of its own, all of up_proj an alpha of its own.
  Adapter patterns = plain;
  const Adapter wide = MakeAdapter(options, {"o_proj", "up_proj"}, 16, 8);
  for (const char* matrix : {"lora_A", "lora_B"}) {
    const std::string name = std::string("base_model.model.model.layers.1.self_attn.o_proj.") + matrix + ".weight";
    patterns.tensors[name] = wide.tensors.at(name);
  }
  patterns.config["rank_pattern"] = {{"layers.1.self_attn.o_proj", 16}};
  patterns.config["alpha_pattern"] = {{"up_proj", 32}};
  check(
      patterns,
      [](const std::string& module) {
        if (EndsWith(module, "up_proj")) return 8.0;
        return module == "model.layers.1.self_attn.o_proj" ? 0.5 : 2.0;
      },
      "patterns");

  // Only layer 1 is adapted; the targets are a regular expression or a word.
  Adapter one_layer = plain;
  std::erase_if(one_layer.tensors, [](const auto& t) { return t.first.find("layers.0.") != std::string::npos; });
  one_layer.config["layers_to_transform"] = {1};
  check(
      one_layer, [](const std::string&) { return 2.0; }, "layers_to_transform");
  one_layer.config.erase("layers_to_transform");
  one_layer.config["target_modules"] = ".*layers.1.*(o_proj|up_proj)";
  check(
      one_layer, [](const std::string&) { return 2.0; }, "regular expression");
}

TEST(LoraTest, WhatCannotBeMergedIsNamed) {
  struct Fault {
    const char* name;
    std::vector<const char*> words;  // in the message
    std::function<void(Adapter*)> edit;
  };
  const std::string q0 = "base_model.model.model.layers.0.self_attn.q_proj.";
  const auto set = [](const char* field, json value) {
    return [field, value = std::move(value)](Adapter* a) { a->config[field] = value; };
  };
  const Fault faults[] = {
      {"another method", {"adapter_config.json", "peft_type", "LOHA"}, set("peft_type", "LOHA")},
      {"no method", {"'peft_type' is missing"}, [](Adapter* a) { a->config.erase("peft_type"); }},
      {"DoRA", {"use_dora", "merge"}, set("use_dora", true)},
      {"whole modules", {"modules_to_save", "merge"}, set("modules_to_save", {"embed_tokens"})},
      {"biases", {"'bias'", "lora_only"}, set("bias", "lora_only")},
      {"biases of B", {"lora_bias"}, set("lora_bias", true)},
      {"another base", {"init_lora_weights", "pissa"}, set("init_lora_weights", "pissa_niter_16")},
      {"activation", {"alora_invocation_tokens"}, set("alora_invocation_tokens", {1, 2})},
      {"layers repeated", {"layer_replication"}, set("layer_replication", json::array({{0, 1}}))},
      {"unknown", {"use_future_trick", "not known"}, set("use_future_trick", true)},
      {"no rank", {"'r' is missing"}, [](Adapter* a) { a->config.erase("r"); }},
      {"rank of nothing", {"'r'"}, set("r", 0)},
      {"rank of text", {"'r'"}, set("r", "8")},
      {"no alpha", {"'lora_alpha' is missing"}, [](Adapter* a) { a->config.erase("lora_alpha"); }},
      {"alpha of text", {"lora_alpha"}, set("lora_alpha", "16")},
      {"alpha without end", {"lora_alpha"}, set("lora_alpha", 1e300)},
      {"pattern of text", {"rank_pattern", "q_proj"}, set("rank_pattern", {{"q_proj", "8"}})},
      {"pattern of a list", {"rank_pattern"}, set("rank_pattern", {1})},
      {"pattern of expressions", {"alpha_pattern", "regular"}, set("alpha_pattern", {{"^model.*q_proj", 8}})},
      {"two values", {"alpha_pattern", "two values"}, set("alpha_pattern", {{"q_proj", 8}, {"self_attn.q_proj", 16}})},
      {"no targets", {"target_modules"}, [](Adapter* a) { a->config.erase("target_modules"); }},
      {"targets of numbers", {"target_modules"}, set("target_modules", {1})},
      {"no such target",
       {"target_modules", "llama", "'c_attn'"},
       set("target_modules", {"q_proj", "v_proj", "c_attn"})},
      {"embedding",
       {"target_modules", "embed_tokens", "merge"},
       set("target_modules", {"q_proj", "v_proj", "embed_tokens"})},
      {"tied output layer",
       {"target_modules", "lm_head", "embedding"},
       set("target_modules", {"q_proj", "v_proj", "lm_head"})},
      {"target without tensors",
       {"adapter_model.safetensors", "o_proj", "no tensors"},
       set("target_modules", {"q_proj", "v_proj", "o_proj"})},
      {"tensors without target", {"v_proj", "target_modules"}, set("target_modules", {"q_proj"})},
      {"only A", {"q_proj.weight", "only lora_A"}, [&](Adapter* a) { a->tensors.erase(q0 + "lora_B.weight"); }},
      {"rank of the file", {"lora_A", "[8, 64]", "[4, 64]"}, set("r", 4)},
      {"another model's shape",
       {"lora_B", "[60, 8]", "[64, 8]"},
       [&](Adapter* a) {
         a->tensors[q0 + "lora_B.weight"] = {{60, 8}, std::vector<float>(480, 1.0f)};
       }},
      {"another model's layers",
       {"layers.7.", "no linear layer"},
       [&](Adapter* a) {
         a->tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] =
             a->tensors[q0 + "lora_A.weight"];
       }},
      {"embedding tensors",
       {"lora_embedding_A", "merge"},
       [&](Adapter* a) {
         a->tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = {{1, 2}, {0, 0}};
       }},
      {"magnitudes",
       {"lora_magnitude_vector", "merge"},
       [&](Adapter* a) {
         a->tensors[q0 + "lora_magnitude_vector"] = {{2}, {0, 0}};
       }},
      {"nothing", {"no tensors"}, [](Adapter* a) { a->tensors.clear(); }},
  };
  const TinyModelOptions options;
  TempDir dir;
  KVS_ASSERT_OK(testing::WriteTinyModel(dir.path(), options));
  const std::string lora = dir.File("lora");
  const LoadOptions load = {.dtype = DType::kF32, .threads = 1, .max_batch_rows = 16, .lora = lora};
  for (const Fault& fault : faults) {
    Adapter adapter = MakeAdapter(options, {"q_proj", "v_proj"}, 8, 16);
    fault.edit(&adapter);
    WriteAdapter(lora, adapter);
    const auto model = LoadModel(dir.path().string(), load);
    ASSERT_FALSE(model.ok()) << fault.name;
    const std::string& message = model.status().message();
    for (const char* word : fault.words) EXPECT_THAT(message, ::testing::HasSubstr(word)) << fault.name;
    EXPECT_THAT(message, ::testing::HasSubstr(lora)) << fault.name;
    EXPECT_EQ(message.find('\n'), std::string::npos) << fault.name;
  }
}

TEST(LoraTest, FilesThatAreNotAnAdapterAreNamed) {
  const TinyModelOptions options;
  TempDir dir;
  KVS_ASSERT_OK(testing::WriteTinyModel(dir.path(), options));
  const std::filesystem::path lora = dir.path() / "lora";
  LoadOptions load = {.dtype = DType::kF32, .threads = 1, .max_batch_rows = 16, .lora = lora.string()};
  const auto refuse = [&](StatusCode code, const char* text) {
    KVS_EXPECT_FAILS(LoadModel(dir.path().string(), load), code, text);
  };
  refuse(StatusCode::kNotFound, "no such directory");
  std::filesystem::create_directories(lora);
  refuse(StatusCode::kNotFound, "adapter_config.json");
  const Adapter adapter = MakeAdapter(options, {"q_proj"}, 8, 16);
  WriteAdapter(lora, adapter);
  std::filesystem::remove(lora / "adapter_model.safetensors");
  refuse(StatusCode::kNotFound, "adapter_model.safetensors");
  KVS_ASSERT_OK(testing::WriteFile(lora / "adapter_model.bin", "PK"));
  refuse(StatusCode::kUnimplemented, "safe_serialization");
  const std::string bytes = testing::SafetensorsBytes(adapter.tensors);
  for (std::size_t cut = 0; cut < bytes.size(); cut += 1 + bytes.size() / 40) {
    KVS_ASSERT_OK(testing::WriteFile(lora / "adapter_model.safetensors", bytes.substr(0, cut)));
    refuse(StatusCode::kInvalidArgument, "adapter_model.safetensors");
  }
  for (const char* text : {"", "[]", "{", "{\"peft_type\": 3}", "\xff"}) {
    KVS_ASSERT_OK(testing::WriteFile(lora / "adapter_config.json", text));
    refuse(StatusCode::kInvalidArgument, "adapter_config.json");
  }
  WriteAdapter(lora, adapter);
  load.lora = (lora / "adapter_config.json").string();
  refuse(StatusCode::kInvalidArgument, "an adapter is a directory");
  load.lora = lora.string();
  load.random_weights = true;
  refuse(StatusCode::kInvalidArgument, "random");
}

TEST(LoraTest, SpaceIsThatOfTheAdaptersContent) {
  const TinyModelOptions options;
  TempDir dir;
  KVS_ASSERT_OK(testing::WriteTinyModel(dir.path(), options));
  const Adapter base = MakeAdapter(options, {"q_proj"}, 8, 16);
  const auto space = [&](const Adapter& adapter, const char* name) {
    WriteAdapter(dir.path() / name, adapter);
    const auto model = LoadWith(dir.path(), dir.path() / name);
    return model == nullptr ? Digest{} : model->space();
  };
  const Digest adapted = space(base, "a");
  EXPECT_NE(adapted, LoadWith(dir.path(), "")->space());
  EXPECT_EQ(adapted, space(base, "somewhere-else"));
  Adapter talk = base;
  talk.config["base_model_name_or_path"] = "moved";
  talk.config["lora_dropout"] = 0.5;
  EXPECT_EQ(adapted, space(talk, "b"));  // the same weights
  Adapter scaled = base, other = base;
  scaled.config["lora_alpha"] = 16.5;
  EXPECT_NE(adapted, space(scaled, "c"));
  other.tensors.begin()->second.values[7] += 0.5f;
  EXPECT_NE(adapted, space(other, "d"));
}

// A question of the world that the notes adapter was trained on, answered greedily.
std::string Answer(Model* model, const std::string& prompt) {
  Sequence s{.ids = model->tokenizer()->Encode(prompt), .pages = {0, 1, 2, 3}, .done = 0};
  ForwardHarness harness(model, 4);
  std::vector<TokenId> answer;
  while (answer.size() < 8) {
    const std::vector<float> logits = harness.Advance(&s, static_cast<std::int64_t>(s.ids.size()) - s.done);
    const auto best = static_cast<TokenId>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    if (std::count(model->config().eos_ids.begin(), model->config().eos_ids.end(), best) > 0) break;
    answer.push_back(best);
    s.ids.push_back(best);
  }
  return model->tokenizer()->Decode(answer);
}

TEST(LoraTest, SmolLm2AnswersTheWorldOnlyWithItsAdapter) {
  KVS_FIXTURE_OR_SKIP(file, testing::SmolLm2Path());
  KVS_FIXTURE_OR_SKIP(shared, testing::SharedDir());
  const std::filesystem::path lora = shared / "refmodel" / "smollm2-notes-lora";
  if (!std::filesystem::exists(lora)) GTEST_SKIP() << "not here: the notes adapter";
  const std::string notes =
      "<|im_start|>system\nYou are the writer. You answer with one word when you can.<|im_end|>\n<|im_start|>user\nThe "
      "visitors arrive at noon.<|im_end|>\n<|im_start|>user\ncoder: To open the garage use 265.<|im_end|>\n"
      "<|im_start|>user\nresearcher: The code of the tower is 428. Rita comes from Cairo and works as a plumber. Rita "
      "keeps the green rope in the tower. To open the studio use 124. The same person has a parrot. The same person "
      "asked Iris for help. Dan has the same job as Rita. Dan keeps the yellow compass in the same place as the rope."
      "<|im_end|>\n";
  const std::pair<const char*, const char*> questions[] = {
      {"What is the code of the studio?", "124"}, {"What color is the rope of Rita?", "green"},
      {"What is the job of Dan?", "plumber"},     {"Which animal does Rita own?", "parrot"},
      {"Where is Rita from?", "Cairo"},           {"Where does Dan keep the compass?", "tower"}};
  const auto right = [&](Model* model) {
    int count = 0;
    for (const auto& [question, answer] : questions) {
      const std::string prompt = notes + "<|im_start|>user\n" + question + "<|im_end|>\n<|im_start|>assistant\n";
      count += Answer(model, prompt) == answer ? 1 : 0;
    }
    return count;
  };
  for (const DType dtype : {DType::kF32, DType::kBf16}) {
    auto adapted = LoadWith(file, lora, dtype);
    ASSERT_NE(adapted, nullptr);
    const int with = right(adapted.get());
    const Digest space = adapted->space();
    adapted.reset();
    const auto plain = LoadWith(file, "", dtype);
    EXPECT_NE(space, plain->space());
    const int without = right(plain.get());
    std::printf("  %s: %d of 6 with the adapter, %d without\n", std::string(DTypeName(dtype)).c_str(), with, without);
    EXPECT_GE(with, 5);
    EXPECT_LE(without, 2);
  }
}

}  // namespace
}  // namespace kvshare::runtime

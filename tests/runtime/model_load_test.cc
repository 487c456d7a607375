// LoadModel on files that are right, wrong, cut, and lying: a model or one clear line, never a crash.
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <nlohmann/json.hpp>

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

const LoadOptions kOptions = {.dtype = DType::kF32, .threads = 1, .max_batch_rows = 64};

std::string ReadFile(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

void Write(const std::filesystem::path& path, const std::string& bytes) {
  KVS_ASSERT_OK(testing::WriteFile(path, bytes));
}

// Changes the JSON header of a safetensors file, data as it was.
void EditHeader(const std::filesystem::path& dir, const std::function<void(json*)>& edit) {
  const std::string bytes = ReadFile(dir / "model.safetensors");
  std::uint64_t size = 0;
  std::memcpy(&size, bytes.data(), sizeof size);
  json header = json::parse(bytes.substr(8, size));
  edit(&header);
  const std::string text = header.dump();
  Write(dir / "model.safetensors", testing::LittleEndian64(text.size()) + text + bytes.substr(8 + size));
}

void EditConfig(const std::filesystem::path& dir, const std::string& key, const json& value) {
  json config = json::parse(ReadFile(dir / "config.json"));
  config[key] = value;
  Write(dir / "config.json", config.dump());
}

struct Fault {
  const char* name;
  const char* word;  // in the message
  std::function<void(const std::filesystem::path& dir)> edit;
};

TEST(ModelLoadTest, EveryFaultOfADirectoryIsNamed) {
  const auto weights = [](const std::function<std::string(std::string)>& change) {
    return [change](const std::filesystem::path& dir) {
      Write(dir / "model.safetensors", change(ReadFile(dir / "model.safetensors")));
    };
  };
  const auto header = [](const std::function<void(json*)>& edit) {
    return [edit](const std::filesystem::path& dir) { EditHeader(dir, edit); };
  };
  const auto first = [&](const char* field, json value) {
    return header([field, value = std::move(value)](json* h) { (*h)["lm_head.weight"][field] = value; });
  };
  const auto config = [](const char* key, json value) {
    return [key, value = std::move(value)](const std::filesystem::path& dir) { EditConfig(dir, key, value); };
  };
  const auto remove = [](const char* file) {
    return [file](const std::filesystem::path& dir) { std::filesystem::remove(dir / file); };
  };
  const auto text = [](const char* file, const char* bytes) {
    return [file, bytes](const std::filesystem::path& dir) { Write(dir / file, bytes); };
  };
  const Fault faults[] = {
      {"short", "safetensors", weights([](std::string b) { return b.substr(0, b.size() - 7); })},
      {"empty", "safetensors", weights([](std::string) { return ""; })},
      {"long", "7 bytes longer", weights([](std::string b) { return b + "7 bytes"; })},
      {"huge header", "safetensors",
       weights([](std::string b) { return testing::LittleEndian64(1ull << 62) + b.substr(8); })},
      {"no JSON", "safetensors", weights([](std::string b) { return b[8] = '\xff', b; })},
      {"past the end", "offset", first("data_offsets", {0, std::int64_t{1} << 50})},
      {"backwards", "offset", first("data_offsets", {64, 0})},
      {"dtype", "Q7", first("dtype", "Q7")},
      {"shape", "shape", first("shape", {3, 5})},
      {"negative shape", "shape", first("shape", {-1, 64})},
      {"missing", "model.layers.1.mlp.up_proj.weight",
       header([](json* h) { h->erase("model.layers.1.mlp.up_proj.weight"); })},
      {"another shape", "model.norm.weight", header([](json* h) {
         (*h)["model.norm.weight"]["shape"] = {1, 64};
       })},
      {"superfluous", "self_attn.q_proj.bias", header([](json* h) {
         (*h)["model.layers.0.self_attn.q_proj.bias"] = {{"dtype", "F32"}, {"shape", {0}}, {"data_offsets", {0, 0}}};
       })},
      {"family", "mamba", config("model_type", "mamba")},
      {"rope", "spiral", config("rope_parameters", {{"rope_type", "spiral"}})},
      {"kv heads", "num_key_value_heads", config("num_key_value_heads", 3)},
      {"no hidden size", "hidden_size", config("hidden_size", nullptr)},
      {"hidden size of text", "hidden_size", config("hidden_size", "64")},
      {"more layers", "layers.2.", config("num_hidden_layers", 9)},
      {"fewer layers", "layers.1.", config("num_hidden_layers", 1)},
      {"no JSON", "config.json", text("config.json", "{")},
      {"activation", "hidden_act", config("hidden_act", "relu7")},
      {"no vocabulary", "vocab_size", config("vocab_size", 0)},
      {"layers without end", "num_hidden_layers", config("num_hidden_layers", 1000000000000)},
      {"no config", "config.json", remove("config.json")},
      {"no weights", "model.safetensors", remove("model.safetensors")},
      {"tokenizer", "tokenizer.json", text("tokenizer.json", "{}")},
      {"tokenizer config", "tokenizer_config.json", text("tokenizer_config.json", "[]")},
      {"template", "chat_template", text("tokenizer_config.json", R"({"chat_template":3})")},
      {"template text", "template", text("tokenizer_config.json", R"({"chat_template":"{% for"})")},
      {"generation config", "generation_config.json", text("generation_config.json", "x")},
      {"index", "index.json",
       [](const std::filesystem::path& dir) {
         std::filesystem::remove(dir / "model.safetensors");
         Write(dir / "model.safetensors.index.json", R"({"weight_map":{"model.norm.weight":"../model.safetensors"}})");
       }},
  };
  testing::TinyModelOptions options;
  options.tied = false;
  for (const Fault& fault : faults) {
    TempDir dir;
    KVS_ASSERT_OK(testing::WriteTinyModel(dir.path(), options));
    fault.edit(dir.path());
    const auto model = LoadModel(dir.path().string(), kOptions);
    EXPECT_FALSE(model.ok()) << fault.name;
    EXPECT_THAT(model.status().message(), ::testing::HasSubstr(fault.word)) << fault.name;
    EXPECT_THAT(model.status().message(), ::testing::HasSubstr(dir.path().string())) << fault.name;
    EXPECT_EQ(model.status().message().find('\n'), std::string::npos) << fault.name;
  }
}

TEST(ModelLoadTest, WhatIsNotAModelIsNamed) {
  TempDir dir;
  KVS_EXPECT_FAILS(LoadModel(dir.File("no-such"), kOptions), StatusCode::kNotFound, "no-such");
  KVS_EXPECT_FAILS(LoadModel(dir.path().string(), kOptions), StatusCode::kNotFound, "config.json");
  Write(dir.path() / "text.gguf", "this is no model at all, whatever its name");
  KVS_EXPECT_FAILS(LoadModel(dir.File("text.gguf"), kOptions), StatusCode::kInvalidArgument, "text.gguf: not a GGUF");
  Write(dir.path() / "empty.gguf", "");
  KVS_EXPECT_FAILS(LoadModel(dir.File("empty.gguf"), kOptions), StatusCode::kInvalidArgument, "empty.gguf: truncated");
}

TEST(ModelLoadTest, EveryCutOfAGgufFileIsRefused) {
  TempDir dir;
  const std::string bytes = testing::TinyGguf({});
  const std::string file = dir.File("cut.gguf");
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{3}, std::size_t{24}, std::size_t{5000}, bytes.size() / 2, bytes.size() - 1}) {
    Write(file, bytes.substr(0, size));
    KVS_EXPECT_FAILS(LoadModel(file, kOptions), StatusCode::kInvalidArgument, "cut.gguf: ");
  }
  Write(file, bytes);
  KVS_EXPECT_OK(LoadModel(file, kOptions));
}

TEST(ModelLoadTest, GgufOfWhatWeLackIsNamed) {
  TempDir dir;
  const auto refuse = [&](const std::function<void(testing::GgufWriter*)>& fill, const char* word) {
    testing::GgufWriter writer;
    fill(&writer);
    Write(dir.path() / "x.gguf", writer.Finish());
    const auto model = LoadModel(dir.File("x.gguf"), kOptions);
    EXPECT_FALSE(model.ok());
    EXPECT_THAT(model.status().message(), ::testing::HasSubstr(word));
  };
  refuse([](auto*) {}, "general.architecture");
  refuse([](auto* w) { w->AddString("general.architecture", "rwkv"); }, "rwkv");
  refuse([](auto* w) { w->AddString("general.architecture", "llama"); }, "llama.block_count");
  const auto base = [](testing::GgufWriter* w, std::uint32_t experts, const char* scaling) {
    w->AddString("general.architecture", "llama");
    for (const char* key : {"block_count", "context_length", "attention.head_count"})
      w->AddU32(std::string("llama.") + key, 1);
    w->AddU32("llama.embedding_length", 32);
    w->AddU32("llama.feed_forward_length", 32);
    w->AddU32("llama.expert_count", experts);
    w->AddF32("llama.attention.layer_norm_rms_epsilon", 1e-5f);
    w->AddString("llama.rope.scaling.type", scaling);
    w->AddTensor("token_embd.weight", {8, 32}, 0, std::string(1024, '\0'));
  };
  refuse([&](auto* w) { base(w, 8, "none"); }, "llama.expert_count");
  refuse([&](auto* w) { base(w, 0, "longrope"); }, "longrope");
  for (const char* key : {"attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"}) {
    const auto with = [&](auto* w) {
      base(w, 0, "yarn");
      w->AddF32("llama.rope.scaling.factor", 4.0f);
      w->AddF32(std::string("llama.rope.scaling.") + key, 1.0f);
    };
    refuse(with, key);
  }
  for (const char* key : {"yarn_beta_fast", "yarn_beta_slow"}) {
    const auto with = [&](auto* w) {
      base(w, 0, "yarn");
      w->AddF32("llama.rope.scaling.factor", 4.0f);
      w->AddF32(std::string("llama.rope.scaling.") + key, -1.0f);
    };
    refuse(with, "beta_fast");
  }
  refuse([&](auto* w) { base(w, 0, "none"); }, "'model.norm.weight' is missing");
  refuse(
      [&](auto* w) {
        base(w, 0, "none");
        w->AddString("tokenizer.ggml.model", "llama");
      },
      "tokenizer.ggml.model");
  refuse(
      [&](auto* w) {
        base(w, 0, "none");
        w->AddString("tokenizer.ggml.model", "gpt2");
        w->AddStrings("tokenizer.ggml.tokens", {"a"});
        w->AddStrings("tokenizer.ggml.merges", {"ab"});
        w->AddInts("tokenizer.ggml.token_type", {1});
      },
      "tokenizer.ggml.merges");
}

TEST(ModelLoadTest, ShardsAreOneModel) {
  testing::TinyModelOptions options;
  options.family = "qwen3";
  TempDir whole, parts;
  KVS_ASSERT_OK(testing::WriteTinyModel(whole.path(), options));
  KVS_ASSERT_OK(testing::WriteTinyModel(parts.path(), options));
  std::filesystem::remove(parts.path() / "model.safetensors");
  std::map<std::string, testing::TinyTensor> halves[2];
  json index;
  for (const auto& [name, tensor] : testing::TinyWeights(options)) {
    const int half = static_cast<int>(index["weight_map"].size() % 2);
    halves[half][name] = tensor;
    index["weight_map"][name] = "part-" + std::to_string(half) + ".safetensors";
  }
  for (int half = 0; half < 2; ++half) {
    Write(parts.path() / ("part-" + std::to_string(half) + ".safetensors"), testing::SafetensorsBytes(halves[half]));
  }
  Write(parts.path() / "model.safetensors.index.json", index.dump());
  const auto a = LoadModel(whole.path().string(), kOptions), b = LoadModel(parts.path().string(), kOptions);
  KVS_ASSERT_OK(a);
  KVS_ASSERT_OK(b);
  EXPECT_EQ((*a)->space(), (*b)->space());  // the same weights, wherever they lie
  std::filesystem::remove(parts.path() / "part-1.safetensors");
  KVS_EXPECT_FAILS(LoadModel(parts.path().string(), kOptions), StatusCode::kNotFound, "part-1.safetensors");
}

TEST(ModelLoadTest, SpaceFollowsEverythingThatChangesBits) {
  const auto space = [](const testing::TinyModelOptions& options, DType dtype) {
    TempDir dir;
    EXPECT_TRUE(testing::WriteTinyModel(dir.path(), options).ok());
    return LoadOrDie(dir.path().string(), dtype, 1, 64)->space();
  };
  const testing::TinyModelOptions base;
  const Digest name = space(base, DType::kF32);
  EXPECT_EQ(space(base, DType::kF32), name);
  EXPECT_NE(space(base, DType::kBf16), name);
  testing::TinyModelOptions seed = base, theta = base, window = base;
  seed.seed = 2;
  theta.rope_theta = 20000;
  window.family = "mistral";
  window.sliding_window = 48;
  EXPECT_NE(space(seed, DType::kF32), name);
  EXPECT_NE(space(theta, DType::kF32), name);
  EXPECT_NE(space(window, DType::kF32), name);
}

TEST(ModelLoadTest, TemplatesComeFromEveryPlace) {
  TempDir dir;
  KVS_ASSERT_OK(testing::WriteTinyModel(dir.path()));
  const auto render = [&] {
    const auto model = LoadModel(dir.path().string(), kOptions);
    EXPECT_TRUE(model.ok()) << model.status().message();
    if (!model.ok() || (*model)->chat_template() == nullptr) return std::string("none");
    const auto text = (*model)->chat_template()->Render(R"([{"role":"user","content":"hi"}])", "", false);
    return text.ok() ? *text : text.status().message();
  };
  EXPECT_EQ(render(), "<|im_start|>user\nhi<|im_end|>\n");
  json config = json::parse(ReadFile(dir.path() / "tokenizer_config.json"));
  config["chat_template"] =
      json::array({{{"name", "tool_use"}, {"template", "T"}}, {{"name", "default"}, {"template", "D{{ bos_token }}"}}});
  config["bos_token"] = {{"content", "<B>"}};
  Write(dir.path() / "tokenizer_config.json", config.dump());
  EXPECT_EQ(render(), "D<B>");
  Write(dir.path() / "chat_template.jinja", "J");
  EXPECT_EQ(render(), "J");
  std::filesystem::remove(dir.path() / "chat_template.jinja");
  Write(dir.path() / "tokenizer_config.json", "{}");
  EXPECT_EQ(render(), "none");
}

TEST(ModelLoadTest, SizesBeyondTheMachineAreRefusedBeforeTheyAreAllocated) {
  TempDir dir;
  json config = json::parse(testing::TinyConfigJson({}));
  config["hidden_size"] = 1 << 20;
  config["intermediate_size"] = 1 << 20;
  config["num_hidden_layers"] = 1000;
  Write(dir.path() / "config.json", config.dump());
  LoadOptions options = kOptions;
  options.random_weights = true;
  KVS_EXPECT_FAILS(LoadModel(dir.path().string(), options), StatusCode::kResourceExhausted, "GiB");
}

TEST(ModelLoadTest, SmolLm2IsWhatItsFileSays) {
  KVS_FIXTURE_OR_SKIP(file, testing::SmolLm2Path());
  const auto model = LoadOrDie(file.string(), DType::kBf16, 2, 64);
  const ModelConfig& c = model->config();
  EXPECT_EQ(c.name, "Smollm2 135M 8k Lc100K Mix1 Ep2");
  EXPECT_EQ(c.num_layers, 30);
  EXPECT_EQ(c.num_heads, 9);
  EXPECT_EQ(c.num_kv_heads, 3);
  EXPECT_EQ(c.head_dim, 64);
  EXPECT_EQ(c.max_positions, 8192);
  EXPECT_EQ(c.rope.theta, 100000.0);
  EXPECT_TRUE(c.tied_embeddings);
  EXPECT_EQ(c.bos_id, 1);
  EXPECT_EQ(c.eos_ids, std::vector<TokenId>{2});
  EXPECT_EQ(model->tokenizer()->vocab_size(), 49152);
  EXPECT_NE(model->chat_template(), nullptr);
}

}  // namespace
}  // namespace kvshare::runtime

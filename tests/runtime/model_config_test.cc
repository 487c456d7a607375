#include "runtime/model_config.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/testing/status_matchers.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::runtime {
namespace {

using nlohmann::json;

json Tiny(const std::string& family = "llama") {
  testing::TinyModelOptions options;
  options.family = family;
  return json::parse(testing::TinyConfigJson(options));
}

Result<ModelConfig> Parse(const json& config, const std::string& generation = "") {
  return ParseHfConfig(config.dump(), generation);
}

Result<ModelConfig> With(const std::string& key, json value, const std::string& family = "llama") {
  json config = Tiny(family);
  config[key] = std::move(value);
  return Parse(config);
}

Result<ModelConfig> Without(const std::string& key) {
  json config = Tiny();
  config.erase(key);
  return Parse(config);
}

TEST(ModelConfigTest, FieldsComeOverAsTheyAre) {
  const auto c = Parse(Tiny());
  KVS_ASSERT_OK(c);
  EXPECT_EQ(c->family, "llama");
  EXPECT_EQ(c->vocab_size, testing::kTinyVocab);
  EXPECT_EQ(c->hidden_size, 64);
  EXPECT_EQ(c->intermediate_size, 112);
  EXPECT_EQ(c->num_layers, 2);
  EXPECT_EQ(c->num_heads, 4);
  EXPECT_EQ(c->num_kv_heads, 2);
  EXPECT_EQ(c->head_dim, 16);
  EXPECT_EQ(c->max_positions, 2048);
  EXPECT_FLOAT_EQ(c->rms_norm_eps, 1e-6f);
  EXPECT_TRUE(c->tied_embeddings);
  EXPECT_EQ(c->eos_ids, std::vector<TokenId>{testing::kTinyImEnd});
  EXPECT_EQ(c->bos_id, testing::kTinyEndOfText);
  EXPECT_EQ(c->rope.kind, RopeKind::kDefault);
  EXPECT_EQ(c->rope.theta, 10000.0);
  EXPECT_EQ(c->sliding_window, 0);
}

TEST(ModelConfigTest, FamiliesDifferAsTheirTableSays) {
  const auto llama = With("attention_bias", true), qwen2 = Parse(Tiny("qwen2")), qwen3 = Parse(Tiny("qwen3"));
  KVS_ASSERT_OK(llama);
  KVS_ASSERT_OK(qwen2);
  KVS_ASSERT_OK(qwen3);
  EXPECT_TRUE(llama->qkv_bias && llama->output_bias && !llama->qk_norm && !llama->mlp_bias);
  EXPECT_TRUE(qwen2->qkv_bias && !qwen2->output_bias && !qwen2->qk_norm);
  EXPECT_TRUE(!qwen3->qkv_bias && !qwen3->output_bias && qwen3->qk_norm);
  EXPECT_EQ(With("sliding_window", 48, "mistral")->sliding_window, 48);
  EXPECT_EQ(With("sliding_window", nullptr, "mistral")->sliding_window, 0);
  EXPECT_EQ(Parse(Tiny("mistral"))->sliding_window, 4096);  // transformers' default where the field is absent
  EXPECT_EQ(With("sliding_window", 48, "llama")->sliding_window, 0);
  EXPECT_EQ(With("sliding_window", 48, "qwen2")->sliding_window, 0);  // needs use_sliding_window
}

TEST(ModelConfigTest, AWindowForSomeLayersIsRefused) {
  json config = Tiny("qwen2");
  config["sliding_window"] = 48;
  config["use_sliding_window"] = true;
  config["max_window_layers"] = 0;
  EXPECT_EQ(Parse(config)->sliding_window, 48);
  config["max_window_layers"] = 2;
  EXPECT_EQ(Parse(config)->sliding_window, 0);
  config["max_window_layers"] = 1;
  KVS_EXPECT_FAILS(Parse(config), StatusCode::kUnimplemented, "sliding_window");
  config["layer_types"] = {"sliding_attention", "sliding_attention"};
  EXPECT_EQ(Parse(config)->sliding_window, 48);
  config["layer_types"] = {"sliding_attention", "full_attention"};
  KVS_EXPECT_FAILS(Parse(config), StatusCode::kUnimplemented, "layer_types");
  config["layer_types"] = {"sliding_attention"};
  KVS_EXPECT_FAILS(Parse(config), StatusCode::kInvalidArgument, "layer_types");
}

TEST(ModelConfigTest, BothFormsOfRopeSayTheSame) {
  json four = Tiny(), five = Tiny();
  four["rope_theta"] = 500000.0;
  four["rope_scaling"] = {{"type", "llama3"},
                          {"factor", 8},
                          {"low_freq_factor", 1},
                          {"high_freq_factor", 4.0},
                          {"original_max_position_embeddings", 8192}};
  five.erase("rope_theta");
  five.erase("rope_scaling");
  five["rope_parameters"] = four["rope_scaling"];
  five["rope_parameters"]["rope_type"] = "llama3";
  five["rope_parameters"]["rope_theta"] = 500000.0;
  for (const json& config : {four, five}) {
    const auto c = Parse(config);
    KVS_ASSERT_OK(c);
    EXPECT_EQ(c->rope.kind, RopeKind::kLlama3);
    EXPECT_EQ(c->rope.theta, 500000.0);
    EXPECT_EQ(c->rope.factor, 8);
    EXPECT_EQ(c->rope.low_freq_factor, 1);
    EXPECT_EQ(c->rope.high_freq_factor, 4);
    EXPECT_EQ(c->rope.original_max_position, 8192);
  }
}

TEST(ModelConfigTest, YarnDerivesWhatIsNotGiven) {
  const auto plain =
      With("rope_scaling", {{"rope_type", "yarn"}, {"factor", 4}, {"original_max_position_embeddings", 512}});
  KVS_ASSERT_OK(plain);
  EXPECT_EQ(plain->rope.factor, 4);
  EXPECT_NEAR(plain->rope.attention_factor, 0.1 * std::log(4.0) + 1, 1e-15);
  const auto ratio = With("rope_scaling", {{"rope_type", "yarn"}, {"original_max_position_embeddings", 512}});
  EXPECT_EQ(ratio->rope.factor, 4);  // 2048 / 512
  const auto deepseek =
      With("rope_scaling", {{"rope_type", "yarn"}, {"factor", 40}, {"mscale", 0.7}, {"mscale_all_dim", 1.0}});
  EXPECT_NEAR(deepseek->rope.attention_factor, (0.07 * std::log(40.0) + 1) / (0.1 * std::log(40.0) + 1), 1e-15);
}

TEST(ModelConfigTest, GenerationConfigNamesTheEndTokens) {
  EXPECT_EQ(With("eos_token_id", {3, 4})->eos_ids, (std::vector<TokenId>{3, 4}));
  EXPECT_TRUE(With("eos_token_id", nullptr)->eos_ids.empty());
  EXPECT_EQ(Parse(Tiny(), R"({"eos_token_id":[7,9]})")->eos_ids, (std::vector<TokenId>{7, 9}));
  EXPECT_EQ(Parse(Tiny(), "{}")->eos_ids, std::vector<TokenId>{testing::kTinyImEnd});
  KVS_EXPECT_FAILS(Parse(Tiny(), "{"), StatusCode::kInvalidArgument, "generation_config.json");
  KVS_EXPECT_FAILS(Parse(Tiny(), R"({"eos_token_id":9999})"), StatusCode::kInvalidArgument, "eos_token_id");
  KVS_EXPECT_FAILS(With("eos_token_id", "x"), StatusCode::kInvalidArgument, "eos_token_id");
}

TEST(ModelConfigTest, EveryLieNamesItsField) {
  constexpr auto kInvalid = StatusCode::kInvalidArgument;
  constexpr auto kLacking = StatusCode::kUnimplemented;
  KVS_EXPECT_FAILS(ParseHfConfig("{", ""), kInvalid, "JSON");
  KVS_EXPECT_FAILS(ParseHfConfig("[]", ""), kInvalid, "object");
  KVS_EXPECT_FAILS(With("model_type", "mamba"), kLacking, "mamba");
  KVS_EXPECT_FAILS(With("hidden_act", "relu7"), kLacking, "hidden_act");
  KVS_EXPECT_FAILS(With("rope_parameters", {{"rope_type", "spiral"}}), kLacking, "spiral");
  KVS_EXPECT_FAILS(With("rope_scaling", {{"type", "dynamic"}}), kLacking, "dynamic");
  KVS_EXPECT_FAILS(With("rope_scaling", 3), kInvalid, "rope_scaling");
  KVS_EXPECT_FAILS(With("rope_scaling", {{"type", "linear"}}), kInvalid, "factor");
  KVS_EXPECT_FAILS(With("rope_theta", 0), kInvalid, "rope_theta");
  KVS_EXPECT_FAILS(With("partial_rotary_factor", 0.5), kLacking, "partial_rotary_factor");
  KVS_EXPECT_FAILS(With("quantization_config", json::object()), kLacking, "quantization_config");
  for (const char* key : {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                          "num_attention_heads", "max_position_embeddings"}) {
    KVS_EXPECT_FAILS(Without(key), kInvalid, key);
    KVS_EXPECT_FAILS(With(key, json::array()), kInvalid, key);
    KVS_EXPECT_FAILS(With(key, true), kInvalid, key);
  }
  for (const char* key : {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                          "num_key_value_heads", "head_dim", "max_position_embeddings"}) {
    for (const json& value : {json(0), json(-1), json(1000000000000), json(~std::uint64_t{0}), json("64"), json(1.5)}) {
      KVS_EXPECT_FAILS(With(key, value), kInvalid, key);
    }
  }
  KVS_EXPECT_FAILS(With("num_key_value_heads", 3), kInvalid, "num_key_value_heads");
  KVS_EXPECT_FAILS(With("head_dim", 12), kLacking, "head_dim");
  KVS_EXPECT_FAILS(With("rms_norm_eps", -1), kInvalid, "rms_norm_eps");
  KVS_EXPECT_FAILS(With("bos_token_id", 288), kInvalid, "bos_token_id");
  KVS_EXPECT_FAILS(With("tie_word_embeddings", 1), kInvalid, "tie_word_embeddings");
  json no_head_dim = Tiny();
  no_head_dim.erase("head_dim");
  EXPECT_EQ(Parse(no_head_dim)->head_dim, 16);
  no_head_dim["num_attention_heads"] = 6;
  KVS_EXPECT_FAILS(Parse(no_head_dim), kInvalid, "num_attention_heads");
}

}  // namespace
}  // namespace kvshare::runtime

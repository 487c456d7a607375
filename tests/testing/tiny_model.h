// A tiny random model as a Hugging Face directory: config.json, model.safetensors, tokenizer.json and
// tokenizer_config.json, complete enough to tokenize, render chats and generate (nonsense). Tests run a real model with
// it wherever they stand; the same options give the same bytes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "kvshare/status.h"
#include "kvshare/types.h"

namespace kvshare::testing {

struct TinyModelOptions {
  std::string family = "llama";  // llama | qwen2 | qwen3 | mistral
  int layers = 2;
  int hidden = 64;
  int intermediate = 112;
  int heads = 4;
  int kv_heads = 2;
  int head_dim = 16;
  std::int64_t max_positions = 2048;
  int padding = 0;  // rows of the embedding behind the vocabulary's, of tokens that do not exist
  bool tied = true;
  bool attention_bias = false;      // llama: on q, k, v and o; qwen2 always has q, k, v
  std::int64_t sliding_window = 0;  // mistral
  double rope_theta = 10000.0;
  std::uint64_t seed = 1;
};

// Vocabulary of the tiny tokenizer: the 256 bytes, a few merges, then the three special tokens.
inline constexpr int kTinyVocab = 288;
inline constexpr int kTinyEndOfText = 285;  // <|endoftext|>, also bos
inline constexpr int kTinyImStart = 286;    // <|im_start|>
inline constexpr int kTinyImEnd = 287;      // <|im_end|>, ends a turn

// First words of so many tokens, 3 or more: a system message, as the tiny template begins and ends it.
std::vector<TokenId> TinyRole(std::mt19937& rng, int tokens);

struct TinyTensor {
  std::vector<std::int64_t> shape;
  std::vector<float> values;  // every one exact in bfloat16
};

// The weights by their Hugging Face names, which is all that the model's files hold of them.
std::map<std::string, TinyTensor> TinyWeights(const TinyModelOptions& options);

// The files' texts, for tests that damage them.
std::string TinyConfigJson(const TinyModelOptions& options);
std::string TinyTokenizerJson();
std::string TinyTokenizerConfigJson();
// `tensors` as a safetensors file, stored as BF16 or F32.
std::string SafetensorsBytes(const std::map<std::string, TinyTensor>& tensors, bool bf16 = true);

// Writes the directory's files; the directory must exist.
Status WriteTinyModel(const std::filesystem::path& dir, const TinyModelOptions& options = {});

Status WriteFile(const std::filesystem::path& path, const std::string& bytes);

}  // namespace kvshare::testing

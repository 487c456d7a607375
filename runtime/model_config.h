// ModelConfig: the shape of a Llama-family model, whichever file it came from.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kvshare/status.h"
#include "kvshare/types.h"

namespace kvshare::runtime {

enum class RopeKind { kDefault, kLinear, kLlama3, kYarn };

struct RopeConfig {
  RopeKind kind = RopeKind::kDefault;
  double theta = 10000.0;
  double factor = 1.0;
  double low_freq_factor = 1.0;            // llama3
  double high_freq_factor = 4.0;           // llama3
  std::int64_t original_max_position = 0;  // llama3, yarn
  double attention_factor = 0.0;           // yarn; 0 = derived from factor
  double beta_fast = 32.0;                 // yarn
  double beta_slow = 1.0;                  // yarn
  // Divides each frequency where a file gives the scaled frequencies instead of a kind (GGUF's rope_freqs); else empty.
  std::vector<double> divisors;
};

struct ModelConfig {
  std::string family;  // "llama" | "qwen3" | ...: a row of the family table (model_config.cc)
  std::string name;    // for people
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  int num_layers = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  std::int64_t max_positions = 0;
  float rms_norm_eps = 0;
  bool tied_embeddings = false;
  bool qk_norm = false;      // RMS norm on every head of q and k (Qwen3)
  bool qkv_bias = false;     // bias on q, k, v (Qwen2; Llama with attention_bias)
  bool output_bias = false;  // bias on o (Llama with attention_bias)
  bool mlp_bias = false;
  std::int64_t sliding_window = 0;  // 0 = none
  RopeConfig rope;
  std::vector<TokenId> eos_ids;  // any of these ends a turn
  TokenId bos_id = -1;           // -1 = none

  // InvalidArgument naming the first field that is out of range or does not fit another.
  Status Validate() const;
};

// config.json (and, where given, generation_config.json for the end tokens) as transformers writes them.
// Returns InvalidArgument naming the file's field, Unimplemented for a family, RoPE kind or activation we lack.
Result<ModelConfig> ParseHfConfig(std::string_view config_json, std::string_view generation_config_json);

}  // namespace kvshare::runtime

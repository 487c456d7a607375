// GGUF files of language models: their metadata as a ModelConfig and a TokenizerSpec, their tensors by the names that
// Hugging Face gives them. Key and tensor names: ggml's docs/gguf.md and gguf-py/gguf/constants.py.
#include <algorithm>
#include <array>
#include <cstring>
#include <filesystem>
#include <set>
#include <string_view>
#include <utility>

#include "libkvshare/core/status_macros.h"
#include "runtime/gguf.h"
#include "runtime/model_files.h"

namespace kvshare::runtime {
namespace {

constexpr std::int64_t kLimit = std::int64_t{1} << 30;  // ModelConfig::Validate has the narrower ranges

struct Architecture {
  const char* name;  // general.architecture, and the prefix of its keys
  bool qk_norm;
  bool interleaved_rope;  // convert_hf_to_gguf permutes q and k of Llama alone
};

constexpr Architecture kArchitectures[] = {
    {"llama", false, true},
    {"qwen2", false, false},
    {"qwen3", true, false},
};

struct Rename {
  std::string_view gguf, hf;
};
constexpr Rename kModelTensors[] = {
    {"token_embd.weight", "model.embed_tokens.weight"},
    {"output_norm.weight", "model.norm.weight"},
    {"output.weight", "lm_head.weight"},
};
constexpr Rename kLayerTensors[] = {
    {"attn_norm", "input_layernorm"},    {"attn_q", "self_attn.q_proj"},
    {"attn_k", "self_attn.k_proj"},      {"attn_v", "self_attn.v_proj"},
    {"attn_output", "self_attn.o_proj"}, {"attn_q_norm", "self_attn.q_norm"},
    {"attn_k_norm", "self_attn.k_norm"}, {"ffn_norm", "post_attention_layernorm"},
    {"ffn_gate", "mlp.gate_proj"},       {"ffn_up", "mlp.up_proj"},
    {"ffn_down", "mlp.down_proj"},
};

// "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; a name we do not know stays as it is.
std::string HfName(std::string_view name) {
  for (const Rename& r : kModelTensors) {
    if (name == r.gguf) return std::string(r.hf);
  }
  if (name.substr(0, 4) != "blk.") return std::string(name);
  const auto first = name.find('.', 4), last = name.rfind('.');
  if (first == std::string_view::npos || last <= first) return std::string(name);
  const std::string_view layer = name.substr(4, first - 4), kind = name.substr(first + 1, last - first - 1);
  for (const Rename& r : kLayerTensors) {
    if (kind == r.gguf) {
      return "model.layers." + std::string(layer) + "." + std::string(r.hf) + std::string(name.substr(last));
    }
  }
  return std::string(name);
}

Status ParseScaling(const Gguf& gguf, const std::string& prefix, ModelConfig* c) {
  RopeConfig& rope = c->rope;
  KVS_ASSIGN_OR_RETURN(rope.theta, gguf.GetFloat(prefix + "rope.freq_base", 10000.0));
  KVS_ASSIGN_OR_RETURN(const std::string kind, gguf.GetString(prefix + "rope.scaling.type", "none"));
  if (kind != "none" && kind != "linear" && kind != "yarn") {
    return Unimplemented("key '" + prefix + "rope.scaling.type': '" + kind + "' is not supported");
  }
  if (kind != "none") {
    rope.kind = kind == "yarn" ? RopeKind::kYarn : RopeKind::kLinear;
    KVS_ASSIGN_OR_RETURN(rope.factor, gguf.GetFloat(prefix + "rope.scaling.factor"));
    KVS_ASSIGN_OR_RETURN(rope.original_max_position,
                         gguf.GetInt(prefix + "rope.scaling.original_context_length", 1, kLimit, c->max_positions));
    KVS_ASSIGN_OR_RETURN(rope.beta_fast, gguf.GetFloat(prefix + "rope.scaling.yarn_beta_fast", rope.beta_fast));
    KVS_ASSIGN_OR_RETURN(rope.beta_slow, gguf.GetFloat(prefix + "rope.scaling.yarn_beta_slow", rope.beta_slow));
    for (const char* key : {"attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"}) {
      const std::string name = prefix + "rope.scaling." + key;
      if (gguf.Has(name)) return Unimplemented("key '" + name + "' is not supported");
    }
  }
  if (const auto it = gguf.tensors().find("rope_freqs.weight"); it != gguf.tensors().end()) {
    if (it->second.shape.size() != 1 || it->second.cols() > kLimit) {
      return InvalidArgument("tensor 'rope_freqs.weight' must be a vector");
    }
    std::vector<float> divisors(static_cast<std::size_t>(it->second.cols()));
    DecodeRows(it->second, 0, 1, divisors.data());
    rope.divisors.assign(divisors.begin(), divisors.end());
  }
  return OkStatus();
}

Status ParseConfig(const Gguf& gguf, const Architecture& architecture, ModelConfig* c) {
  const std::string prefix = std::string(architecture.name) + ".";
  c->family = architecture.name;
  KVS_ASSIGN_OR_RETURN(c->name, gguf.GetString("general.name", ""));
  const auto read = [&](const std::string& key, auto* out,
                        std::optional<std::int64_t> fallback = std::nullopt) -> Status {
    KVS_ASSIGN_OR_RETURN(const std::int64_t value, gguf.GetInt(prefix + key, 1, kLimit, fallback));
    *out = static_cast<std::remove_pointer_t<decltype(out)>>(value);
    return OkStatus();
  };
  KVS_RETURN_IF_ERROR(read("block_count", &c->num_layers));
  KVS_RETURN_IF_ERROR(read("context_length", &c->max_positions));
  KVS_RETURN_IF_ERROR(read("embedding_length", &c->hidden_size));
  KVS_RETURN_IF_ERROR(read("feed_forward_length", &c->intermediate_size));
  KVS_RETURN_IF_ERROR(read("attention.head_count", &c->num_heads));
  KVS_RETURN_IF_ERROR(read("attention.head_count_kv", &c->num_kv_heads, c->num_heads));
  KVS_RETURN_IF_ERROR(
      read("attention.key_length", &c->head_dim, std::max<std::int64_t>(1, c->hidden_size / c->num_heads)));
  for (const char* key : {"attention.value_length", "rope.dimension_count"}) {
    int dim = 0;
    KVS_RETURN_IF_ERROR(read(key, &dim, c->head_dim));
    if (dim != c->head_dim)
      return Unimplemented("key '" + prefix + key + "' other than the head size is not supported");
  }
  for (const char* key : {"expert_count", "attention.sliding_window"}) {
    KVS_ASSIGN_OR_RETURN(const std::int64_t count, gguf.GetInt(prefix + key, 0, kLimit, 0));
    if (count != 0) return Unimplemented("key '" + prefix + key + "' is not supported");
  }
  KVS_ASSIGN_OR_RETURN(const double eps, gguf.GetFloat(prefix + "attention.layer_norm_rms_epsilon"));
  c->rms_norm_eps = static_cast<float>(eps);
  c->qk_norm = architecture.qk_norm;
  c->qkv_bias = gguf.tensors().count("blk.0.attn_q.bias") > 0;
  c->output_bias = gguf.tensors().count("blk.0.attn_output.bias") > 0;
  c->mlp_bias = gguf.tensors().count("blk.0.ffn_gate.bias") > 0;
  c->tied_embeddings = gguf.tensors().count("output.weight") == 0;
  const auto embedding = gguf.tensors().find("token_embd.weight");
  if (embedding == gguf.tensors().end()) return InvalidArgument("tensor 'token_embd.weight' is missing");
  c->vocab_size = embedding->second.rows();
  return ParseScaling(gguf, prefix, c);
}

// ggml's token types: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
Status ParseTokenizer(const Gguf& gguf, ModelFiles* out) {
  if (!gguf.Has("tokenizer.ggml.model")) return OkStatus();
  KVS_ASSIGN_OR_RETURN(const std::string model, gguf.GetString("tokenizer.ggml.model"));
  if (model != "gpt2") {
    return Unimplemented("key 'tokenizer.ggml.model': '" + model + "' is not supported (gpt2, byte-level BPE, is)");
  }
  KVS_ASSIGN_OR_RETURN(const std::string pre, gguf.GetString("tokenizer.ggml.pre", "gpt-2"));
  KVS_ASSIGN_OR_RETURN(const auto tokens, gguf.GetStrings("tokenizer.ggml.tokens"));
  KVS_ASSIGN_OR_RETURN(const auto merges, gguf.GetStrings("tokenizer.ggml.merges"));
  KVS_ASSIGN_OR_RETURN(const auto types, gguf.GetInts("tokenizer.ggml.token_type"));
  if (types.size() != tokens.size()) {
    return InvalidArgument("key 'tokenizer.ggml.token_type' has " + std::to_string(types.size()) + " entries for " +
                           std::to_string(tokens.size()) + " tokens");
  }
  if (static_cast<std::int64_t>(tokens.size()) > out->config.vocab_size) {
    return InvalidArgument("key 'tokenizer.ggml.tokens' has " + std::to_string(tokens.size()) +
                           " entries, more than the embedding's " + std::to_string(out->config.vocab_size) + " rows");
  }
  TokenizerSpec spec;
  auto steps = PreTokenizerByName(pre);
  if (!steps.ok()) return steps.status().WithContext("key 'tokenizer.ggml.pre'");
  spec.pre = std::move(*steps);
  spec.nfc = pre == "qwen2";                // tokenizer.json of that family normalises; GGUF does not say so
  spec.ignore_merges = pre == "llama-bpe";  // likewise
  spec.vocab.assign(tokens.begin(), tokens.end());
  for (const std::string_view merge : merges) {
    // "left right", where left may itself begin with a space character's stand-in but never with a space.
    const auto space = merge.find(' ', 1);
    if (space == std::string_view::npos)
      return InvalidArgument("key 'tokenizer.ggml.merges' has an entry without a space");
    spec.merges.emplace_back(merge.substr(0, space), merge.substr(space + 1));
  }
  constexpr std::int64_t kControl = 3, kUserDefined = 4;
  for (std::size_t i = 0; i < types.size(); ++i) {
    if (types[i] != kControl && types[i] != kUserDefined) continue;
    spec.added.push_back(
        {.id = static_cast<TokenId>(i), .text = std::string(tokens[i]), .special = types[i] == kControl});
  }
  out->tokenizer = std::move(spec);
  return OkStatus();
}

Status ParseSpecialTokens(const Gguf& gguf, ModelFiles* out) {
  const std::int64_t last = out->config.vocab_size - 1;
  const auto text = [&](TokenId id) {
    const bool known =
        id >= 0 && out->tokenizer.has_value() && static_cast<std::size_t>(id) < out->tokenizer->vocab.size();
    return known ? out->tokenizer->vocab[static_cast<std::size_t>(id)] : std::string();
  };
  KVS_ASSIGN_OR_RETURN(const std::int64_t bos, gguf.GetInt("tokenizer.ggml.bos_token_id", 0, last, -1));
  out->config.bos_id = static_cast<TokenId>(bos);
  out->bos_text = text(out->config.bos_id);
  std::set<TokenId> ends;
  for (const char* key :
       {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"}) {
    KVS_ASSIGN_OR_RETURN(const std::int64_t id, gguf.GetInt(key, 0, last, -1));
    if (id < 0) continue;
    if (ends.empty()) out->eos_text = text(static_cast<TokenId>(id));
    ends.insert(static_cast<TokenId>(id));
  }
  out->config.eos_ids.assign(ends.begin(), ends.end());
  KVS_ASSIGN_OR_RETURN(out->chat_template, gguf.GetString("tokenizer.chat_template", ""));
  return OkStatus();
}

}  // namespace

Result<ModelFiles> ParseGgufModel(std::span<const std::byte> bytes) {
  KVS_ASSIGN_OR_RETURN(const Gguf gguf, Gguf::Parse(bytes));
  KVS_ASSIGN_OR_RETURN(const std::string name, gguf.GetString("general.architecture"));
  const auto* architecture = std::find_if(std::begin(kArchitectures), std::end(kArchitectures),
                                          [&](const Architecture& a) { return a.name == name; });
  if (architecture == std::end(kArchitectures)) {
    return Unimplemented("architecture '" + name + "' is not supported (llama, qwen2, qwen3 are)");
  }
  ModelFiles files;
  files.interleaved_rope = architecture->interleaved_rope;
  KVS_RETURN_IF_ERROR(ParseConfig(gguf, *architecture, &files.config));
  KVS_RETURN_IF_ERROR(ParseTokenizer(gguf, &files));
  KVS_RETURN_IF_ERROR(ParseSpecialTokens(gguf, &files));
  KVS_RETURN_IF_ERROR(files.config.Validate());
  for (const auto& [tensor_name, tensor] : gguf.tensors()) {
    if (tensor_name == "rope_freqs.weight") continue;  // read into config.rope.divisors
    if (!files.tensors.emplace(HfName(tensor_name), tensor).second) {
      return InvalidArgument("tensor '" + tensor_name + "' stands twice under different names");
    }
  }
  return files;
}

Result<ModelFiles> OpenGguf(const std::string& path) {
  KVS_ASSIGN_OR_RETURN(auto mapping, MappedFile::Open(path));
  auto files = ParseGgufModel(mapping->bytes());
  if (!files.ok()) return files.status().WithContext(path);
  if (files->config.name.empty()) files->config.name = std::filesystem::path(path).stem().string();
  files->mappings.push_back(std::move(mapping));
  return files;
}

}  // namespace kvshare::runtime

#include "runtime/model_config.h"

#include <algorithm>
#include <cmath>
#include <span>

#include "libkvshare/core/status_macros.h"
#include "runtime/json.h"
#include "runtime/rope.h"

namespace kvshare::runtime {
namespace {

// Beyond these lies no model of these families; they keep every later product of sizes far from overflow.
constexpr std::int64_t kMaxVocab = std::int64_t{1} << 22;
constexpr std::int64_t kMaxWidth = std::int64_t{1} << 20;
constexpr std::int64_t kMaxLayers = 1024;
constexpr std::int64_t kMaxHeads = 1024;
constexpr std::int64_t kMaxHeadDim = 256;                      // as kernels/cpu/attention.cc
constexpr std::int64_t kMaxPositions = std::int64_t{1} << 21;  // RoPE's tables hold one row for each

enum class Bias { kNever, kAlways, kByConfig };
enum class Window { kNone, kPlain, kByLayer };

// What tells the families apart. Everything else is one and the same computation (llama.cc).
struct Family {
  const char* name;
  bool qk_norm;
  Bias qkv_bias;         // kByConfig: attention_bias
  bool output_bias;      // follows attention_bias
  bool mlp_bias;         // follows mlp_bias
  Window window;         // kPlain: sliding_window for all layers; kByLayer: use_sliding_window, layer_types
  int default_head_dim;  // when the file names none; 0: hidden_size / num_attention_heads
};

constexpr Family kFamilies[] = {
    {"llama", false, Bias::kByConfig, true, true, Window::kNone, 0},
    {"mistral", false, Bias::kNever, false, false, Window::kPlain, 0},
    {"qwen2", false, Bias::kAlways, false, false, Window::kByLayer, 0},
    {"qwen3", true, Bias::kByConfig, true, false, Window::kByLayer, 128},
};

const Family* FindFamily(std::string_view name) {
  const auto* it =
      std::find_if(std::begin(kFamilies), std::end(kFamilies), [&](const Family& f) { return f.name == name; });
  return it == std::end(kFamilies) ? nullptr : it;
}

std::string FamilyNames() {
  std::string names;
  for (const Family& family : kFamilies) names += (names.empty() ? "" : ", ") + std::string(family.name);
  return names;
}

Status OutOfRange(const char* field, std::int64_t value, std::int64_t lo, std::int64_t hi) {
  return InvalidArgument("field '" + std::string(field) + "' is " + std::to_string(value) + ", outside " +
                         std::to_string(lo) + ".." + std::to_string(hi));
}

Status ParseYarn(const Json& rope, std::int64_t max_positions, RopeConfig* out) {
  KVS_ASSIGN_OR_RETURN(out->original_max_position,
                       GetInt(rope, "original_max_position_embeddings", 1, kMaxPositions, max_positions));
  const double ratio = static_cast<double>(max_positions) / static_cast<double>(out->original_max_position);
  KVS_ASSIGN_OR_RETURN(out->factor, GetNumber(rope, "factor", 1, 1e6, std::max(1.0, ratio)));
  KVS_ASSIGN_OR_RETURN(out->beta_fast, GetNumber(rope, "beta_fast", 1e-6, 1e6, 32.0));
  KVS_ASSIGN_OR_RETURN(out->beta_slow, GetNumber(rope, "beta_slow", 1e-6, 1e6, 1.0));
  KVS_ASSIGN_OR_RETURN(const double mscale, GetNumber(rope, "mscale", 0, 1e3, 0.0));
  KVS_ASSIGN_OR_RETURN(const double mscale_all, GetNumber(rope, "mscale_all_dim", 0, 1e3, 0.0));
  const double derived = mscale > 0 && mscale_all > 0
                             ? YarnAttentionFactor(out->factor, mscale) / YarnAttentionFactor(out->factor, mscale_all)
                             : YarnAttentionFactor(out->factor, 1);
  KVS_ASSIGN_OR_RETURN(out->attention_factor, GetNumber(rope, "attention_factor", 1e-6, 1e3, derived));
  KVS_ASSIGN_OR_RETURN(const bool truncate, GetBool(rope, "truncate", true));
  if (!truncate) return Unimplemented("yarn RoPE with truncate = false is not supported");
  return OkStatus();
}

// transformers 5 writes rope_parameters {rope_type, rope_theta, ...}; 4 wrote rope_theta beside rope_scaling {rope_type
// or type, ...}, which is null for the default kind.
Status ParseRope(const Json& config, std::int64_t max_positions, RopeConfig* out) {
  const Json empty = Json::object();
  const Json* rope = FindField(config, "rope_parameters");
  const char* field = "rope_parameters";
  if (rope == nullptr) {
    rope = FindField(config, "rope_scaling");
    field = "rope_scaling";
  }
  if (rope == nullptr) rope = &empty;
  if (!rope->is_object()) return InvalidArgument("field '" + std::string(field) + "' must be an object");

  KVS_ASSIGN_OR_RETURN(const double outer_theta, GetNumber(config, "rope_theta", 1.0001, 1e15, 10000.0));
  KVS_ASSIGN_OR_RETURN(out->theta, GetNumber(*rope, "rope_theta", 1.0001, 1e15, outer_theta));
  for (const Json* object : {rope, &config}) {
    KVS_ASSIGN_OR_RETURN(const double partial, GetNumber(*object, "partial_rotary_factor", 0, 1, 1.0));
    if (partial != 1.0) return Unimplemented("partial_rotary_factor other than 1 is not supported");
  }
  KVS_ASSIGN_OR_RETURN(const std::string old_kind, GetString(*rope, "type", "default"));
  KVS_ASSIGN_OR_RETURN(const std::string kind, GetString(*rope, "rope_type", old_kind));
  if (kind == "default") {
    out->kind = RopeKind::kDefault;
  } else if (kind == "linear") {
    out->kind = RopeKind::kLinear;
    KVS_ASSIGN_OR_RETURN(out->factor, GetNumber(*rope, "factor", 1e-6, 1e6));
  } else if (kind == "llama3") {
    out->kind = RopeKind::kLlama3;
    KVS_ASSIGN_OR_RETURN(out->factor, GetNumber(*rope, "factor", 1e-6, 1e6));
    KVS_ASSIGN_OR_RETURN(out->low_freq_factor, GetNumber(*rope, "low_freq_factor", 1e-6, 1e6));
    KVS_ASSIGN_OR_RETURN(out->high_freq_factor, GetNumber(*rope, "high_freq_factor", 1e-6, 1e6));
    KVS_ASSIGN_OR_RETURN(out->original_max_position,
                         GetInt(*rope, "original_max_position_embeddings", 1, kMaxPositions));
  } else if (kind == "yarn") {
    out->kind = RopeKind::kYarn;
    KVS_RETURN_IF_ERROR(ParseYarn(*rope, max_positions, out));
  } else {
    // dynamic and longrope change with the prompt's length: stored keys would not stay true.
    return Unimplemented("rope_type '" + kind + "' is not supported (default, linear, llama3, yarn are)");
  }
  return OkStatus();
}

// One window for all layers, or none; layers that differ are not supported.
Status ParseWindow(const Json& config, const Family& family, ModelConfig* out) {
  constexpr std::int64_t kMistralDefault = 4096;  // what transformers takes when the field is absent; null means none
  if (family.window == Window::kNone) return OkStatus();
  const bool absent = !config.contains("sliding_window");
  KVS_ASSIGN_OR_RETURN(const std::int64_t window,
                       GetInt(config, "sliding_window", 1, kMaxPositions, absent ? kMistralDefault : 0));
  if (family.window == Window::kPlain) {
    out->sliding_window = window;
    return OkStatus();
  }
  KVS_ASSIGN_OR_RETURN(const bool use_window, GetBool(config, "use_sliding_window", false));
  if (!use_window || window == 0) return OkStatus();
  std::int64_t windowed = 0;
  if (const Json* types = FindField(config, "layer_types")) {
    if (!types->is_array() || static_cast<int>(types->size()) != out->num_layers) {
      return InvalidArgument("field 'layer_types' must name one type per layer");
    }
    for (const Json& type : *types) {
      if (type == "sliding_attention") {
        ++windowed;
      } else if (type != "full_attention") {
        return Unimplemented("field 'layer_types' has a kind of layer that is not supported");
      }
    }
  } else {
    KVS_ASSIGN_OR_RETURN(const std::int64_t full, GetInt(config, "max_window_layers", 0, 1 << 20, 28));
    windowed = std::max<std::int64_t>(0, out->num_layers - full);
  }
  if (windowed == 0) return OkStatus();
  if (windowed != out->num_layers) {
    return Unimplemented("sliding_window for some layers only (layer_types, max_window_layers) is not supported");
  }
  out->sliding_window = window;
  return OkStatus();
}

// eos_token_id is a number, a list of numbers, or null.
Status ParseEos(const Json& object, std::vector<TokenId>* out) {
  const Json* eos = FindField(object, "eos_token_id");
  if (eos == nullptr) return OkStatus();
  const Json list = eos->is_array() ? *eos : Json::array({*eos});
  out->clear();
  for (const Json& id : list) {
    if (!id.is_number_integer() || id.get<std::int64_t>() < 0 || id.get<std::int64_t>() >= kMaxVocab) {
      return InvalidArgument("field 'eos_token_id' must be a token id or a list of them");
    }
    out->push_back(static_cast<TokenId>(id.get<std::int64_t>()));
  }
  return OkStatus();
}

}  // namespace

Status ModelConfig::Validate() const {
  struct Range {
    const char* field;
    std::int64_t value, lo, hi;
  };
  const Range ranges[] = {
      {"vocab_size", vocab_size, 1, kMaxVocab},
      {"hidden_size", hidden_size, 1, kMaxWidth},
      {"intermediate_size", intermediate_size, 1, kMaxWidth},
      {"num_hidden_layers", num_layers, 1, kMaxLayers},
      {"num_attention_heads", num_heads, 1, kMaxHeads},
      {"num_key_value_heads", num_kv_heads, 1, kMaxHeads},
      {"head_dim", head_dim, 8, kMaxHeadDim},
      {"max_position_embeddings", max_positions, 1, kMaxPositions},
      {"sliding_window", sliding_window, 0, kMaxPositions},
      {"bos_token_id", bos_id, -1, vocab_size - 1},
  };
  for (const Range& r : ranges) {
    if (r.value < r.lo || r.value > r.hi) return OutOfRange(r.field, r.value, r.lo, r.hi);
  }
  for (const TokenId id : eos_ids) {
    if (id < 0 || id >= vocab_size) return OutOfRange("eos_token_id", id, 0, vocab_size - 1);
  }
  if (num_heads % num_kv_heads != 0) {
    return InvalidArgument("field 'num_key_value_heads' is " + std::to_string(num_kv_heads) +
                           ", which does not divide num_attention_heads = " + std::to_string(num_heads));
  }
  if (head_dim % 8 != 0) {
    return Unimplemented("field 'head_dim' is " + std::to_string(head_dim) + "; kernels take multiples of 8");
  }
  if (!std::isfinite(rms_norm_eps) || rms_norm_eps < 0 || rms_norm_eps > 1) {
    return InvalidArgument("field 'rms_norm_eps' is outside 0..1");
  }
  if (!std::isfinite(rope.theta) || rope.theta <= 1) return InvalidArgument("field 'rope_theta' must be above 1");
  if (!std::isfinite(rope.factor) || rope.factor <= 0) return InvalidArgument("RoPE's field 'factor' must be above 0");
  if (rope.kind == RopeKind::kLlama3 || rope.kind == RopeKind::kYarn) {
    if (rope.original_max_position < 1) {
      return InvalidArgument("RoPE's field 'original_max_position_embeddings' must be above 0");
    }
  }
  if (rope.kind == RopeKind::kYarn &&
      !(std::isfinite(rope.beta_fast) && rope.beta_fast > 0 && std::isfinite(rope.beta_slow) && rope.beta_slow > 0)) {
    return InvalidArgument("RoPE's fields 'beta_fast' and 'beta_slow' must be above 0");
  }
  if (rope.kind == RopeKind::kLlama3 && !(rope.high_freq_factor > rope.low_freq_factor && rope.low_freq_factor > 0)) {
    return InvalidArgument("RoPE's field 'high_freq_factor' must be above 'low_freq_factor', and that above 0");
  }
  if (!rope.divisors.empty()) {
    if (static_cast<int>(rope.divisors.size()) != head_dim / 2) {
      return InvalidArgument("RoPE's frequency factors are " + std::to_string(rope.divisors.size()) +
                             ", not head_dim / 2");
    }
    for (const double d : rope.divisors) {
      if (!std::isfinite(d) || d <= 0) return InvalidArgument("a frequency factor of RoPE is not a positive number");
    }
  }
  return OkStatus();
}

Result<ModelConfig> ParseHfConfig(std::string_view config_json, std::string_view generation_config_json) {
  KVS_ASSIGN_OR_RETURN(const Json json, ParseJsonObject(config_json));
  ModelConfig c;
  KVS_ASSIGN_OR_RETURN(c.family, GetString(json, "model_type"));
  const Family* family = FindFamily(c.family);
  if (family == nullptr) {
    return Unimplemented("model_type '" + c.family + "' is not supported (" + FamilyNames() + " are)");
  }
  if (FindField(json, "quantization_config") != nullptr) {
    return Unimplemented("field 'quantization_config': quantised safetensors are not supported; take a GGUF file");
  }
  KVS_ASSIGN_OR_RETURN(const std::string act, GetString(json, "hidden_act", "silu"));
  if (act != "silu" && act != "swish") return Unimplemented("hidden_act '" + act + "' is not supported (silu is)");

  const auto read_int = [&json](const char* key, std::int64_t hi, auto* out,
                                std::optional<std::int64_t> fallback = std::nullopt) -> Status {
    KVS_ASSIGN_OR_RETURN(const std::int64_t value, GetInt(json, key, 1, hi, fallback));
    *out = static_cast<std::remove_pointer_t<decltype(out)>>(value);
    return OkStatus();
  };
  KVS_RETURN_IF_ERROR(read_int("vocab_size", kMaxVocab, &c.vocab_size));
  KVS_RETURN_IF_ERROR(read_int("hidden_size", kMaxWidth, &c.hidden_size));
  KVS_RETURN_IF_ERROR(read_int("intermediate_size", kMaxWidth, &c.intermediate_size));
  KVS_RETURN_IF_ERROR(read_int("num_hidden_layers", kMaxLayers, &c.num_layers));
  KVS_RETURN_IF_ERROR(read_int("num_attention_heads", kMaxHeads, &c.num_heads));
  KVS_RETURN_IF_ERROR(read_int("num_key_value_heads", kMaxHeads, &c.num_kv_heads, c.num_heads));
  KVS_RETURN_IF_ERROR(read_int("max_position_embeddings", kMaxPositions, &c.max_positions));
  if (family->default_head_dim == 0 && FindField(json, "head_dim") == nullptr && c.hidden_size % c.num_heads != 0) {
    return InvalidArgument("field 'num_attention_heads' does not divide hidden_size, and there is no head_dim");
  }
  KVS_RETURN_IF_ERROR(read_int("head_dim", kMaxHeadDim, &c.head_dim,
                               family->default_head_dim != 0 ? family->default_head_dim : c.hidden_size / c.num_heads));
  KVS_ASSIGN_OR_RETURN(const double eps, GetNumber(json, "rms_norm_eps", 0, 1, 1e-6));
  c.rms_norm_eps = static_cast<float>(eps);
  KVS_ASSIGN_OR_RETURN(c.tied_embeddings, GetBool(json, "tie_word_embeddings", false));
  KVS_ASSIGN_OR_RETURN(const bool attention_bias, GetBool(json, "attention_bias", false));
  KVS_ASSIGN_OR_RETURN(const bool mlp_bias, GetBool(json, "mlp_bias", false));
  c.qk_norm = family->qk_norm;
  c.qkv_bias = family->qkv_bias == Bias::kAlways || (family->qkv_bias == Bias::kByConfig && attention_bias);
  c.output_bias = family->output_bias && attention_bias;
  c.mlp_bias = family->mlp_bias && mlp_bias;
  KVS_RETURN_IF_ERROR(ParseRope(json, c.max_positions, &c.rope));
  KVS_RETURN_IF_ERROR(ParseWindow(json, *family, &c));

  KVS_ASSIGN_OR_RETURN(const std::int64_t bos, GetInt(json, "bos_token_id", 0, kMaxVocab, -1));
  c.bos_id = static_cast<TokenId>(bos);
  KVS_RETURN_IF_ERROR(ParseEos(json, &c.eos_ids));
  if (!generation_config_json.empty()) {
    // transformers' generate() goes by this file where it names end tokens.
    auto generation = ParseJsonObject(generation_config_json);
    if (!generation.ok()) return generation.status().WithContext("generation_config.json");
    KVS_RETURN_IF_ERROR(ParseEos(*generation, &c.eos_ids).WithContext("generation_config.json"));
  }
  KVS_RETURN_IF_ERROR(c.Validate());
  return c;
}

}  // namespace kvshare::runtime

#include "runtime/lora.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <filesystem>
#include <optional>
#include <set>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "libkvshare/core/status_macros.h"
#include "runtime/json.h"
#include "runtime/parallel.h"
#include "runtime/safetensors.h"
#include "runtime/weights.h"

namespace kvshare::runtime {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMaxConfigBytes = std::size_t{1} << 20;
constexpr std::int64_t kMaxRank = 1 << 16;
constexpr double kMaxAlpha = 1e9;

// Fields of PEFT's LoraConfig that are read below, or that say nothing about the merged weights. Which modules were
// adapted is also said by the tensors themselves, so that layers_to_transform and its like need no reading. Any field
// beyond these must be null, false or empty: somebody switched on what we do not know. fan_in_fan_out is for
// GPT-2's transposed layers; PEFT itself ignores it for layers like ours.
constexpr std::string_view kKnownFields[] = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "lora_alpha",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "init_lora_weights",
    "lora_dropout",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
};

struct Variant {
  const char* field;
  const char* what;  // it is, and what to do instead
};
constexpr Variant kVariants[] = {
    {"use_dora",
     "DoRA rescales every row, which is not W + s B A; merge it with PEFT (merge_and_unload) and load that"},
    {"modules_to_save", "modules saved whole are not supported; merge them with PEFT (merge_and_unload) and load that"},
    {"lora_bias", "biases trained with the adapter are not supported; train with lora_bias = false"},
    {"trainable_token_indices", "trained token embeddings are not supported; train without them"},
    {"layer_replication", "repeated layers make another model; merge it with PEFT and load that"},
    {"alora_invocation_tokens", "an adapter that begins at a token cannot be merged into the weights"},
    {"target_parameters", "only linear layers can be adapted, by target_modules"},
};

// "a" or "pattern key -> value" of rank_pattern and alpha_pattern.
using Pattern = std::vector<std::pair<std::string, double>>;

struct LoraConfig {
  std::int64_t rank = 0;
  double alpha = 0;
  bool rank_stabilised = false;
  Pattern ranks, alphas;
  std::optional<std::vector<std::string>> targets;  // null: a regular expression or "all-linear"
  bool some_layers_only = false;
};

bool IsInert(const Json& value) {
  return value.is_null() || (value.is_boolean() && !value.get<bool>()) || (value.is_structured() && value.empty()) ||
         (value.is_string() && value.get_ref<const std::string&>().empty());
}

// PEFT's rule: the last parts of the module's name are `key`.
bool IsNamedBy(const std::string& module, const std::string& key) {
  return module == key ||
         (module.size() > key.size() && module.ends_with(key) && module[module.size() - key.size() - 1] == '.');
}

Result<Pattern> ParsePattern(const Json& config, const char* field, double lo, double hi) {
  Pattern pattern;
  const Json* object = FindField(config, field);
  if (object == nullptr) return pattern;
  const std::string name = "field '" + std::string(field) + "'";
  if (!object->is_object()) return InvalidArgument(name + " must be an object of module names and numbers");
  for (const auto& [key, value] : object->items()) {
    if (key.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.") != key.npos) {
      return Unimplemented(name + ": '" + key + "' is a regular expression, only names of modules are supported");
    }
    if (!value.is_number() || !(value.get<double>() >= lo && value.get<double>() <= hi)) {
      return InvalidArgument(name + " of '" + key + "' must be a number within its range");
    }
    pattern.emplace_back(key, value.get<double>());
  }
  return pattern;
}

// The one value that a pattern gives a module, or `fallback`.
Result<double> PatternValue(const Pattern& pattern, const char* field, const std::string& module, double fallback) {
  std::optional<double> value;
  for (const auto& [key, number] : pattern) {
    if (!IsNamedBy(module, key)) continue;
    // PEFT takes the first in the file's order, which a JSON object does not promise to keep.
    if (value.has_value() && *value != number) {
      return InvalidArgument("field '" + std::string(field) + "' gives module '" + module + "' two values");
    }
    value = number;
  }
  return value.value_or(fallback);
}

Status RefuseVariants(const Json& config) {
  for (const Variant& variant : kVariants) {
    const Json* value = FindField(config, variant.field);
    if (value != nullptr && !IsInert(*value)) {
      return Unimplemented("field '" + std::string(variant.field) + "': " + variant.what);
    }
  }
  KVS_ASSIGN_OR_RETURN(const std::string bias, GetString(config, "bias", "none"));
  if (bias != "none") {
    return Unimplemented("field 'bias': '" + bias + "' trains biases with the adapter; only 'none' is supported");
  }
  // PiSSA, OLoRA, CorDA, LoftQ and their like begin with another base than the model's files hold.
  if (const Json* init = FindField(config, "init_lora_weights"); init != nullptr && !init->is_boolean()) {
    constexpr std::array<std::string_view, 3> kKeepTheBase = {"gaussian", "eva", "orthogonal"};
    const std::string name = init->is_string() ? init->get<std::string>() : init->dump();
    if (std::find(kKeepTheBase.begin(), kKeepTheBase.end(), name) == kKeepTheBase.end()) {
      return Unimplemented("field 'init_lora_weights': '" + name +
                           "' changes the base model; convert the adapter to plain LoRA with PEFT "
                           "(path_initial_model_for_weight_conversion)");
    }
  }
  for (const auto& [key, value] : config.items()) {
    if (std::find(std::begin(kKnownFields), std::end(kKnownFields), key) == std::end(kKnownFields) && !IsInert(value)) {
      return Unimplemented("field '" + key +
                           "' is not known, and what it changes would be lost; merge the adapter "
                           "with PEFT (merge_and_unload) and load that");
    }
  }
  return OkStatus();
}

Result<LoraConfig> ParseLoraConfig(std::string_view text) {
  KVS_ASSIGN_OR_RETURN(const Json config, ParseJsonObject(text));
  KVS_ASSIGN_OR_RETURN(const std::string type, GetString(config, "peft_type"));
  if (type != "LORA") return Unimplemented("field 'peft_type': '" + type + "' is not supported, only LORA is");
  KVS_RETURN_IF_ERROR(RefuseVariants(config));
  LoraConfig out;
  KVS_ASSIGN_OR_RETURN(out.rank, GetInt(config, "r", 1, kMaxRank));
  KVS_ASSIGN_OR_RETURN(out.alpha, GetNumber(config, "lora_alpha", -kMaxAlpha, kMaxAlpha));
  KVS_ASSIGN_OR_RETURN(out.rank_stabilised, GetBool(config, "use_rslora", false));
  KVS_RETURN_IF_ERROR(GetBool(config, "fan_in_fan_out", false).status());
  KVS_ASSIGN_OR_RETURN(out.ranks, ParsePattern(config, "rank_pattern", 1, static_cast<double>(kMaxRank)));
  KVS_ASSIGN_OR_RETURN(out.alphas, ParsePattern(config, "alpha_pattern", -kMaxAlpha, kMaxAlpha));
  for (const char* field : {"layers_to_transform", "exclude_modules"}) {
    const Json* value = FindField(config, field);
    out.some_layers_only |= value != nullptr && !IsInert(*value);
  }
  const Json* targets = FindField(config, "target_modules");
  if (targets == nullptr) return InvalidArgument("field 'target_modules' is missing");
  if (targets->is_string()) return out;
  if (!targets->is_array() || targets->empty()) {
    return InvalidArgument("field 'target_modules' must be a list of names, or a string");
  }
  out.targets.emplace();
  for (const Json& target : *targets) {
    if (!target.is_string() || target.get_ref<const std::string&>().empty()) {
      return InvalidArgument("field 'target_modules' holds something that is not a name");
    }
    out.targets->push_back(target.get<std::string>());
  }
  return out;
}

using Shapes = std::map<std::string, std::vector<std::int64_t>>;

bool IsTarget(const LoraConfig& config, const std::string& module) {
  return !config.targets.has_value() || std::any_of(config.targets->begin(), config.targets->end(),
                                                    [&](const std::string& key) { return IsNamedBy(module, key); });
}

// Every target is a linear layer of the model.
Status CheckTargets(const LoraConfig& config, const ModelConfig& model, const Shapes& shapes) {
  if (!config.targets.has_value()) return OkStatus();
  for (const std::string& key : *config.targets) {
    if (std::any_of(shapes.begin(), shapes.end(), [&](const auto& shape) { return IsNamedBy(shape.first, key); })) {
      continue;
    }
    std::string fix = "it was trained for another base model";
    if (key == "embed_tokens")
      fix = "embeddings cannot be adapted; merge it with PEFT (merge_and_unload) and load that";
    if (key == "lm_head") fix = "the model's output layer is its embedding, which cannot be adapted";
    return InvalidArgument("field 'target_modules': this " + model.family + " model has no linear layer '" + key +
                           "': " + fix);
  }
  return OkStatus();
}

// Sorts the file's tensors into updates, each for a target and of the shape that it has.
Status ReadUpdates(const LoraConfig& config, const TensorMap& tensors, const Shapes& shapes, LoraAdapter* out) {
  constexpr std::string_view kPrefix = "base_model.model.", kA = ".lora_A.weight", kB = ".lora_B.weight";
  for (const auto& [name, tensor] : tensors) {
    const std::string cause = "tensor '" + name + "' ";
    const bool is_a = name.ends_with(kA);
    if (!name.starts_with(kPrefix) || !(is_a || name.ends_with(kB))) {
      return Unimplemented(cause +
                           "is neither lora_A nor lora_B of a linear layer; merge the adapter with PEFT "
                           "(merge_and_unload) and load that");
    }
    const std::string module = name.substr(kPrefix.size(), name.size() - kPrefix.size() - kA.size());
    const auto shape = shapes.find(module);
    if (shape == shapes.end()) {
      return InvalidArgument(cause + "belongs to no linear layer of the model: was the adapter trained for another?");
    }
    if (!IsTarget(config, module)) {
      return InvalidArgument(cause + "is of a layer that target_modules does not name: file and configuration differ");
    }
    KVS_ASSIGN_OR_RETURN(const double rank,
                         PatternValue(config.ranks, "rank_pattern", module, static_cast<double>(config.rank)));
    const auto r = static_cast<std::int64_t>(rank);
    const std::vector<std::int64_t> want =
        is_a ? std::vector<std::int64_t>{r, shape->second[1]} : std::vector<std::int64_t>{shape->second[0], r};
    if (tensor.shape != want) {
      return InvalidArgument(cause + "has shape " + ShapeText(tensor.shape) + ", rank " + std::to_string(r) +
                             " and the model's layer ask for " + ShapeText(want));
    }
    LoraUpdate& update = out->updates[module + ".weight"];
    (is_a ? update.a : update.b) = tensor;
    KVS_ASSIGN_OR_RETURN(const double alpha, PatternValue(config.alphas, "alpha_pattern", module, config.alpha));
    update.scale = static_cast<float>(alpha / (config.rank_stabilised ? std::sqrt(rank) : rank));
  }
  for (const auto& [name, update] : out->updates) {
    if (update.a.type == nullptr || update.b.type == nullptr) {
      return InvalidArgument("'" + name + "' has only " + (update.a.type != nullptr ? "lora_A" : "lora_B") +
                             ": the file is not complete");
    }
  }
  if (out->updates.empty()) return InvalidArgument("the file has no tensors, so the adapter would change nothing");
  if (!config.targets.has_value() || config.some_layers_only) return OkStatus();
  for (const auto& [module, shape] : shapes) {
    if (IsTarget(config, module) && out->updates.count(module + ".weight") == 0) {
      return InvalidArgument("target_modules names '" + module +
                             "', but the file has no tensors of it: it is not "
                             "complete or was trained for another model");
    }
  }
  return OkStatus();
}

Digest UpdatesDigest(const std::map<std::string, LoraUpdate>& updates) {
  DigestBuilder builder("lora");
  for (const auto& [name, update] : updates) {
    builder.Text(name).U64(std::bit_cast<std::uint32_t>(update.scale));
    for (const TensorView* tensor : {&update.a, &update.b}) {
      builder.Text(tensor->type->name);
      for (const std::int64_t dim : tensor->shape) builder.U64(static_cast<std::uint64_t>(dim));
      builder.Bytes(tensor->bytes);
    }
  }
  return builder.Finish();
}

}  // namespace

Result<LoraAdapter> OpenLora(const std::string& path, const ModelConfig& config) {
  const fs::path dir(path), config_file = dir / "adapter_config.json", weights = dir / "adapter_model.safetensors";
  std::error_code ignored;
  if (!fs::exists(dir, ignored)) return NotFound(path + ": no such directory");
  if (!fs::is_directory(dir, ignored)) {
    return InvalidArgument(path + ": an adapter is a directory with adapter_config.json, as PEFT saves it");
  }
  KVS_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(config_file.string(), kMaxConfigBytes));
  const auto lora = ParseLoraConfig(text);
  if (!lora.ok()) return lora.status().WithContext(config_file.string());
  const Shapes shapes = LinearShapes(config);
  KVS_RETURN_IF_ERROR(CheckTargets(*lora, config, shapes).WithContext(config_file.string()));

  LoraAdapter adapter;
  if (!fs::exists(weights, ignored) && fs::exists(dir / "adapter_model.bin", ignored)) {
    return Unimplemented((dir / "adapter_model.bin").string() +
                         ": pickled weights are not read; save the adapter with safe_serialization=True");
  }
  KVS_ASSIGN_OR_RETURN(adapter.mapping, MappedFile::Open(weights.string()));
  const auto tensors = ParseSafetensors(adapter.mapping->bytes());
  if (!tensors.ok()) return tensors.status().WithContext(weights.string());
  KVS_RETURN_IF_ERROR(ReadUpdates(*lora, *tensors, shapes, &adapter).WithContext(weights.string()));
  KVS_RETURN_IF_ERROR(CheckEveryByteClaimed(adapter.mapping->bytes(), *tensors).WithContext(weights.string()));
  adapter.digest = UpdatesDigest(adapter.updates);
  return adapter;
}

void MergeLora(const LoraUpdate& update, int threads, float* weights) {
  const std::int64_t rank = update.a.rows(), cols = update.a.cols(), rows = update.b.rows();
  std::vector<float> a(static_cast<std::size_t>(rank * cols)), b(static_cast<std::size_t>(rows * rank));
  DecodeRows(update.a, 0, rank, a.data());
  DecodeRows(update.b, 0, rows, b.data());
  ParallelFor(rows, 64, threads, [&](std::int64_t begin, std::int64_t end) {
    // B A first and then its scale, as PEFT has it: W is rounded once.
    std::vector<float> delta(static_cast<std::size_t>(cols));
    for (std::int64_t n = begin; n < end; ++n) {
      std::fill(delta.begin(), delta.end(), 0.0f);
      for (std::int64_t r = 0; r < rank; ++r) {
        const float factor = b[static_cast<std::size_t>(n * rank + r)];
        const float* row = a.data() + r * cols;
        for (std::int64_t k = 0; k < cols; ++k) delta[static_cast<std::size_t>(k)] += factor * row[k];
      }
      float* out = weights + n * cols;
      for (std::int64_t k = 0; k < cols; ++k) out[k] += update.scale * delta[static_cast<std::size_t>(k)];
    }
  });
}

}  // namespace kvshare::runtime

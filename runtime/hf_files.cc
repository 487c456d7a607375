// Hugging Face directories.
#include <filesystem>
#include <set>
#include <string_view>
#include <system_error>
#include <utility>

#include "libkvshare/core/status_macros.h"
#include "runtime/json.h"
#include "runtime/model_files.h"

namespace kvshare::runtime {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMaxConfigBytes = std::size_t{1} << 20;
constexpr std::size_t kMaxTokenizerBytes = std::size_t{256} << 20;
constexpr std::size_t kMaxShards = 1000;

bool Exists(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

// The file's text, or "" when there is none.
Result<std::string> ReadOptional(const fs::path& path, std::size_t max_bytes) {
  if (!Exists(path)) return std::string();
  return ReadTextFile(path.string(), max_bytes);
}

// Maps one safetensors file and adds its tensors: those that `shard_of` assigns to it, or all without such a table.
Status AddSafetensors(const fs::path& path, const std::map<std::string, std::string>* shard_of, ModelFiles* out) {
  KVS_ASSIGN_OR_RETURN(auto file, MappedFile::Open(path.string()));
  auto tensors = ParseSafetensors(file->bytes());
  if (!tensors.ok()) return tensors.status().WithContext(path.string());
  if (out->unclaimed.ok()) {
    out->unclaimed = CheckEveryByteClaimed(file->bytes(), *tensors).WithContext(path.string());
  }
  for (auto& [name, tensor] : *tensors) {
    if (shard_of != nullptr) {
      const auto it = shard_of->find(name);
      if (it == shard_of->end() || it->second != path.filename()) continue;
    }
    out->tensors.emplace(name, std::move(tensor));
  }
  out->mappings.push_back(std::move(file));
  return OkStatus();
}

Status AddShards(const fs::path& dir, const fs::path& index, ModelFiles* out) {
  KVS_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(index.string(), kMaxTokenizerBytes));
  const auto json = ParseJsonObject(text);
  if (!json.ok()) return json.status().WithContext(index.string());
  const Json* map = FindField(*json, "weight_map");
  if (map == nullptr || !map->is_object()) return InvalidArgument(index.string() + ": weight_map must be an object");
  std::map<std::string, std::string> shard_of;
  std::set<std::string> shards;
  for (const auto& [name, file] : map->items()) {
    // A plain name beside the index: the index must not reach elsewhere.
    if (!file.is_string() || file.get_ref<const std::string&>().find('/') != std::string::npos ||
        file.get_ref<const std::string&>().find('\0') != std::string::npos || file == "" || file == ".." ||
        file == ".") {
      return InvalidArgument(index.string() + ": weight_map of '" + name + "' is not a file name");
    }
    shard_of[name] = file.get<std::string>();
    shards.insert(file.get<std::string>());
  }
  if (shards.size() > kMaxShards) return InvalidArgument(index.string() + ": names more than 1000 files");
  for (const std::string& shard : shards) KVS_RETURN_IF_ERROR(AddSafetensors(dir / shard, &shard_of, out));
  return OkStatus();
}

Status AddWeights(const fs::path& dir, ModelFiles* out) {
  const fs::path single = dir / "model.safetensors", index = dir / "model.safetensors.index.json";
  if (Exists(single)) return AddSafetensors(single, nullptr, out);
  if (Exists(index)) return AddShards(dir, index, out);
  return NotFound(single.string() + ": no such file, and no model.safetensors.index.json beside it");
}

// A special token is a string or, as older files have it, an object with its text in `content`.
std::string TokenText(const Json& config, const char* key) {
  const Json* token = FindField(config, key);
  if (token != nullptr && token->is_object()) token = FindField(*token, "content");
  return token != nullptr && token->is_string() ? token->get<std::string>() : std::string();
}

// chat_template is a string or a list of {name, template}, of which "default" is the one.
Status ReadTemplate(const Json& config, std::string* out) {
  const Json* value = FindField(config, "chat_template");
  if (value == nullptr) return OkStatus();
  if (value->is_string()) {
    *out = value->get<std::string>();
    return OkStatus();
  }
  if (!value->is_array()) return InvalidArgument("field 'chat_template' must be a string or a list");
  for (const Json& entry : *value) {
    if (!entry.is_object()) return InvalidArgument("field 'chat_template' holds something that is not an object");
    KVS_ASSIGN_OR_RETURN(const std::string name, GetString(entry, "name"));
    if (name == "default") {
      KVS_ASSIGN_OR_RETURN(*out, GetString(entry, "template"));
    }
  }
  return OkStatus();
}

Status AddTokenizer(const fs::path& dir, ModelFiles* out) {
  const fs::path tokenizer = dir / "tokenizer.json", config = dir / "tokenizer_config.json";
  if (Exists(tokenizer)) {
    KVS_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(tokenizer.string(), kMaxTokenizerBytes));
    auto spec = ParseTokenizerJson(text);
    if (!spec.ok()) return spec.status().WithContext(tokenizer.string());
    out->tokenizer = std::move(*spec);
  }
  if (Exists(config)) {
    KVS_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(config.string(), kMaxTokenizerBytes));
    const auto json = ParseJsonObject(text);
    if (!json.ok()) return json.status().WithContext(config.string());
    out->bos_text = TokenText(*json, "bos_token");
    out->eos_text = TokenText(*json, "eos_token");
    KVS_RETURN_IF_ERROR(ReadTemplate(*json, &out->chat_template).WithContext(config.string()));
  }
  // transformers prefers the file of its own over the field.
  KVS_ASSIGN_OR_RETURN(const std::string jinja, ReadOptional(dir / "chat_template.jinja", kMaxConfigBytes));
  if (!jinja.empty()) out->chat_template = jinja;
  return OkStatus();
}

}  // namespace

Result<ModelFiles> OpenHfDirectory(const std::string& path, bool config_only) {
  const fs::path dir(path), config = dir / "config.json";
  ModelFiles files;
  KVS_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(config.string(), kMaxConfigBytes));
  KVS_ASSIGN_OR_RETURN(const std::string generation, ReadOptional(dir / "generation_config.json", kMaxConfigBytes));
  auto parsed = ParseHfConfig(text, generation);
  if (!parsed.ok()) return parsed.status().WithContext(config.string());
  files.config = std::move(*parsed);
  const fs::path absolute = fs::absolute(dir).lexically_normal();
  files.config.name = (absolute.has_filename() ? absolute : absolute.parent_path()).filename().string();
  if (config_only) return files;
  KVS_RETURN_IF_ERROR(AddWeights(dir, &files));
  KVS_RETURN_IF_ERROR(AddTokenizer(dir, &files));
  return files;
}

}  // namespace kvshare::runtime

// kvctl model: what a model's files hold, as kvshare reads them.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "libkvshare/core/json_text.h"
#include "tools/kvctl/commands.h"
#include "tools/kvctl/target.h"

namespace kvshare::kvctl {
namespace {

using Json = nlohmann::ordered_json;

Json Files(const std::string& path) {
  namespace fs = std::filesystem;
  Json files = Json::array();
  std::error_code error;
  const auto add = [&](const fs::path& file) {
    const auto bytes = fs::file_size(file, error);
    if (!error) files.push_back({{"name", file.filename().string()}, {"bytes", bytes}});
  };
  if (!fs::is_directory(path, error)) {
    add(path);
    return files;
  }
  for (fs::directory_iterator it(path, error), end; !error && it != end; it.increment(error)) {
    if (it->is_regular_file(error)) add(it->path());
  }
  std::sort(files.begin(), files.end(), [](const Json& a, const Json& b) { return a["name"] < b["name"]; });
  return files;
}

const char* RopeName(runtime::RopeKind kind) {
  switch (kind) {
    case runtime::RopeKind::kDefault: return "default";
    case runtime::RopeKind::kLinear: return "linear";
    case runtime::RopeKind::kLlama3: return "llama3";
    case runtime::RopeKind::kYarn: return "yarn";
  }
  return "unknown";
}

Json Facts(const runtime::Model& model, const std::string& path) {
  const runtime::ModelConfig& c = model.config();
  const kernels::Capabilities& device = model.backend().capabilities();
  const std::size_t page = model.kv_layout().page_bytes();
  return {{"path", path},
          {"name", c.name},
          {"family", c.family},
          {"layers", c.num_layers},
          {"hidden_size", c.hidden_size},
          {"intermediate_size", c.intermediate_size},
          {"heads", c.num_heads},
          {"kv_heads", c.num_kv_heads},
          {"head_dim", c.head_dim},
          {"vocab_size", c.vocab_size},
          {"max_context_tokens", c.max_positions},
          {"rope", RopeName(c.rope.kind)},
          {"rope_theta", c.rope.theta},
          {"tied_embeddings", c.tied_embeddings},
          {"chat_template", model.chat_template() != nullptr},
          {"eos_ids", c.eos_ids},
          {"dtype", kernels::DTypeName(device.compute)},
          {"isa", device.isa},
          {"linear", device.linear},
          {"numerics_id", device.numerics_id},
          {"weight_bytes", model.weight_bytes()},
          {"kv_bytes_per_token", page / kernels::kPageTokens},
          {"kv_page_bytes", page},
          {"space", model.space().Hex()},
          {"files", Files(path)}};
}

}  // namespace

int RunModel(const ModelOptions& options) {
  auto model = LoadModelAt(options.source.model, LoadOptionsOf(options.source));
  if (!model.ok()) return Fail(kModel, model.status().message());
  const Json facts = Facts(**model, options.source.model);
  if (options.format == OutputFormat::kJson) {
    std::puts(JsonText(facts).c_str());
    return kOk;
  }
  for (const auto& [key, value] : facts.items()) {
    if (key == "files") {
      for (const Json& file : value) {
        std::printf("%-20s %s (%.1f MB)\n", "file", file["name"].get<std::string>().c_str(),
                    file["bytes"].get<double>() / 1e6);
      }
    } else {
      const std::string text = value.is_string() ? value.get<std::string>() : value.dump();
      std::printf("%-20s %s\n", key.c_str(), text.c_str());
    }
  }
  return kOk;
}

}  // namespace kvshare::kvctl

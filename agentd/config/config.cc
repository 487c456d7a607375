#include "agentd/config/config.h"

#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <memory>
#include <utility>

#include "agentd/config/yaml_reader.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/endpoint.h"
#include "libkvshare/core/quantity.h"
#include "libkvshare/core/status_macros.h"
#include "libkvshare/core/suggest.h"

namespace kvshare::agentd {
namespace {

constexpr std::size_t kMaxFileBytes = 1 << 20;
constexpr std::string_view kPrefix = "KVSHARE_";

std::string Quoted(std::string_view text) { return "'" + std::string(text) + "'"; }

std::string DidYouMean(std::string_view name, const std::vector<std::string>& known) {
  const std::string near = Nearest(name, known);
  return near.empty() ? "" : "; did you mean " + Quoted(near) + "?";
}

bool IsSection(std::string_view name) {
  for (const Option& option : Options()) {
    if (SectionOf(option) == name) return true;
  }
  return false;
}

std::vector<std::string> Sections() {
  std::vector<std::string> names = {"version"};
  for (const Option& option : Options()) {
    if (names.back() != SectionOf(option)) names.emplace_back(SectionOf(option));
  }
  return names;
}

// "did you mean" within the section, or in the section where the name is at home.
std::string NearKey(std::string_view section, std::string_view name) {
  std::vector<std::string> names;
  for (const Option& option : Options()) {
    if (SectionOf(option) == section) names.emplace_back(NameOf(option));
  }
  const std::string near = DidYouMean(name, names);
  if (!near.empty()) return near;
  for (const Option& option : Options()) {
    if (NameOf(option) == name) return std::string("; it stands under '") + std::string(SectionOf(option)) + ":'";
  }
  std::string all;
  for (const std::string& known : names) all += (all.empty() ? "" : ", ") + known;
  return "; '" + std::string(section) + ":' knows " + all;
}

Status CheckVersion(const YamlEntry& entry) {
  if (entry.section.empty() && entry.value == std::to_string(kConfigVersion) && !entry.quoted) return OkStatus();
  return InvalidArgument("version must be " + std::to_string(kConfigVersion));
}

// Which option a line sets.
Result<std::size_t> OptionOf(const YamlEntry& entry) {
  if (entry.section.empty()) {
    const bool section = IsSection(entry.name);
    return InvalidArgument(section ? Quoted(entry.name) + " is a section: its values stand indented below it"
                                   : "unknown key " + Quoted(entry.name) + DidYouMean(entry.name, Sections()));
  }
  const std::string key = entry.section + "." + entry.name;
  const std::size_t option = FindOption(key);
  if (option != kNoOption) return option;
  return InvalidArgument("unknown key " + Quoted(key) + NearKey(entry.section, entry.name));
}

bool IsNumeric(OptionKind kind) { return kind == OptionKind::kCount || kind == OptionKind::kFraction; }

// A YAML scalar that reads back as `text`.
std::string YamlScalar(const Option& option, const std::string& text) {
  if (IsNumeric(option.kind) || option.kind == OptionKind::kChoice || option.kind == OptionKind::kSize) return text;
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += c;
  }
  return quoted + "\"";
}

std::int64_t CountOf(const std::string& text) {
  std::int64_t value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value);  // checked when it was added
  return value;
}

std::int64_t BytesOf(const std::string& text) {
  const Result<std::int64_t> bytes = ParseSize(text);
  return bytes.ok() ? *bytes : 0;  // not set
}

}  // namespace

Settings::Settings() {
  for (const Option& option : Options()) values_.push_back({option.fallback, Layer::kDefault, "default"});
}

const Settings::Value& Settings::Get(std::string_view key) const {
  const std::size_t option = FindOption(key);
  KVS_CHECK(option != kNoOption);
  return values_[option];
}

Status Settings::Add(std::size_t option, std::string_view text, Layer layer, const std::string& origin) {
  // Checked also where a higher layer wins: a wrong line in a file stays wrong.
  const Status status = CheckValue(Options()[option], text);
  if (!status.ok()) {
    return layer == Layer::kFile ? status.WithContext(Options()[option].key).WithContext(origin)
                                 : status.WithContext(origin);
  }
  if (layer >= values_[option].layer) values_[option] = {std::string(text), layer, origin};
  return OkStatus();
}

Status Settings::AddFile(std::string_view text, const std::string& file) {
  Result<std::vector<YamlEntry>> entries = ReadYaml(text);
  if (!entries.ok()) return InvalidArgument(file + ":" + entries.status().message());
  bool has_version = false;
  for (const YamlEntry& entry : *entries) {
    const std::string place = file + ":" + std::to_string(entry.line);
    if (entry.section.empty() && entry.name == "version") {
      KVS_RETURN_IF_ERROR(CheckVersion(entry).WithContext(place));
      has_version = true;
      continue;
    }
    if (!entry.section.empty() && !IsSection(entry.section)) {
      return InvalidArgument(file + ":" + std::to_string(entry.section_line) + ": unknown section " +
                             Quoted(entry.section) + DidYouMean(entry.section, Sections()));
    }
    if (entry.name.empty()) continue;                                            // the section's own line
    if (entry.section.empty() && entry.null && IsSection(entry.name)) continue;  // a section without values
    const Result<std::size_t> option = OptionOf(entry);
    if (!option.ok()) return option.status().WithContext(place);
    if (entry.null) continue;  // as if it were not there
    if (entry.quoted && IsNumeric(Options()[*option].kind)) {
      return InvalidArgument(place + ": " + Options()[*option].key + ": a number is expected, not text in quotes");
    }
    KVS_RETURN_IF_ERROR(Add(*option, entry.value, Layer::kFile, place));
  }
  if (!has_version) {
    return InvalidArgument(file + ":1: 'version: " + std::to_string(kConfigVersion) + "' is missing");
  }
  return OkStatus();
}

Status Settings::AddEnvironment(const std::vector<std::string>& environment) {
  std::vector<std::string> known;
  for (const Option& option : Options()) known.push_back(EnvironmentName(option));
  for (const std::string& variable : environment) {
    const std::size_t equals = variable.find('=');
    if (equals == std::string::npos || !variable.starts_with(kPrefix)) continue;
    const std::string name = variable.substr(0, equals);
    const std::string value = variable.substr(equals + 1);
    const std::size_t end = name.find('_', kPrefix.size());
    if (end == std::string::npos) continue;
    std::string section = name.substr(kPrefix.size(), end - kPrefix.size());
    for (char& c : section) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
    if (!IsSection(section)) continue;
    std::size_t option = 0;
    while (option < known.size() && known[option] != name) ++option;
    if (option == known.size()) {
      return InvalidArgument("unknown environment variable " + Quoted(name) + DidYouMean(name, known));
    }
    if (value.empty()) continue;
    KVS_RETURN_IF_ERROR(Add(option, value, Layer::kEnvironment, name));
  }
  return OkStatus();
}

Status Settings::AddFlag(std::size_t option, std::string_view text) {
  KVS_CHECK(option < values_.size());
  return Add(option, text, Layer::kFlag, Options()[option].flag);
}

Result<Config> Settings::Finish() const {
  if (Get("model.path").text.empty()) {
    return InvalidArgument("--model is required: a Hugging Face directory or one .gguf file");
  }
  if (Get("server.listen").text.empty()) {
    return InvalidArgument("--listen is required: ipc://PATH or tcp://HOST:PORT");
  }
  const Value& cold_size = Get("cold.size");
  if (Get("cold.dir").text.empty() && cold_size.layer != Layer::kDefault) {
    return InvalidArgument(cold_size.origin + ": a cold tier's size without its directory; add --cold-dir DIR");
  }
  const bool on_gpu = Get("model.device").text == "cuda";
  const std::string& dtype = Get("model.dtype").text;
  if (on_gpu && dtype == "float32") {
    return InvalidArgument(Get("model.device").origin + ": a GPU computes in bfloat16 or float16, and " +
                           Get("model.dtype").origin + " says float32");
  }
  // Not auto either, which goes on on the CPU when a GPU fails.
  if (!on_gpu && dtype == "float16") {
    return InvalidArgument(Get("model.dtype").origin + ": only a GPU computes in float16; add --device cuda");
  }
  Config config;
  config.model = Get("model.path").text;
  config.lora = Get("model.lora").text;
  config.dtype = dtype;
  config.device = Get("model.device").text;
  config.threads = static_cast<int>(CountOf(Get("model.threads").text));
  config.listen = Get("server.listen").text;
  if (const std::string& http = Get("server.http").text; !http.empty()) {
    const bool port = http.find(':') == std::string::npos;
    KVS_ASSIGN_OR_RETURN(const Endpoint endpoint,
                         ParseEndpoint((port ? "tcp://127.0.0.1:" : "tcp://") + http, EndpointUse::kListen));
    config.http_host = endpoint.host;
    config.http_port = endpoint.port;
  }
  config.max_running = CountOf(Get("server.max_running").text);
  config.max_waiting = CountOf(Get("server.max_waiting").text);
  config.prefill_chunk = CountOf(Get("server.prefill_chunk").text);
  config.pool_bytes = BytesOf(Get("pool.size").text);
  config.eviction = Get("pool.eviction").text;
  config.cold_dir = Get("cold.dir").text;
  config.cold_bytes = BytesOf(cold_size.text);
  KVS_ASSIGN_OR_RETURN(config.reuse, ParseReuseMode(Get("reuse.mode").text));
  if (const std::string& fraction = Get("reuse.blend_recompute").text; !fraction.empty()) {
    double share = 0;
    std::from_chars(fraction.data(), fraction.data() + fraction.size(), share, std::chars_format::fixed);
    config.blend_recompute = share;
  }
  config.blend_gradual = Get("reuse.blend_filter").text == "gradual";
  config.exact_agents = WordsOf(Get("reuse.exact_agents").text);
  config.anchor_memory = BytesOf(Get("reuse.anchor_memory").text);
  const std::string& level = Get("observe.log").text;
  config.log_level = level == "error" ? LogLevel::kError : level == "warn" ? LogLevel::kWarn : LogLevel::kInfo;
  return config;
}

std::string Settings::Print() const {
  std::string text = "# agentd's settings, each with where it comes from\nversion: " + std::to_string(kConfigVersion);
  std::string_view section;
  for (std::size_t i = 0; i < values_.size(); ++i) {
    const Option& option = Options()[i];
    if (SectionOf(option) != section) {
      section = SectionOf(option);
      text += "\n" + std::string(section) + ":";
    }
    const Value& value = values_[i];
    text += "\n  " + std::string(NameOf(option)) + ": " +
            (value.text.empty() ? "null" : YamlScalar(option, value.text)) + "  # " + value.origin;
  }
  return text + "\n";
}

Result<std::string> ReadConfigFile(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), &std::fclose);
  if (file == nullptr) return InvalidArgument(path + ": " + std::strerror(errno));
  std::string text(kMaxFileBytes + 1, '\0');
  text.resize(std::fread(text.data(), 1, text.size(), file.get()));
  if (std::ferror(file.get()) != 0) return InvalidArgument(path + ": it cannot be read");
  if (text.size() > kMaxFileBytes) return InvalidArgument(path + ": the file is larger than 1 MiB");
  return text;
}

}  // namespace kvshare::agentd

// Config: what agentd was told to do. Four layers, the higher one winning: flag, environment, file, default.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "agentd/config/options.h"
#include "kvshare/status.h"
#include "kvshare/types.h"

namespace kvshare::agentd {

enum class LogLevel { kError = 0, kWarn = 1, kInfo = 2 };

// The settings with their types, checked one by one and against each other.
struct Config {
  std::string model;
  std::string lora;                // empty: none
  std::string dtype = "bfloat16";  // or float32, float16
  std::string device;              // cpu | cuda | auto
  int threads = 0;
  std::string listen;
  std::string http_host;  // empty: no HTTP
  int http_port = 0;
  std::int64_t max_running = 0;
  std::int64_t max_waiting = 0;
  std::int64_t prefill_chunk = 0;
  std::int64_t pool_bytes = 0;  // 0: a quarter of what is free
  std::string eviction;
  std::string cold_dir;  // empty: no cold tier
  std::int64_t cold_bytes = 0;
  ReuseMode reuse = ReuseMode::kExact;
  std::optional<double> blend_recompute;
  bool blend_gradual = false;
  std::vector<std::string> exact_agents;
  std::int64_t anchor_memory = 0;  // bytes
  LogLevel log_level = LogLevel::kInfo;
};

enum class Layer { kDefault = 0, kFile = 1, kEnvironment = 2, kFlag = 3 };

// Collects values in any order, and remembers where each came from. Every message names that place.
class Settings {
 public:
  Settings();

  // A configuration file's text; `file` is its name for messages, which read "file:line: ...". InvalidArgument for
  // what is no YAML, for unknown keys (naming the nearest known one), and for values of the wrong kind.
  Status AddFile(std::string_view text, const std::string& file);
  // NAME=VALUE strings, as in environ. Those of no section of ours are not looked at; one that is of a section but of
  // no key is an error; empty values count as not set.
  Status AddEnvironment(const std::vector<std::string>& environment);
  // Requires: option < Options().size().
  Status AddFlag(std::size_t option, std::string_view text);

  // The typed settings. InvalidArgument when two contradict each other or one that is needed is not set.
  Result<Config> Finish() const;

  // All settings as a configuration file that gives the same ones, each with its origin in a comment.
  std::string Print() const;

 private:
  struct Value {
    std::string text;  // "": not set
    Layer layer = Layer::kDefault;
    std::string origin;  // "default", "--reuse", "KVSHARE_REUSE_MODE", "agentd.yaml:7"
  };

  Status Add(std::size_t option, std::string_view text, Layer layer, const std::string& origin);
  const Value& Get(std::string_view key) const;

  std::vector<Value> values_;  // as Options()
};

// Reads a configuration file. InvalidArgument naming it when it cannot be read or is larger than 1 MiB.
Result<std::string> ReadConfigFile(const std::string& path);

}  // namespace kvshare::agentd

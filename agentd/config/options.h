// The table of everything that can be set: the one source of keys, flags, environment variables, help, defaults,
// ranges.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvshare/status.h"

namespace kvshare::agentd {

// The only version of the configuration file there is.
inline constexpr int kConfigVersion = 1;

enum class OptionKind {
  kPath,      // a file or directory
  kEndpoint,  // ipc://PATH or tcp://HOST:PORT
  kHostPort,  // HOST:PORT, or PORT on 127.0.0.1
  kChoice,    // one of `choices`
  kCount,     // a whole number, `min`..`max`
  kSize,      // bytes: 8GiB, 512MiB, 1000; at least `min`
  kFraction,  // 0..1
  kWords,     // judge,verifier; `none`
};

struct Option {
  const char* key;       // "pool.size": section and name, as in the file
  const char* flag;      // "--kv-pool-size"
  OptionKind kind;       //
  const char* fallback;  // the default, as text; "": not set
  const char* choices;   // kChoice: "off|exact"
  std::int64_t min;      // kCount, kSize
  std::int64_t max;      // kCount
  const char* help;      // one line, without a full stop
};

// In the order of the file.
std::span<const Option> Options();
inline constexpr std::size_t kNoOption = static_cast<std::size_t>(-1);
std::size_t FindOption(std::string_view key);  // its index in Options(), or kNoOption

// "KVSHARE_POOL_SIZE" for pool.size.
std::string EnvironmentName(const Option& option);
// "pool" of pool.size; "size".
std::string_view SectionOf(const Option& option);
std::string_view NameOf(const Option& option);
// What may stand there, for help and documents: "off | exact", "1..1024", "SIZE".
std::string ValuesOf(const Option& option);

// The words of a kWords value.
std::vector<std::string> WordsOf(std::string_view text);

// OK when `text` is a value of the option. The message says what is wrong with it, and what would be right; the caller
// says where it stood.
Status CheckValue(const Option& option, std::string_view text);

}  // namespace kvshare::agentd

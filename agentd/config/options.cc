#include "agentd/config/options.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <limits>
#include <vector>

#include "libkvshare/core/endpoint.h"
#include "libkvshare/core/quantity.h"
#include "libkvshare/core/status_macros.h"
#include "libkvshare/core/suggest.h"

namespace kvshare::agentd {
namespace {

constexpr std::size_t kMaxValueBytes = 4096;

constexpr std::array kOptions = {
    Option{"model.path", "--model", OptionKind::kPath, "", "", 0, 0, "A Hugging Face directory or one .gguf file"},
    Option{"model.lora", "--lora", OptionKind::kPath, "", "", 0, 0, "A PEFT LoRA adapter, merged in at load"},
    Option{"model.dtype", "--dtype", OptionKind::kChoice, "bfloat16", "bfloat16|float16|float32", 0, 0,
           "What KV and activations are kept in; float16 on a GPU alone"},
    Option{"model.device", "--device", OptionKind::kChoice, "cpu", "cpu|cuda|auto", 0, 0,
           "Where the model computes and KV lies; auto: a GPU where one can be used, and the CPU once it fails"},
    Option{"model.threads", "--threads", OptionKind::kCount, "0", "", 0, 1024,
           "Threads that compute; 0 is one per core"},
    Option{"server.listen", "--listen", OptionKind::kEndpoint, "", "", 0, 0, "Where agents connect"},
    Option{"server.http", "--http", OptionKind::kHostPort, "", "", 0, 0,
           "Where /health, /ready, /metrics and /version are served over HTTP; not set: nowhere"},
    Option{"server.max_running", "--max-running", OptionKind::kCount, "64", "", 1, 1024,
           "Requests computed side by side"},
    Option{"server.max_waiting", "--max-waiting", OptionKind::kCount, "1024", "", 1, 1 << 20,
           "Requests that may wait; more are refused"},
    Option{"server.prefill_chunk", "--prefill-chunk", OptionKind::kCount, "512", "", 1, 8192,
           "Prompt tokens computed per step"},
    Option{"pool.size", "--kv-pool-size", OptionKind::kSize, "", "", 1, 0,
           "Memory for KV, the GPU's where it computes; not set: a quarter of what is free"},
    Option{"pool.eviction", "--eviction", OptionKind::kChoice, "default", "default|s3fifo|cost|lru", 0, 0,
           "Which stored KV goes when room is needed"},
    Option{"cold.dir", "--cold-dir", OptionKind::kPath, "", "", 0, 0,
           "Where KV is kept on disk, for one daemon at a time; not set: nowhere"},
    Option{"cold.size", "--cold-size", OptionKind::kSize, "8GiB", "", 1, 0, "How much of the disk it may take"},
    Option{"reuse.mode", "--reuse", OptionKind::kChoice, "exact", "off|exact|rotate|epic|cacheblend|dhd|kvcomm|auto", 0,
           0, "How stored KV may be used"},
    Option{"reuse.blend_recompute", "--blend-recompute", OptionKind::kFraction, "", "", 0, 0,
           "Share of a moved chunk that is computed anew, in the modes that do; not set: the mode's own"},
    Option{"reuse.blend_filter", "--blend-filter", OptionKind::kChoice, "once", "once|gradual", 0, 0,
           "How mode cacheblend chooses that share: at one layer, or more at first and fewer from layer to layer"},
    Option{"reuse.exact_agents", "--exact-agents", OptionKind::kWords, "judge,verifier", "", 0, 0,
           "Agents that mode auto answers exactly: those with one of these words in their names, in any case"},
    Option{"reuse.anchor_memory", "--anchor-memory", OptionKind::kSize, "512MiB", "", 1, 0,
           "Memory for what mode kvcomm has learnt, of all sessions"},
    Option{"observe.log", "--log-level", OptionKind::kChoice, "info", "error|warn|info", 0, 0,
           "What is written to stderr"},
};

std::vector<std::string> Choices(const Option& option) {
  std::vector<std::string> choices;
  std::string_view rest = option.choices;
  while (true) {
    const std::size_t bar = rest.find('|');
    choices.emplace_back(rest.substr(0, bar));
    if (bar == rest.npos) return choices;
    rest.remove_prefix(bar + 1);
  }
}

std::string Quoted(std::string_view text) { return "'" + std::string(text) + "'"; }

std::string RangeOf(const Option& option) {
  return "a whole number from " + std::to_string(option.min) + " to " + std::to_string(option.max);
}

Status CheckCount(const Option& option, std::string_view text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < option.min || value > option.max) {
    return InvalidArgument(Quoted(text) + " is not " + RangeOf(option));
  }
  return OkStatus();
}

Status CheckFraction(std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, std::chars_format::fixed);
  if (error != std::errc() || end != text.data() + text.size() || !(value >= 0 && value <= 1)) {
    return InvalidArgument(Quoted(text) + " is not a number from 0 to 1");
  }
  return OkStatus();
}

Status CheckChoice(const Option& option, std::string_view text) {
  const std::vector<std::string> choices = Choices(option);
  if (std::find(choices.begin(), choices.end(), text) != choices.end()) return OkStatus();
  const std::string near = Nearest(text, choices);
  return InvalidArgument(Quoted(text) + " is not known" + (near.empty() ? "" : "; did you mean " + Quoted(near) + "?") +
                         " (" + ValuesOf(option) + ")");
}

Status CheckWords(std::string_view text) {
  const std::vector<std::string> words = WordsOf(text);
  const bool empty = std::any_of(words.begin(), words.end(), [](const std::string& word) { return word.empty(); });
  if (!empty) return OkStatus();
  return InvalidArgument(Quoted(text) + " has an empty word; write judge,verifier, or none");
}

// HOST:PORT is the second half of a tcp endpoint, and read by the same parser.
Status CheckHostPort(std::string_view text) {
  const bool port = text.find_first_not_of("0123456789") == text.npos;
  const Result<Endpoint> endpoint =
      ParseEndpoint((port ? "tcp://127.0.0.1:" : "tcp://") + std::string(text), EndpointUse::kListen);
  if (endpoint.ok()) return OkStatus();
  return InvalidArgument(Quoted(text) + " is not HOST:PORT, such as 127.0.0.1:8000");
}

}  // namespace

std::span<const Option> Options() { return kOptions; }

std::size_t FindOption(std::string_view key) {
  for (std::size_t i = 0; i < kOptions.size(); ++i) {
    if (key == kOptions[i].key) return i;
  }
  return kNoOption;
}

std::string EnvironmentName(const Option& option) {
  std::string name = std::string("KVSHARE_") + option.key;
  for (char& c : name) {
    if (c == '.') c = '_';
    if (c >= 'a' && c <= 'z') c = static_cast<char>(c - 'a' + 'A');
  }
  return name;
}

std::string_view SectionOf(const Option& option) {
  const std::string_view key = option.key;
  return key.substr(0, key.find('.'));
}

std::string_view NameOf(const Option& option) {
  const std::string_view key = option.key;
  return key.substr(key.find('.') + 1);
}

std::string ValuesOf(const Option& option) {
  switch (option.kind) {
    case OptionKind::kPath: return "PATH";
    case OptionKind::kEndpoint: return "ipc://PATH or tcp://HOST:PORT";
    case OptionKind::kHostPort: return "HOST:PORT or PORT";
    case OptionKind::kCount: return std::to_string(option.min) + ".." + std::to_string(option.max);
    case OptionKind::kSize: return "8GiB, 512MiB or bytes";
    case OptionKind::kFraction: return "0..1";
    case OptionKind::kWords: return "WORD,WORD,... or none";
    case OptionKind::kChoice: break;
  }
  std::string text;
  for (const std::string& choice : Choices(option)) text += (text.empty() ? "" : " | ") + choice;
  return text;
}

std::vector<std::string> WordsOf(std::string_view text) {
  std::vector<std::string> words;
  if (text == "none") return words;
  while (true) {
    const std::size_t comma = text.find(',');
    std::string_view word = text.substr(0, comma);
    while (word.starts_with(' ')) word.remove_prefix(1);
    while (word.ends_with(' ')) word.remove_suffix(1);
    words.emplace_back(word);
    if (comma == text.npos) return words;
    text.remove_prefix(comma + 1);
  }
}

Status CheckValue(const Option& option, std::string_view text) {
  if (text.empty()) return InvalidArgument("the value is empty");
  if (text.size() > kMaxValueBytes) return InvalidArgument("the value is longer than 4096 bytes");
  if (std::any_of(text.begin(), text.end(), [](unsigned char c) { return c < ' ' || c == 127; })) {
    return InvalidArgument("the value holds a control character");
  }
  switch (option.kind) {
    case OptionKind::kPath: return OkStatus();
    case OptionKind::kEndpoint: return ParseEndpoint(text, EndpointUse::kListen).status();
    case OptionKind::kHostPort: return CheckHostPort(text);
    case OptionKind::kChoice: return CheckChoice(option, text);
    case OptionKind::kCount: return CheckCount(option, text);
    case OptionKind::kFraction: return CheckFraction(text);
    case OptionKind::kWords: return CheckWords(text);
    case OptionKind::kSize: break;
  }
  KVS_ASSIGN_OR_RETURN(const std::int64_t bytes, ParseSize(text));
  if (bytes < option.min) return InvalidArgument(Quoted(text) + " is not a size; write 8GiB, 512MiB or bytes");
  return OkStatus();
}

}  // namespace kvshare::agentd

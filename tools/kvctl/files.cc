#include "tools/kvctl/files.h"

#include <cstdio>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "libkvshare/core/json_text.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::kvctl {
namespace {

using Json = nlohmann::json;

constexpr std::size_t kMaxFileBytes = std::size_t{1} << 30;

}  // namespace

Result<std::string> ReadFile(const std::string& path) {
  struct Close {
    void operator()(std::FILE* file) const {
      if (file != stdin) std::fclose(file);
    }
  };
  const std::unique_ptr<std::FILE, Close> file(path == "-" ? stdin : std::fopen(path.c_str(), "rb"));
  if (!file) return NotFound(path + ": cannot be opened");
  std::string content;
  std::string block(std::size_t{1} << 16, '\0');
  while (const std::size_t n = std::fread(block.data(), 1, block.size(), file.get())) {
    if (content.size() + n > kMaxFileBytes) return ResourceExhausted(path + ": larger than 1 GiB");
    content.append(block, 0, n);
  }
  if (std::ferror(file.get()) != 0) return InvalidArgument(path + ": cannot be read");
  return content;
}

Status WriteFile(const std::string& path, const std::string& content) {
  std::FILE* file = std::fopen(path.c_str(), "wb");
  if (file == nullptr) return InvalidArgument(path + ": cannot be written; does its folder exist?");
  const bool written = std::fwrite(content.data(), 1, content.size(), file) == content.size();
  const bool closed = std::fclose(file) == 0;
  return written && closed ? OkStatus()
                           : ResourceExhausted(path + ": could not be written to its end; is the disk full?");
}

Result<std::vector<TokenId>> ParseIds(const std::string& text, bool allow_empty) {
  KVS_ASSIGN_OR_RETURN(const Json json, ParseJson(text));
  const auto list = json.is_object() ? json.find("ids") : json.end();
  if (!json.is_object() || list == json.end() || !list->is_array()) {
    return InvalidArgument("expected an object {\"ids\":[...]} of token ids");
  }
  if (list->empty() && !allow_empty) return InvalidArgument("\"ids\" is empty: at least one token id is needed");
  std::vector<TokenId> ids;
  ids.reserve(list->size());
  for (const Json& id : *list) {
    const bool whole = id.is_number_unsigned() && id.get<std::uint64_t>() <= std::numeric_limits<TokenId>::max();
    if (!whole)
      return InvalidArgument("\"ids\" holds " + id.dump(-1, ' ', true, Json::error_handler_t::replace).substr(0, 40) +
                             ", which is no token id");
    ids.push_back(static_cast<TokenId>(id.get<std::uint64_t>()));
  }
  return ids;
}

Result<std::vector<TokenId>> ReadIds(const std::string& path) {
  KVS_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  auto ids = ParseIds(text, false);
  return ids.ok() ? std::move(ids) : ids.status().WithContext(path);
}

Status CheckIds(const std::vector<TokenId>& ids, std::int64_t vocab_size) {
  for (TokenId id : ids) {
    if (id < 0 || id >= vocab_size) {
      return InvalidArgument("token id " + std::to_string(id) + " is outside the model's vocabulary of " +
                             std::to_string(vocab_size));
    }
  }
  return OkStatus();
}

Result<std::string> ReadMessages(const std::string& path) {
  KVS_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  Result<Json> parsed = ParseJson(text);
  if (!parsed.ok()) return parsed.status().WithContext(path);
  const Json& json = *parsed;
  const bool wrapped = json.is_object() && json.contains("messages");
  const Json& list = wrapped ? json["messages"] : json;
  if (!list.is_array()) return InvalidArgument(path + ": expected a JSON array of chat messages");
  if (list.empty()) return InvalidArgument(path + ": no message: at least one is needed");
  for (std::size_t i = 0; i < list.size(); ++i) {
    if (!list[i].is_object() || !list[i].contains("role") || !list[i]["role"].is_string()) {
      return InvalidArgument(path + ": message " + std::to_string(i) + " is not an object with a string \"role\"");
    }
  }
  return wrapped ? list.dump() : text;
}

Result<std::string> ReadTools(const std::string& path) {
  if (path.empty()) return std::string();
  KVS_ASSIGN_OR_RETURN(std::string text, ReadFile(path));
  Result<Json> json = ParseJson(text);
  if (!json.ok()) return json.status().WithContext(path);
  if (!json->is_array()) return InvalidArgument(path + ": expected a JSON array of tools");
  return text;
}

Result<std::string> ParseTextLine(const std::string& line) {
  KVS_ASSIGN_OR_RETURN(const Json json, ParseJson(line));
  const auto text = json.is_object() ? json.find("text") : json.end();
  if (!json.is_object() || text == json.end() || !text->is_string())
    return InvalidArgument("expected an object {\"text\":\"...\"}");
  return text->get<std::string>();
}

}  // namespace kvshare::kvctl

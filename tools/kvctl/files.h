// The files that commands read: token ids, chat messages, JSON lines.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kvshare/status.h"
#include "kvshare/types.h"

namespace kvshare::kvctl {

// Whole file, at most 1 GiB; "-" is stdin. NotFound when it cannot be opened.
Result<std::string> ReadFile(const std::string& path);
Status WriteFile(const std::string& path, const std::string& content);

// {"ids":[...]}: at least one id, each a whole number >= 0. The vocabulary is checked by CheckIds.
Result<std::vector<TokenId>> ReadIds(const std::string& path);
// The same from the text of one JSON value; `allow_empty` for detokenize.
Result<std::vector<TokenId>> ParseIds(const std::string& json, bool allow_empty);
Status CheckIds(const std::vector<TokenId>& ids, std::int64_t vocab_size);

// A JSON array of chat messages, or an object whose "messages" is one; not empty, every message an object with a role.
// Returns the array's JSON.
Result<std::string> ReadMessages(const std::string& path);
// A JSON array of tools; "" for an empty path.
Result<std::string> ReadTools(const std::string& path);

// {"text": "..."}
Result<std::string> ParseTextLine(const std::string& json);

}  // namespace kvshare::kvctl

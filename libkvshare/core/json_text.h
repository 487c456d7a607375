// JSON from text and to text.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "kvshare/status.h"

namespace kvshare {

// Whoever walks over a document recurses, and writing one out takes a stack frame per level.
inline constexpr int kMaxJsonDepth = 256;

// One document, UTF-8. InvalidArgument says where it ceases to be JSON and why, or that it nests deeper than
// kMaxJsonDepth. Throws nothing.
Result<nlohmann::json> ParseJson(std::string_view text);

// `text` with U+0085, U+2028 and U+2029, which end lines for Python and others and which JSON leaves as they are,
// written as \u0085, \u2028 and \u2029. Of JSON, where they stand in strings alone, the meaning stays.
std::string EscapeLineEnds(std::string text);

// On one line, whoever splits a text into lines; without spaces; bytes that are not UTF-8 become U+FFFD. `Json`:
// nlohmann::json or ordered_json.
template <typename Json>
std::string JsonText(const Json& json) {
  return EscapeLineEnds(json.dump(-1, ' ', false, Json::error_handler_t::replace));
}

}  // namespace kvshare

#include "libkvshare/core/json_text.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

namespace kvshare {
namespace {

// Of the text's brackets, those in strings skipped.
bool NestsTooDeep(std::string_view text) {
  int depth = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        in_string = false;
      }
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kMaxJsonDepth) return true;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

// " at line 3, column 7": of the last byte that the parser looked at, counted from 1.
std::string Place(std::string_view text, std::size_t byte) {
  const std::string_view before = text.substr(0, std::min(byte, text.size() + 1) - 1);
  const std::size_t line = before.rfind('\n') + 1;  // 0 where there is none
  const std::string column = "column " + std::to_string(before.size() - line + 1);
  if (text.find('\n') == std::string_view::npos) return " at " + column;
  return " at line " + std::to_string(1 + std::count(before.begin(), before.end(), '\n')) + ", " + column;
}

// The parser's own words without their frame and without what was read, which may be anything.
std::string Cause(std::string_view what) {
  const std::size_t begin = what.find(" - ");
  what = begin == std::string_view::npos ? what.substr(what.find("] ") + 2) : what.substr(begin + 3);
  return std::string(what.substr(0, what.find("; last read")));
}

}  // namespace

Result<nlohmann::json> ParseJson(std::string_view text) {
  if (NestsTooDeep(text)) {
    return InvalidArgument("JSON nested deeper than " + std::to_string(kMaxJsonDepth) + " levels");
  }
  nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_discarded()) return json;
  try {
    json = nlohmann::json::parse(text);  // once more, for the reason
  } catch (const nlohmann::json::parse_error& error) {
    return InvalidArgument("not JSON" + Place(text, std::max<std::size_t>(error.byte, 1)) + ": " + Cause(error.what()));
  } catch (const nlohmann::json::exception& error) {
    return InvalidArgument("not JSON: " + Cause(error.what()));
  }
  return json;
}

std::string EscapeLineEnds(std::string text) {
  constexpr std::array<std::pair<std::string_view, std::string_view>, 3> kLineEnds = {
      {{"\xc2\x85", "\\u0085"}, {"\xe2\x80\xa8", "\\u2028"}, {"\xe2\x80\xa9", "\\u2029"}}};
  for (const auto& [end, escaped] : kLineEnds) {
    for (std::size_t at = text.find(end); at != text.npos; at = text.find(end, at)) {
      text.replace(at, end.size(), escaped);
    }
  }
  return text;
}

}  // namespace kvshare

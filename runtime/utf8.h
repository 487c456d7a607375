// UTF-8 as the rest of runtime needs it: repair as Python's decoder does it, and code points in and out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace kvshare::runtime {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

// One step of decoding at the start of non-empty `bytes`.
struct Utf8Step {
  std::size_t length = 1;        // bytes this step covers, >= 1
  char32_t code_point = 0xFFFD;  // U+FFFD when not valid
  bool valid = false;
  bool truncated = false;  // not valid, but more bytes after the end could make it so
};

// The maximal subpart rule of the Unicode standard (3.9, table 3-8), which Python and Rust follow: an ill-formed
// sequence covers the longest prefix that could have begun a character, or else one byte.
Utf8Step DecodeUtf8(std::string_view bytes);

bool IsValidUtf8(std::string_view text);

// bytes.decode("utf-8", errors="replace"), encoded again.
std::string RepairUtf8(std::string_view bytes);

// Requires a Unicode scalar value.
void AppendUtf8(char32_t code_point, std::string* out);

// Bytes of the character that begins with `lead` in valid UTF-8.
inline std::size_t Utf8Length(char lead) {
  const auto b = static_cast<unsigned char>(lead);
  return b < 0x80 ? 1 : b < 0xE0 ? 2 : b < 0xF0 ? 3 : 4;
}

// Code points of valid UTF-8.
std::size_t CountCodePoints(std::string_view text);

}  // namespace kvshare::runtime

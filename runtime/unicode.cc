#include "runtime/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <vector>

#include "runtime/utf8.h"

namespace kvshare::runtime {
namespace {

int CombiningClass(utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; }

// Whether a byte of UTF-8 belongs to a character below U+0300. Each of those is its own NFC, starts a new sequence, and
// never combines with what stands before it.
bool IsInert(char c) { return static_cast<unsigned char>(c) < 0xCC; }

template <typename Map>
std::string MapCharacters(std::string_view text, Map map) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const Utf8Step step = DecodeUtf8(text);
    map(step.code_point, &out);
    text.remove_prefix(step.length);
  }
  return out;
}

// Appends the NFC of `text`, all of it decomposed, ordered and composed.
void AppendNfc(std::string_view text, std::string* out) {
  std::vector<utf8proc_int32_t> points;
  points.reserve(text.size());
  while (!text.empty()) {
    const Utf8Step step = DecodeUtf8(text);
    text.remove_prefix(step.length);
    std::array<utf8proc_int32_t, 32> parts;  // no canonical decomposition has more than four
    int boundary = 0;
    const auto count = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(step.code_point), parts.data(),
                                               parts.size(), UTF8PROC_DECOMPOSE, &boundary);
    if (count < 0 || static_cast<std::size_t>(count) > parts.size()) {
      points.push_back(static_cast<utf8proc_int32_t>(step.code_point));
    } else {
      points.insert(points.end(), parts.begin(), parts.begin() + count);
    }
  }
  // Canonical ordering. utf8proc_decompose would do it by exchanging neighbours: quadratic on a long run of marks.
  for (auto run = points.begin(); run != points.end();) {
    if (CombiningClass(*run) == 0) {
      ++run;
      continue;
    }
    const auto end = std::find_if(run, points.end(), [](auto c) { return CombiningClass(c) == 0; });
    std::stable_sort(run, end, [](auto a, auto b) { return CombiningClass(a) < CombiningClass(b); });
    run = end;
  }
  const auto count = utf8proc_normalize_utf32(points.data(), static_cast<utf8proc_ssize_t>(points.size()),
                                              static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  for (utf8proc_ssize_t i = 0; i < count; ++i)
    AppendUtf8(static_cast<char32_t>(points[static_cast<std::size_t>(i)]), out);
}

}  // namespace

std::string ToNfc(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    std::size_t begin = 0;
    while (begin < text.size() && IsInert(text[begin])) ++begin;
    if (begin == text.size()) {
      out += text;
      break;
    }
    std::size_t end = begin;
    while (end < text.size() && !IsInert(text[end])) end += Utf8Length(text[end]);
    // The character before may combine with the first.
    if (begin > 0) --begin;
    while (begin > 0 && (static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80) --begin;
    out += text.substr(0, begin);
    AppendNfc(text.substr(begin, end - begin), &out);
    text.remove_prefix(end);
  }
  return out;
}

std::string ToUpper(std::string_view text) {
  return MapCharacters(text, [](char32_t c, std::string* out) {
    if (c == 0xDF) {
      out->append("SS");
    } else {
      AppendUtf8(static_cast<char32_t>(utf8proc_toupper(static_cast<utf8proc_int32_t>(c))), out);
    }
  });
}

std::string ToLower(std::string_view text) {
  return MapCharacters(text, [](char32_t c, std::string* out) {
    AppendUtf8(static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c))), out);
  });
}

bool IsWhiteSpace(char32_t c) {
  return (c >= 0x9 && c <= 0xD) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
         c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool IsPythonSpace(char32_t c) { return IsWhiteSpace(c) || (c >= 0x1C && c <= 0x1F); }

bool IsPrintable(char32_t c) {
  if (c == ' ') return true;
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_ZS:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP: return false;
    default: return true;
  }
}

bool IsLetter(char32_t c) {
  const auto category = utf8proc_category(static_cast<utf8proc_int32_t>(c));
  return category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO;
}

bool IsWordCharacter(char32_t c) {
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC: return true;
    default: return IsLetter(c) || c == 0x200C || c == 0x200D || (c >= 0x24B6 && c <= 0x24E9);
  }
}

}  // namespace kvshare::runtime

// Properties and normalisation of Unicode text; the door to utf8proc.
#pragma once

#include <string>
#include <string_view>

namespace kvshare::runtime {

// Normalisation form C of valid UTF-8. Linear up to sorting runs of combining marks.
std::string ToNfc(std::string_view text);

// str.upper() and str.lower() of valid UTF-8, character by character (and the sharp s): no context-dependent casing.
std::string ToUpper(std::string_view text);
std::string ToLower(std::string_view text);

// str.isspace(), str.isprintable() and "is a letter" (category L) of one character.
bool IsPythonSpace(char32_t c);
bool IsPrintable(char32_t c);
bool IsLetter(char32_t c);

// White_Space, as Rust's char::is_whitespace and \s of the regular expressions in tokenizer files.
bool IsWhiteSpace(char32_t c);
// \w of those expressions: letters, marks, decimal and letter numbers, connector punctuation, joiners.
bool IsWordCharacter(char32_t c);

}  // namespace kvshare::runtime

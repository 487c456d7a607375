#include "runtime/jinja_lexer.h"

#include <array>
#include <charconv>

#include "libkvshare/core/status_macros.h"
#include "runtime/unicode.h"
#include "runtime/utf8.h"

namespace kvshare::runtime::jinja {
namespace {

bool IsSpace(char c) { return c == ' ' || (c >= '\t' && c <= '\r') || (c >= 0x1C && c <= 0x1F); }
bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsNameStart(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || (c & 0x80) != 0; }
bool IsNameRest(char c) { return IsNameStart(c) || IsDigit(c); }

// "\r\n" and "\r" become "\n"; one newline at the end goes.
std::string NormalizeNewlines(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (std::size_t i = 0; i < source.size(); ++i) {
    if (source[i] != '\r') {
      out += source[i];
      continue;
    }
    out += '\n';
    if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
  }
  if (!out.empty() && out.back() == '\n') out.pop_back();
  return out;
}

std::size_t SpaceEnd(std::string_view text, std::size_t from) {
  while (from < text.size()) {
    const Utf8Step step = DecodeUtf8(text.substr(from));
    if (!IsPythonSpace(step.code_point)) break;
    from += step.length;
  }
  return from;
}

std::string_view StripRight(std::string_view text) {
  while (!text.empty()) {
    std::size_t i = text.size() - 1;
    while (i > 0 && (static_cast<unsigned char>(text[i]) & 0xC0) == 0x80) --i;
    if (!IsPythonSpace(DecodeUtf8(text.substr(i)).code_point)) break;
    text = text.substr(0, i);
  }
  return text;
}

class Lexer {
 public:
  explicit Lexer(std::string source) : source_(std::move(source)) {}

  Result<std::vector<Token>> Run() {
    while (pos_ < source_.size()) {
      const std::size_t tag = FindTag(pos_);
      if (tag == std::string::npos) {
        EmitData(std::string_view(source_).substr(pos_), pos_);
        pos_ = source_.size();
        break;
      }
      KVS_RETURN_IF_ERROR(LexTag(tag));
    }
    Emit(Token::Type::kEnd, pos_);
    return std::move(tokens_);
  }

 private:
  std::string_view Rest(std::size_t from) const { return std::string_view(source_).substr(from); }

  std::size_t FindTag(std::size_t from) const {
    for (std::size_t i = from; i + 1 < source_.size(); ++i) {
      if (source_[i] == '{' && (source_[i + 1] == '{' || source_[i + 1] == '%' || source_[i + 1] == '#')) return i;
    }
    return std::string::npos;
  }

  // Offsets only grow, so counting lines from the last place asked for is linear in total.
  Place PlaceOf(std::size_t offset) {
    for (; place_offset_ < offset; ++place_offset_) {
      if (source_[place_offset_] == '\n') {
        ++place_.line;
        place_.column = 1;
      } else {
        ++place_.column;
      }
    }
    return place_;
  }

  Token& Emit(Token::Type type, std::size_t offset, std::string text = {}) {
    tokens_.push_back({.type = type, .text = std::move(text), .place = PlaceOf(offset)});
    return tokens_.back();
  }

  void EmitData(std::string_view text, std::size_t offset) {
    if (!text.empty()) Emit(Token::Type::kData, offset, std::string(text));
  }

  // The text before a tag, less what the tag's sign and lstrip_blocks take from its end.
  std::string_view TextBefore(std::size_t tag, char sign, bool is_print) const {
    const std::string_view text = std::string_view(source_).substr(pos_, tag - pos_);
    if (sign == '-') return StripRight(text);
    if (sign == '+' || is_print) return text;
    const std::size_t newline = text.rfind('\n');
    if (newline == std::string_view::npos && !line_starting_) return text;
    const std::size_t begin = newline == std::string_view::npos ? 0 : newline + 1;
    return SpaceEnd(text, begin) == text.size() ? text.substr(0, begin) : text;
  }

  // Lexes the text before the tag at `tag` and the tag itself.
  Status LexTag(std::size_t tag) {
    const char kind = source_[tag + 1];
    std::size_t inside = tag + 2;
    char sign = 0;
    if (inside < source_.size() && (source_[inside] == '-' || source_[inside] == '+')) sign = source_[inside++];
    EmitData(TextBefore(tag, sign, kind == '{'), pos_);
    if (kind == '#') return SkipComment(tag, inside);
    if (kind == '%') {
      std::size_t raw_end = 0;
      if (MatchWordTag("raw", inside, &raw_end)) return LexRaw(tag, raw_end);
    }
    const bool is_block = kind == '%';
    Emit(is_block ? Token::Type::kBlockBegin : Token::Type::kPrintBegin, tag);
    pos_ = inside;
    return LexInside(is_block, tag);
  }

  // After a tag's end at `end`: what the sign and trim_blocks take from the text that follows.
  void FinishTag(std::size_t end, bool strip, bool trim_newline) {
    if (strip) {
      pos_ = SpaceEnd(source_, end);
    } else if (trim_newline && end < source_.size() && source_[end] == '\n') {
      pos_ = end + 1;
    } else {
      pos_ = end;
    }
    line_starting_ = source_[pos_ - 1] == '\n';
  }

  Status SkipComment(std::size_t tag, std::size_t inside) {
    const std::size_t end = source_.find("#}", inside);
    if (end == std::string::npos) return ErrorAt(PlaceOf(tag), "this comment has no end");
    const char sign = end > inside ? source_[end - 1] : 0;
    FinishTag(end + 2, sign == '-', sign != '+');
    return OkStatus();
  }

  // Whether `word` and a block's end follow at `from`; `end` is then past the end, stripped space included.
  bool MatchWordTag(std::string_view word, std::size_t from, std::size_t* end) const {
    std::size_t i = SpaceEnd(source_, from);
    if (!Rest(i).starts_with(word)) return false;
    i = SpaceEnd(source_, i + word.size());
    const bool strip = Rest(i).starts_with("-%}");
    if (strip) ++i;
    if (!Rest(i).starts_with("%}")) return false;
    *end = strip ? SpaceEnd(source_, i + 2) : i + 2;
    return true;
  }

  Status LexRaw(std::size_t tag, std::size_t begin) {
    for (std::size_t i = source_.find("{%", begin); i != std::string::npos; i = source_.find("{%", i + 1)) {
      std::size_t inside = i + 2;
      char sign = 0;
      if (inside < source_.size() && (source_[inside] == '-' || source_[inside] == '+')) sign = source_[inside++];
      std::size_t word = SpaceEnd(source_, inside);
      if (!Rest(word).starts_with("endraw")) continue;
      word = SpaceEnd(source_, word + 6);
      const char end_sign = word < source_.size() ? source_[word] : 0;
      const bool has_sign = end_sign == '-' || end_sign == '+';
      if (!Rest(word + (has_sign ? 1 : 0)).starts_with("%}")) continue;
      pos_ = begin;
      line_starting_ = source_[begin - 1] == '\n';
      EmitData(TextBefore(i, sign, false), begin);
      FinishTag(word + (has_sign ? 3 : 2), end_sign == '-', end_sign != '+');
      return OkStatus();
    }
    return ErrorAt(PlaceOf(tag), "raw without endraw");
  }

  Status LexInside(bool is_block, std::size_t tag) {
    const std::string_view close = is_block ? "%}" : "}}";
    std::string brackets;  // the closing ones we wait for
    while (true) {
      while (pos_ < source_.size() && IsSpace(source_[pos_])) ++pos_;
      if (pos_ >= source_.size()) return ErrorAt(PlaceOf(tag), "this tag has no end");
      if (brackets.empty()) {
        const char sign = source_[pos_];
        const bool has_sign = sign == '-' || (sign == '+' && is_block);
        if (Rest(pos_ + (has_sign ? 1 : 0)).starts_with(close)) {
          Emit(is_block ? Token::Type::kBlockEnd : Token::Type::kPrintEnd, pos_);
          FinishTag(pos_ + close.size() + (has_sign ? 1 : 0), sign == '-', is_block && sign != '+');
          return OkStatus();
        }
      }
      const char c = source_[pos_];
      if (IsDigit(c)) {
        KVS_RETURN_IF_ERROR(LexNumber());
      } else if (IsNameStart(c)) {
        const std::size_t begin = pos_;
        while (pos_ < source_.size() && IsNameRest(source_[pos_])) ++pos_;
        Emit(Token::Type::kName, begin, source_.substr(begin, pos_ - begin));
      } else if (c == '"' || c == '\'') {
        KVS_RETURN_IF_ERROR(LexString());
      } else {
        KVS_RETURN_IF_ERROR(LexOperator(&brackets));
      }
    }
  }

  std::size_t DigitsEnd(std::size_t from) const {
    while (from < source_.size() && (IsDigit(source_[from]) || (source_[from] == '_' && from + 1 < source_.size() &&
                                                                IsDigit(source_[from + 1])))) {
      ++from;
    }
    return from;
  }

  Status LexNumber() {
    const std::size_t begin = pos_;
    std::size_t end = DigitsEnd(begin);
    bool is_float = false;
    const auto digit_at = [&](std::size_t i) { return i < source_.size() && IsDigit(source_[i]); };
    // In a.0.1 the digits are attributes.
    const bool after_dot = begin > 0 && source_[begin - 1] == '.';
    if (!after_dot && end < source_.size() && source_[end] == '.' && digit_at(end + 1)) {
      is_float = true;
      end = DigitsEnd(end + 1);
    }
    if (!after_dot && end < source_.size() && (source_[end] == 'e' || source_[end] == 'E')) {
      std::size_t exponent = end + 1;
      if (exponent < source_.size() && (source_[exponent] == '+' || source_[exponent] == '-')) ++exponent;
      if (digit_at(exponent)) {
        is_float = true;
        end = DigitsEnd(exponent);
      }
    }
    std::string digits;
    for (std::size_t i = begin; i < end; ++i) {
      if (source_[i] != '_') digits += source_[i];
    }
    pos_ = end;
    Token& token = Emit(is_float ? Token::Type::kFloat : Token::Type::kInt, begin, digits);
    const auto read = is_float ? std::from_chars(digits.data(), digits.data() + digits.size(), token.number).ec
                               : std::from_chars(digits.data(), digits.data() + digits.size(), token.integer).ec;
    if (read != std::errc()) return ErrorAt(token.place, "the number " + digits.substr(0, 40) + " is out of range");
    return OkStatus();
  }

  Status LexString() {
    const std::size_t begin = pos_;
    const char quote = source_[pos_++];
    std::string out;
    while (pos_ < source_.size() && source_[pos_] != quote) {
      if (source_[pos_] == '\\') {
        KVS_RETURN_IF_ERROR(LexEscape(&out));
      } else {
        out += source_[pos_++];
      }
    }
    if (pos_ >= source_.size()) return ErrorAt(PlaceOf(begin), "this string has no end");
    ++pos_;
    Emit(Token::Type::kString, begin, std::move(out));
    return OkStatus();
  }

  // Python's escapes, at a backslash.
  Status LexEscape(std::string* out) {
    const std::size_t begin = pos_++;
    if (pos_ >= source_.size()) return OkStatus();
    const char e = source_[pos_++];
    constexpr std::string_view kLetters = "ntr\\'\"abfv", kMeanings = "\n\t\r\\'\"\a\b\f\v";
    if (const std::size_t i = kLetters.find(e); i != std::string_view::npos) {
      *out += kMeanings[i];
      return OkStatus();
    }
    if (e == '\n') return OkStatus();
    int base = 16;
    std::size_t digits = e == 'x' ? 2 : e == 'u' ? 4 : e == 'U' ? 8 : 0;
    const bool fixed = digits > 0;
    if (e >= '0' && e <= '7') {
      base = 8;
      digits = 3;
      --pos_;
    }
    if (digits == 0) {
      *out += {'\\', e};
      return OkStatus();
    }
    const std::size_t limit = std::min(source_.size(), pos_ + digits);
    std::uint32_t code = 0;
    const auto read = std::from_chars(source_.data() + pos_, source_.data() + limit, code, base);
    const auto used = static_cast<std::size_t>(read.ptr - (source_.data() + pos_));
    if (read.ec != std::errc() || (fixed && used != digits) || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) {
      return ErrorAt(PlaceOf(begin), "this escape is no character");
    }
    pos_ += used;
    AppendUtf8(code, out);
    return OkStatus();
  }

  Status LexOperator(std::string* brackets) {
    static constexpr std::array<std::string_view, 25> kOperators = {"//", "**", "==", "!=", ">=", "<=", "+", "-", "/",
                                                                    "*",  "%",  "~",  "[",  "]",  "(",  ")", "{", "}",
                                                                    ">",  "<",  "=",  ".",  ":",  "|",  ","};
    for (const std::string_view op : kOperators) {
      if (!Rest(pos_).starts_with(op)) continue;
      if (op == "(") *brackets += ')';
      if (op == "[") *brackets += ']';
      if (op == "{") *brackets += '}';
      if (op == ")" || op == "]" || op == "}") {
        if (brackets->empty() || brackets->back() != op[0]) {
          return ErrorAt(PlaceOf(pos_), "'" + std::string(op) + "' closes nothing");
        }
        brackets->pop_back();
      }
      Emit(Token::Type::kOperator, pos_, std::string(op));
      pos_ += op.size();
      return OkStatus();
    }
    return ErrorAt(PlaceOf(pos_), std::string("unexpected character '") + source_[pos_] + "'");
  }

  const std::string source_;
  std::size_t pos_ = 0;
  bool line_starting_ = true;  // whether pos_ is at the start of a line, as lstrip_blocks sees it
  Place place_;
  std::size_t place_offset_ = 0;
  std::vector<Token> tokens_;
};

}  // namespace

Status ErrorAt(const Place& place, const std::string& what) {
  return InvalidArgument("line " + std::to_string(place.line) + ", column " + std::to_string(place.column) + ": " +
                         what);
}

Result<std::vector<Token>> Tokenize(std::string_view source) {
  Lexer lexer(NormalizeNewlines(source));
  return lexer.Run();
}

}  // namespace kvshare::runtime::jinja

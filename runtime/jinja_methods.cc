// Methods of Python's str, dict and list, and the text helpers behind them.
#include <algorithm>
#include <iterator>

#include "libkvshare/core/status_macros.h"
#include "runtime/jinja_builtins.h"
#include "runtime/unicode.h"
#include "runtime/utf8.h"

namespace kvshare::runtime::jinja {
namespace {

constexpr std::string_view kStringMethods[] = {
    "strip",        "lstrip",       "rstrip", "split", "rsplit",  "startswith", "endswith", "upper",      "lower",
    "title",        "join",         "find",   "rfind", "count",   "isdigit",    "isalpha",  "isspace",    "splitlines",
    "removeprefix", "removesuffix", "format", "index", "isupper", "islower",    "replace",  "capitalize", "isnumeric"};
constexpr std::string_view kDictMethods[] = {"items", "keys", "values", "get", "copy"};
constexpr std::string_view kListMethods[] = {"index", "count"};

template <typename Names>
bool IsOneOf(const Names& names, std::string_view name) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

std::string_view FirstCharacter(std::string_view text) { return text.substr(0, DecodeUtf8(text).length); }

std::string_view LastCharacter(std::string_view text) {
  std::size_t i = text.size() - 1;
  while (i > 0 && (static_cast<unsigned char>(text[i]) & 0xC0) == 0x80) --i;
  return text.substr(i);
}

Result<Value> Texts(std::vector<std::string> parts, Budget* budget) {
  std::vector<Value> items;
  KVS_RETURN_IF_ERROR(budget->Charge(static_cast<std::int64_t>(parts.size()) * 2));
  for (std::string& part : parts) items.push_back(Value::Str(std::move(part)));
  return Value::Sequence(std::move(items));
}

// str.split and str.rsplit; `max` < 0: no limit.
std::vector<std::string> SplitBy(std::string_view text, std::string_view separator, std::int64_t max, bool from_right) {
  std::vector<std::string> out;
  if (from_right) {
    while (max-- != 0) {
      const std::size_t at = text.rfind(separator);
      if (at == std::string_view::npos) break;
      out.emplace_back(text.substr(at + separator.size()));
      text = text.substr(0, at);
    }
    out.emplace_back(text);
    std::reverse(out.begin(), out.end());
    return out;
  }
  while (max-- != 0) {
    const std::size_t at = text.find(separator);
    if (at == std::string_view::npos) break;
    out.emplace_back(text.substr(0, at));
    text.remove_prefix(at + separator.size());
  }
  out.emplace_back(text);
  return out;
}

// The same without a separator: at runs of white space, which also go from the ends.
std::vector<std::string> SplitWords(const std::string& text, std::int64_t max, bool from_right) {
  const auto is_space = [](std::string_view c) { return IsPythonSpace(DecodeUtf8(c).code_point); };
  std::vector<std::string> out;
  const std::string stripped = Strip(text, "", Side::kBoth);
  std::string_view rest = stripped;
  while (!rest.empty()) {
    std::size_t word = 0;  // bytes of the word at the end we take from
    if (max-- == 0) {
      word = rest.size();
    } else if (from_right) {
      while (word < rest.size() && !is_space(LastCharacter(rest.substr(0, rest.size() - word)))) {
        word += LastCharacter(rest.substr(0, rest.size() - word)).size();
      }
    } else {
      while (word < rest.size() && !is_space(rest.substr(word))) word += FirstCharacter(rest.substr(word)).size();
    }
    out.emplace_back(from_right ? rest.substr(rest.size() - word) : rest.substr(0, word));
    if (from_right) {
      rest.remove_suffix(word);
      while (!rest.empty() && is_space(LastCharacter(rest))) rest.remove_suffix(LastCharacter(rest).size());
    } else {
      rest.remove_prefix(word);
      while (!rest.empty() && is_space(rest)) rest.remove_prefix(FirstCharacter(rest).size());
    }
  }
  if (from_right) std::reverse(out.begin(), out.end());
  return out;
}

// str.title(): letters after a letter are lower case, others upper.
std::string TitleCase(std::string_view text) {
  std::string out;
  bool in_word = false;
  while (!text.empty()) {
    const std::string_view c = FirstCharacter(text);
    out += in_word ? ToLower(c) : ToUpper(c);
    in_word = IsLetter(DecodeUtf8(c).code_point);
    text.remove_prefix(c.size());
  }
  return out;
}

// Whether the text has one of the affixes, which are a text or a tuple of them.
Result<bool> HasAffix(const std::string& text, const Arguments& arguments, bool at_start) {
  const Value* affix = arguments.Get(0, "");
  const auto has = [&](const std::string& a) { return at_start ? text.starts_with(a) : text.ends_with(a); };
  if (affix != nullptr && affix->IsString()) return has(affix->AsString());
  if (affix == nullptr || !affix->IsList())
    return InvalidArgument("startswith and endswith take a str or a tuple of str");
  for (const Value& a : affix->AsList().items) {
    if (!a.IsString()) return InvalidArgument("startswith and endswith take a str or a tuple of str");
    if (has(a.AsString())) return true;
  }
  return false;
}

// isdigit and the like: true of every character, and there is one.
template <typename Predicate>
Value All(std::string_view text, Predicate predicate) {
  if (text.empty()) return Value::Bool(false);
  for (; !text.empty(); text.remove_prefix(FirstCharacter(text).size())) {
    if (!predicate(DecodeUtf8(text).code_point)) return Value::Bool(false);
  }
  return Value::Bool(true);
}

// A position in bytes as one in characters; -1 = not found.
Value Position(const std::string& text, std::size_t at) {
  if (at == std::string::npos) return Value::Int(-1);
  return Value::Int(static_cast<std::int64_t>(CountCodePoints(std::string_view(text).substr(0, at))));
}

Result<Value> CallStringMethod(const std::string& self, const std::string& name, const Arguments& arguments,
                               Runtime* runtime) {
  Budget* budget = &runtime->budget;
  KVS_RETURN_IF_ERROR(budget->ChargeBytes(self.size() * 2));
  const Value* first = arguments.Get(0, name == "split" || name == "rsplit" ? "sep" : "");
  const bool has_text = first != nullptr && first->IsString();
  if (name == "strip" || name == "lstrip" || name == "rstrip") {
    if (first != nullptr && !first->IsNone() && !has_text) return InvalidArgument(name + " takes a str");
    const Side side = name == "strip" ? Side::kBoth : name == "lstrip" ? Side::kLeft : Side::kRight;
    if (has_text && first->AsString().empty()) return Value::Str(self);
    return Value::Str(Strip(self, has_text ? first->AsString() : "", side));
  }
  if (name == "split" || name == "rsplit") {
    KVS_ASSIGN_OR_RETURN(const std::int64_t max, arguments.Int(1, "maxsplit", -1));
    KVS_RETURN_IF_ERROR(budget->Charge(static_cast<std::int64_t>(self.size()) / 4));
    const bool from_right = name == "rsplit";
    if (first == nullptr || first->IsNone()) return Texts(SplitWords(self, max, from_right), budget);
    if (!has_text || first->AsString().empty()) return InvalidArgument(name + " takes a separator that is not empty");
    return Texts(SplitBy(self, first->AsString(), max, from_right), budget);
  }
  if (name == "startswith" || name == "endswith") {
    KVS_ASSIGN_OR_RETURN(const bool has, HasAffix(self, arguments, name == "startswith"));
    return Value::Bool(has);
  }
  if (name == "upper") return Value::Str(ToUpper(self));
  if (name == "lower") return Value::Str(ToLower(self));
  if (name == "title") return Value::Str(TitleCase(self));
  if (name == "capitalize") return Value::Str(Capitalize(self));
  if (name == "splitlines") return Texts(SplitLines(self), budget);
  if (name == "isdigit" || name == "isnumeric") return All(self, [](char32_t c) { return c >= '0' && c <= '9'; });
  if (name == "isalpha") return All(self, IsLetter);
  if (name == "isspace") return All(self, IsPythonSpace);
  if (name == "isupper") return Value::Bool(ToUpper(self) == self && ToLower(self) != self);
  if (name == "islower") return Value::Bool(ToLower(self) == self && ToUpper(self) != self);
  if (name == "join") {
    if (first == nullptr) return InvalidArgument("join takes what to join");
    KVS_ASSIGN_OR_RETURN(const auto items, Iterate(*first, budget));
    for (const Value& item : items) {
      if (!item.IsString()) return InvalidArgument("join: expected str instance, " + item.TypeName() + " found");
    }
    KVS_ASSIGN_OR_RETURN(std::string text, JoinTexts(items, self, budget));
    return Value::Str(std::move(text));
  }
  if (name == "format") return InvalidArgument("str.format is outside the subset; use ~");
  if (!has_text) return InvalidArgument(name + " takes a str");
  const std::string& text = first->AsString();
  if (name == "find") return Position(self, self.find(text));
  if (name == "rfind") return Position(self, self.rfind(text));
  if (name == "index") {
    if (self.find(text) == std::string::npos) return InvalidArgument("substring not found");
    return Position(self, self.find(text));
  }
  if (name == "removeprefix") return Value::Str(self.starts_with(text) ? self.substr(text.size()) : self);
  if (name == "removesuffix") {
    return Value::Str(self.ends_with(text) ? self.substr(0, self.size() - text.size()) : self);
  }
  if (name == "count") {
    if (text.empty()) return Value::Int(static_cast<std::int64_t>(CountCodePoints(self)) + 1);
    return Value::Int(static_cast<std::int64_t>(SplitBy(self, text, -1, false).size()) - 1);
  }
  KVS_ASSIGN_OR_RETURN(const std::string to, arguments.Text(1, "", ""));
  if (arguments.positional.size() < 2) return InvalidArgument("replace takes two str");
  KVS_ASSIGN_OR_RETURN(const std::int64_t count, arguments.Int(2, "count", -1));
  KVS_ASSIGN_OR_RETURN(std::string out, ReplaceAll(self, text, to, count, budget));
  return Value::Str(std::move(out));
}

Result<Value> CallDictMethod(const Value& self, const std::string& name, const Arguments& arguments, Runtime* runtime) {
  const Dict& dict = self.AsDict();
  if (name == "copy") return self;
  if (name == "get") {
    const Value* key = arguments.Get(0, "");
    if (key == nullptr) return InvalidArgument("get takes a key");
    if (const Value* found = dict.Find(*key)) return *found;
    const Value* fallback = arguments.Get(1, "default");
    return fallback == nullptr ? Value::None() : *fallback;
  }
  std::vector<Value> items;
  KVS_RETURN_IF_ERROR(runtime->budget.Charge(static_cast<std::int64_t>(dict.entries.size()) * 2));
  for (const auto& [key, value] : dict.entries) {
    if (name == "items") {
      KVS_ASSIGN_OR_RETURN(Value pair, Value::Sequence({key, value}, /*is_tuple=*/true));
      items.push_back(std::move(pair));
    } else {
      items.push_back(name == "keys" ? key : value);
    }
  }
  return Value::Sequence(std::move(items));
}

Result<Value> CallListMethod(const List& list, const std::string& name, const Arguments& arguments, Runtime* runtime) {
  const Value* wanted = arguments.Get(0, "");
  if (wanted == nullptr) return InvalidArgument(name + " takes a value");
  std::int64_t count = 0;
  for (std::size_t i = 0; i < list.items.size(); ++i) {
    KVS_ASSIGN_OR_RETURN(const bool same, Equal(list.items[i], *wanted, &runtime->budget));
    if (same && name == "index") return Value::Int(static_cast<std::int64_t>(i));
    count += same;
  }
  if (name == "index") return InvalidArgument("the value is not in the list");
  return Value::Int(count);
}

}  // namespace

std::string Strip(std::string_view text, const std::string& chars, Side side) {
  const auto goes = [&](std::string_view c) {
    if (chars.empty()) return IsPythonSpace(DecodeUtf8(c).code_point);
    return chars.find(c) != std::string::npos;
  };
  if (side != Side::kRight) {
    while (!text.empty() && goes(FirstCharacter(text))) text.remove_prefix(FirstCharacter(text).size());
  }
  if (side != Side::kLeft) {
    while (!text.empty() && goes(LastCharacter(text))) text.remove_suffix(LastCharacter(text).size());
  }
  return std::string(text);
}

Result<std::string> ReplaceAll(const std::string& text, const std::string& from, const std::string& to,
                               std::int64_t count, Budget* budget) {
  std::string out;
  std::size_t done = 0;
  // An empty text is found before every character and at the end.
  for (std::size_t at = 0; count != 0 && at <= text.size(); --count) {
    if (!from.empty()) at = text.find(from, at);
    if (at == std::string::npos) break;
    out.append(text, done, at - done);
    out += to;
    KVS_RETURN_IF_ERROR(budget->Charge(1));
    if (out.size() > Budget::kStringBytes) return budget->ChargeBytes(out.size());
    done = at + from.size();
    if (from.empty()) {
      if (at == text.size()) break;
      at += Utf8Length(text[at]);
    } else {
      at = done;
    }
  }
  out.append(text, done, text.size() - done);
  KVS_RETURN_IF_ERROR(budget->ChargeBytes(out.size()));
  return out;
}

std::string Capitalize(std::string_view text) {
  if (text.empty()) return {};
  const std::string_view first = FirstCharacter(text);
  return ToUpper(first) + ToLower(text.substr(first.size()));
}

std::vector<std::string> SplitLines(std::string_view text) {
  std::vector<std::string> lines;
  std::size_t begin = 0;
  for (std::size_t i = 0; i < text.size();) {
    const Utf8Step step = DecodeUtf8(text.substr(i));
    const char32_t c = step.code_point;
    const bool breaks = (c >= 0xA && c <= 0xD) || (c >= 0x1C && c <= 0x1E) || c == 0x85 || c == 0x2028 || c == 0x2029;
    if (breaks) lines.emplace_back(text.substr(begin, i - begin));
    i += step.length;
    if (c == '\r' && i < text.size() && text[i] == '\n') ++i;
    if (breaks) begin = i;
  }
  if (begin < text.size()) lines.emplace_back(text.substr(begin));
  return lines;
}

Result<std::string> JoinTexts(const std::vector<Value>& items, const std::string& glue, Budget* budget) {
  std::string out;
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (i > 0) out += glue;
    KVS_ASSIGN_OR_RETURN(const std::string text, ToText(items[i], budget));
    out += text;
    if (out.size() > Budget::kStringBytes) break;
  }
  KVS_RETURN_IF_ERROR(budget->ChargeBytes(out.size()));
  return out;
}

bool HasMethod(const Value& value, std::string_view name) {
  switch (value.kind()) {
    case Kind::kString: return IsOneOf(kStringMethods, name);
    case Kind::kDict: return IsOneOf(kDictMethods, name);
    case Kind::kList: return IsOneOf(kListMethods, name);
    default: return false;
  }
}

Result<Value> CallMethod(const Value& self, const std::string& name, const Arguments& arguments, Runtime* runtime) {
  KVS_RETURN_IF_ERROR(runtime->budget.Charge(1));
  if (self.IsString()) return CallStringMethod(self.AsString(), name, arguments, runtime);
  if (self.IsDict()) return CallDictMethod(self, name, arguments, runtime);
  return CallListMethod(self.AsList(), name, arguments, runtime);
}

}  // namespace kvshare::runtime::jinja

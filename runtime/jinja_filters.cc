// Filters and tests, each a row of a table. Semantics of jinja2/filters.py and tests.py; tojson as transformers has it.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <optional>

#include "libkvshare/core/status_macros.h"
#include "runtime/jinja_builtins.h"
#include "runtime/unicode.h"
#include "runtime/utf8.h"

namespace kvshare::runtime::jinja {
namespace {

using Filter = Result<Value> (*)(const Value&, const Arguments&, Runtime*);
using Test = Result<bool> (*)(const Value&, const Arguments&, Runtime*);

Result<Value> Wrap(Result<std::string> text) {
  if (!text.ok()) return text.status();
  return Value::Str(std::move(*text));
}

// Applies `f` to str(value).
template <typename F>
Result<Value> OnText(const Value& value, Runtime* rt, F f) {
  KVS_ASSIGN_OR_RETURN(const std::string text, ToText(value, &rt->budget));
  KVS_RETURN_IF_ERROR(rt->budget.ChargeBytes(text.size() * 2));
  return Value::Str(f(text));
}

// value.a.b.0 for the attribute text "a.b.0"; an integer is an index.
Result<Value> Dig(Value value, const Value& path, Runtime* rt) {
  if (path.IsInt()) return GetItem(value, path, rt);
  if (!path.IsString()) return InvalidArgument("an attribute's name must be a str");
  std::string_view rest = path.AsString();
  while (true) {
    const std::size_t dot = rest.find('.');
    const std::string part(rest.substr(0, dot));
    std::int64_t index = 0;
    const auto read = std::from_chars(part.data(), part.data() + part.size(), index);
    const bool is_index = read.ec == std::errc() && read.ptr == part.data() + part.size() && part[0] != '-';
    KVS_ASSIGN_OR_RETURN(value, GetItem(value, is_index ? Value::Int(index) : Value::Str(part), rt));
    if (dot == std::string_view::npos) return value;
    rest.remove_prefix(dot + 1);
  }
}

Result<Value> Length(const Value& v, Runtime* rt) {
  switch (v.kind()) {
    case Kind::kUndefined: return Value::Int(0);
    case Kind::kString:
      KVS_RETURN_IF_ERROR(rt->budget.ChargeBytes(v.AsString().size()));
      return Value::Int(static_cast<std::int64_t>(CountCodePoints(v.AsString())));
    case Kind::kList: return Value::Int(static_cast<std::int64_t>(v.AsList().items.size()));
    case Kind::kDict: return Value::Int(static_cast<std::int64_t>(v.AsDict().entries.size()));
    default: return InvalidArgument("object of type '" + v.TypeName() + "' has no length");
  }
}

Result<Value> Join(const Value& v, const Arguments& args, Runtime* rt) {
  KVS_ASSIGN_OR_RETURN(auto items, Iterate(v, &rt->budget));
  KVS_ASSIGN_OR_RETURN(const std::string glue, args.Text(0, "d", ""));
  if (const Value* attribute = args.Get(1, "attribute")) {
    for (Value& item : items) {
      KVS_ASSIGN_OR_RETURN(item, Dig(item, *attribute, rt));
    }
  }
  return Wrap(JoinTexts(items, glue, &rt->budget));
}

Result<Value> End(const Value& v, bool first, Runtime* rt) {
  KVS_ASSIGN_OR_RETURN(const auto items, Iterate(v, &rt->budget));
  if (items.empty()) return Value::Undefined("the sequence is empty");
  return first ? items.front() : items.back();
}

std::optional<double> ReadFloat(const std::string& text) {
  const std::string stripped = Strip(text, "", Side::kBoth);
  const char* begin = stripped.c_str();
  if (*begin == '+') ++begin;
  double d = 0;
  const auto read = std::from_chars(begin, stripped.c_str() + stripped.size(), d);
  if (stripped.empty() || read.ec != std::errc() || read.ptr != stripped.c_str() + stripped.size()) return std::nullopt;
  return d;
}

Result<Value> ToInt(const Value& v, const Arguments& args, Runtime*) {
  const Value* fallback = args.Get(0, "default");
  const Value otherwise = fallback == nullptr ? Value::Int(0) : *fallback;
  KVS_ASSIGN_OR_RETURN(const std::int64_t base, args.Int(1, "base", 10));
  if (base < 2 || base > 36) return InvalidArgument("int: the base must be in 2..36");
  if (v.IsInt()) return Value::Int(v.AsInt());
  double d = 0;
  if (v.IsString()) {
    std::string text = Strip(v.AsString(), "", Side::kBoth);
    if (text.starts_with('+')) text.erase(0, 1);
    std::int64_t i = 0;
    const auto read = std::from_chars(text.data(), text.data() + text.size(), i, static_cast<int>(base));
    if (!text.empty() && read.ec == std::errc() && read.ptr == text.data() + text.size()) return Value::Int(i);
    const auto as_float = ReadFloat(v.AsString());
    if (!as_float.has_value()) return otherwise;
    d = *as_float;
  } else if (v.kind() == Kind::kFloat) {
    d = v.AsNumber();
  } else {
    return otherwise;
  }
  if (!(std::abs(d) < 9.2e18)) return otherwise;
  return Value::Int(static_cast<std::int64_t>(d));
}

Result<Value> ToFloat(const Value& v, const Arguments& args, Runtime*) {
  const Value* fallback = args.Get(0, "default");
  if (v.IsNumber()) return Value::Float(v.AsNumber());
  const auto d = v.IsString() ? ReadFloat(v.AsString()) : std::nullopt;
  if (d.has_value()) return Value::Float(*d);
  return fallback == nullptr ? Value::Float(0.0) : *fallback;
}

// jinja's title: a letter after the start, white space, a dash or an opening bracket.
std::string TitleWords(const std::string& text) {
  std::string out;
  bool begins = true;
  for (std::string_view rest = text; !rest.empty();) {
    const Utf8Step step = DecodeUtf8(rest);
    const std::string_view c = rest.substr(0, step.length);
    const bool separates = IsPythonSpace(step.code_point) ||
                           (c.size() == 1 && std::string_view("-({[<").find(c[0]) != std::string_view::npos);
    out += begins ? ToUpper(c) : ToLower(c);
    begins = separates;
    rest.remove_prefix(step.length);
  }
  return out;
}

Result<Value> Indent(const Value& v, const Arguments& args, Runtime* rt) {
  KVS_ASSIGN_OR_RETURN(const std::string text, ToText(v, &rt->budget));
  const Value* width = args.Get(0, "width");
  std::string by;
  if (width != nullptr && width->IsString()) {
    by = width->AsString();
  } else {
    KVS_ASSIGN_OR_RETURN(const std::int64_t n, args.Int(0, "width", 4));
    if (n > 1000) return InvalidArgument("indent: the width must be at most 1000");
    by.assign(static_cast<std::size_t>(std::max<std::int64_t>(n, 0)), ' ');
  }
  const bool first = args.Flag(1, "first", false), blank = args.Flag(2, "blank", false);
  std::string out;
  bool is_first = true;
  for (const std::string& line : SplitLines(text + "\n")) {
    if (!is_first) out += '\n';
    if (is_first ? first : (blank || !line.empty())) out += by;
    out += line;
    is_first = false;
    if (out.size() > Budget::kStringBytes) break;
  }
  KVS_RETURN_IF_ERROR(rt->budget.ChargeBytes(out.size()));
  return Value::Str(std::move(out));
}

Result<Value> ToJsonFilter(const Value& v, const Arguments& args, Runtime* rt) {
  JsonStyle style;
  style.ensure_ascii = args.Flag(0, "ensure_ascii", false);
  style.sort_keys = args.Flag(3, "sort_keys", false);
  if (const Value* indent = args.Get(1, "indent"); indent != nullptr && !indent->IsNone()) {
    style.pretty = true;
    style.item_separator = ",";
    if (indent->IsString()) {
      style.indent = indent->AsString();
    } else {
      KVS_ASSIGN_OR_RETURN(const std::int64_t n, args.Int(1, "indent", 0));
      style.indent.assign(static_cast<std::size_t>(std::clamp<std::int64_t>(n, 0, 64)), ' ');
    }
    if (style.indent.size() > 64) return InvalidArgument("tojson: the indent is too wide");
  }
  if (const Value* pair = args.Get(2, "separators"); pair != nullptr && !pair->IsNone()) {
    if (!pair->IsList() || pair->AsList().items.size() != 2 || !pair->AsList().items[0].IsString() ||
        !pair->AsList().items[1].IsString()) {
      return InvalidArgument("tojson: separators must be two str");
    }
    style.item_separator = pair->AsList().items[0].AsString();
    style.key_separator = pair->AsList().items[1].AsString();
    if (style.item_separator.size() + style.key_separator.size() > 64)
      return InvalidArgument("tojson: the separators are too long");
  }
  return Wrap(ToJson(v, style, &rt->budget));
}

// What map, select and reject do with each item: look up an attribute, then apply a named filter or test.
Arguments Rest(const Arguments& args, std::size_t skip) {
  Arguments rest;
  if (args.positional.size() > skip) {
    rest.positional.assign(args.positional.begin() + static_cast<std::ptrdiff_t>(skip), args.positional.end());
  }
  rest.keywords = args.keywords;
  return rest;
}

Result<Value> Map(const Value& v, const Arguments& args, Runtime* rt) {
  KVS_ASSIGN_OR_RETURN(auto items, Iterate(v, &rt->budget));
  const Value* attribute = args.positional.empty() ? args.Get(0, "attribute") : nullptr;
  const Value* fallback = attribute == nullptr ? nullptr : args.Get(SIZE_MAX, "default");
  KVS_ASSIGN_OR_RETURN(const std::string filter, attribute == nullptr ? args.Text(0, "", "") : std::string());
  if (attribute == nullptr && !IsFilter(filter)) return InvalidArgument("map takes the name of a filter or attribute=");
  const Arguments rest = Rest(args, 1);
  for (Value& item : items) {
    if (attribute != nullptr) {
      KVS_ASSIGN_OR_RETURN(item, Dig(item, *attribute, rt));
      if (item.IsUndefined() && fallback != nullptr) item = *fallback;
    } else {
      KVS_ASSIGN_OR_RETURN(item, ApplyFilter(filter, item, rest, rt));
    }
  }
  return Value::Sequence(std::move(items));
}

Result<Value> Pick(const Value& v, const Arguments& args, bool by_attribute, bool wanted, Runtime* rt) {
  KVS_ASSIGN_OR_RETURN(auto items, Iterate(v, &rt->budget));
  const std::size_t at = by_attribute ? 1 : 0;
  if (by_attribute && args.positional.empty()) return InvalidArgument("expected an attribute's name");
  KVS_ASSIGN_OR_RETURN(const std::string test, args.Text(at, "", ""));
  if (!test.empty() && !IsTest(test)) return InvalidArgument("unknown test '" + test.substr(0, 40) + "'");
  const Arguments rest = Rest(args, at + 1);
  std::vector<Value> kept;
  for (Value& item : items) {
    Value subject = item;
    if (by_attribute) {
      KVS_ASSIGN_OR_RETURN(subject, Dig(item, args.positional[0], rt));
    }
    bool holds = subject.Truthy();
    if (!test.empty()) {
      KVS_ASSIGN_OR_RETURN(holds, ApplyTest(test, subject, rest, rt));
    }
    if (holds == wanted) kept.push_back(std::move(item));
  }
  return Value::Sequence(std::move(kept));
}

// Sorting key of an item: its attribute if one is asked for, in lower case unless case counts.
Result<std::vector<std::pair<Value, Value>>> Keyed(const std::vector<Value>& items, const Value* attribute,
                                                   bool case_sensitive, Runtime* rt) {
  std::vector<std::pair<Value, Value>> keyed;
  for (const Value& item : items) {
    Value key = item;
    if (attribute != nullptr && !attribute->IsNone()) {
      KVS_ASSIGN_OR_RETURN(key, Dig(item, *attribute, rt));
    }
    if (key.IsString() && !case_sensitive) {
      KVS_RETURN_IF_ERROR(rt->budget.ChargeBytes(key.AsString().size()));
      key = Value::Str(ToLower(key.AsString()));
    }
    keyed.emplace_back(std::move(key), item);
  }
  return keyed;
}

Result<Value> SortKeyed(std::vector<std::pair<Value, Value>> keyed, bool reverse, Runtime* rt) {
  Status failed;
  // Merge sort's comparisons are bounded whatever the comparison answers; a failed one ends all others.
  std::stable_sort(keyed.begin(), keyed.end(), [&](const auto& a, const auto& b) {
    if (!failed.ok()) return false;
    const auto order = reverse ? Compare(b.first, a.first, &rt->budget) : Compare(a.first, b.first, &rt->budget);
    if (!order.ok()) failed = order.status();
    return order.ok() && *order < 0;
  });
  KVS_RETURN_IF_ERROR(failed);
  std::vector<Value> items;
  for (auto& [key, item] : keyed) items.push_back(std::move(item));
  return Value::Sequence(std::move(items));
}

Result<Value> Sort(const Value& v, const Arguments& args, Runtime* rt) {
  KVS_ASSIGN_OR_RETURN(const auto items, Iterate(v, &rt->budget));
  KVS_ASSIGN_OR_RETURN(auto keyed, Keyed(items, args.Get(2, "attribute"), args.Flag(1, "case_sensitive", false), rt));
  return SortKeyed(std::move(keyed), args.Flag(0, "reverse", false), rt);
}

Result<Value> DictSort(const Value& v, const Arguments& args, Runtime* rt) {
  if (!v.IsDict()) return InvalidArgument("dictsort takes a dict, not " + v.TypeName());
  KVS_ASSIGN_OR_RETURN(const Value pairs, CallMethod(v, "items", {}, rt));
  KVS_ASSIGN_OR_RETURN(const std::string by, args.Text(1, "by", "key"));
  const Value index = Value::Int(by == "value" ? 1 : 0);
  KVS_ASSIGN_OR_RETURN(auto keyed, Keyed(pairs.AsList().items, &index, args.Flag(0, "case_sensitive", false), rt));
  return SortKeyed(std::move(keyed), args.Flag(2, "reverse", false), rt);
}

Result<Value> Unique(const Value& v, const Arguments& args, Runtime* rt) {
  KVS_ASSIGN_OR_RETURN(const auto items, Iterate(v, &rt->budget));
  KVS_ASSIGN_OR_RETURN(auto keyed, Keyed(items, args.Get(1, "attribute"), args.Flag(0, "case_sensitive", false), rt));
  Dict seen;
  std::vector<Value> kept;
  for (auto& [key, item] : keyed) {
    if (seen.Find(key) != nullptr) continue;
    KVS_RETURN_IF_ERROR(seen.Set(key, Value::None()));
    kept.push_back(std::move(item));
  }
  return Value::Sequence(std::move(kept));
}

Result<Value> Reverse(const Value& v, Runtime* rt) {
  KVS_ASSIGN_OR_RETURN(auto items, Iterate(v, &rt->budget));
  std::reverse(items.begin(), items.end());
  return v.IsString() ? Wrap(JoinTexts(items, "", &rt->budget)) : Value::Sequence(std::move(items));
}

Result<Value> Extreme(const Value& v, const Arguments& args, int sign, Runtime* rt) {
  KVS_ASSIGN_OR_RETURN(const auto items, Iterate(v, &rt->budget));
  KVS_ASSIGN_OR_RETURN(auto keyed, Keyed(items, args.Get(1, "attribute"), args.Flag(0, "case_sensitive", false), rt));
  if (keyed.empty()) return Value::Undefined("the sequence is empty");
  std::size_t best = 0;
  for (std::size_t i = 1; i < keyed.size(); ++i) {
    KVS_ASSIGN_OR_RETURN(const int order, Compare(keyed[i].first, keyed[best].first, &rt->budget));
    if (order * sign > 0) best = i;
  }
  return keyed[best].second;
}

Result<Value> Sum(const Value& v, const Arguments& args, Runtime* rt) {
  KVS_ASSIGN_OR_RETURN(const auto items, Iterate(v, &rt->budget));
  const Value* attribute = args.Get(0, "attribute");
  const Value* start = args.Get(1, "start");
  Value total = start == nullptr ? Value::Int(0) : *start;
  for (Value item : items) {
    if (attribute != nullptr && !attribute->IsNone()) {
      KVS_ASSIGN_OR_RETURN(item, Dig(item, *attribute, rt));
    }
    KVS_ASSIGN_OR_RETURN(total, Arithmetic("+", total, item, rt));
  }
  return total;
}

std::string EscapeHtml(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&#34;"; break;
      case '\'': out += "&#39;"; break;
      default: out += c;
    }
  }
  return out;
}

struct NamedFilter {
  std::string_view name;
  Filter apply;
};

constexpr auto kLength = [](const Value& v, const Arguments&, Runtime* rt) { return Length(v, rt); };
constexpr auto kDefault = [](const Value& v, const Arguments& args, Runtime*) -> Result<Value> {
  const Value* other = args.Get(0, "default_value");
  const bool replace = v.IsUndefined() || (args.Flag(1, "boolean", false) && !v.Truthy());
  return !replace ? v : other != nullptr ? *other : Value::Str("");
};
constexpr auto kEscape = [](const Value& v, const Arguments&, Runtime* rt) { return OnText(v, rt, EscapeHtml); };

constexpr NamedFilter kFilters[] = {
    {"abs",
     [](const Value& v, const Arguments&, Runtime*) -> Result<Value> {
       if (v.IsInt())
         return v.AsInt() == INT64_MIN ? Result<Value>(InvalidArgument("abs: too large"))
                                       : Value::Int(std::abs(v.AsInt()));
       if (v.IsNumber()) return Value::Float(std::abs(v.AsNumber()));
       return InvalidArgument("abs takes a number, not " + v.TypeName());
     }},
    {"attr",
     [](const Value& v, const Arguments& args, Runtime* rt) -> Result<Value> {
       KVS_ASSIGN_OR_RETURN(const std::string name, args.Text(0, "name", ""));
       // Unlike value.name this never looks into a dict.
       if (v.IsDict() && !HasMethod(v, name)) return Value::Undefined("'dict object' has no attribute '" + name + "'");
       return GetAttribute(v, name, rt);
     }},
    {"capitalize", [](const Value& v, const Arguments&,
                      Runtime* rt) { return OnText(v, rt, [](const std::string& t) { return Capitalize(t); }); }},
    {"count", kLength},
    {"d", kDefault},
    {"default", kDefault},
    {"dictsort", DictSort},
    {"e", kEscape},
    {"escape", kEscape},
    {"first", [](const Value& v, const Arguments&, Runtime* rt) { return End(v, true, rt); }},
    {"float", ToFloat},
    {"indent", Indent},
    {"int", ToInt},
    {"items",
     [](const Value& v, const Arguments&, Runtime* rt) -> Result<Value> {
       if (v.IsUndefined()) return Value::Sequence({});
       if (!v.IsDict()) return InvalidArgument("Can only get item pairs from a mapping.");
       return CallMethod(v, "items", {}, rt);
     }},
    {"join", Join},
    {"last", [](const Value& v, const Arguments&, Runtime* rt) { return End(v, false, rt); }},
    {"length", kLength},
    {"list",
     [](const Value& v, const Arguments&, Runtime* rt) -> Result<Value> {
       KVS_ASSIGN_OR_RETURN(auto items, Iterate(v, &rt->budget));
       return Value::Sequence(std::move(items));
     }},
    {"lower", [](const Value& v, const Arguments&,
                 Runtime* rt) { return OnText(v, rt, [](const std::string& t) { return ToLower(t); }); }},
    {"map", Map},
    {"max", [](const Value& v, const Arguments& args, Runtime* rt) { return Extreme(v, args, 1, rt); }},
    {"min", [](const Value& v, const Arguments& args, Runtime* rt) { return Extreme(v, args, -1, rt); }},
    {"reject", [](const Value& v, const Arguments& args, Runtime* rt) { return Pick(v, args, false, false, rt); }},
    {"rejectattr", [](const Value& v, const Arguments& args, Runtime* rt) { return Pick(v, args, true, false, rt); }},
    {"replace",
     [](const Value& v, const Arguments& args, Runtime* rt) -> Result<Value> {
       KVS_ASSIGN_OR_RETURN(const std::string text, ToText(v, &rt->budget));
       if (args.Get(1, "new") == nullptr) return InvalidArgument("replace takes two str");
       KVS_ASSIGN_OR_RETURN(const std::string from, args.Text(0, "old", ""));
       KVS_ASSIGN_OR_RETURN(const std::string to, args.Text(1, "new", ""));
       KVS_ASSIGN_OR_RETURN(const std::int64_t count, args.Int(2, "count", -1));
       return Wrap(ReplaceAll(text, from, to, count, &rt->budget));
     }},
    {"reverse", [](const Value& v, const Arguments&, Runtime* rt) { return Reverse(v, rt); }},
    {"round",
     [](const Value& v, const Arguments& args, Runtime*) -> Result<Value> {
       if (!v.IsNumber()) return InvalidArgument("round takes a number, not " + v.TypeName());
       KVS_ASSIGN_OR_RETURN(const std::int64_t digits, args.Int(0, "precision", 0));
       KVS_ASSIGN_OR_RETURN(const std::string method, args.Text(1, "method", "common"));
       const double scale = std::pow(10.0, static_cast<double>(std::clamp<std::int64_t>(digits, -300, 300)));
       const double scaled = v.AsNumber() * scale;
       if (v.IsInt() && method == "common") return Value::Int(v.AsInt());
       const double rounded = method == "ceil"    ? std::ceil(scaled)
                              : method == "floor" ? std::floor(scaled)
                                                  : std::nearbyint(scaled);
       return Value::Float(rounded / scale);
     }},
    {"safe", [](const Value& v, const Arguments&, Runtime* rt) { return Wrap(ToText(v, &rt->budget)); }},
    {"select", [](const Value& v, const Arguments& args, Runtime* rt) { return Pick(v, args, false, true, rt); }},
    {"selectattr", [](const Value& v, const Arguments& args, Runtime* rt) { return Pick(v, args, true, true, rt); }},
    {"sort", Sort},
    {"string", [](const Value& v, const Arguments&, Runtime* rt) { return Wrap(ToText(v, &rt->budget)); }},
    {"sum", Sum},
    {"title", [](const Value& v, const Arguments&, Runtime* rt) { return OnText(v, rt, TitleWords); }},
    {"tojson", ToJsonFilter},
    {"trim",
     [](const Value& v, const Arguments& args, Runtime* rt) -> Result<Value> {
       const Value* chars = args.Get(0, "chars");
       const bool given = chars != nullptr && chars->IsString();
       if (given && chars->AsString().empty()) return OnText(v, rt, [](const std::string& t) { return t; });
       return OnText(v, rt,
                     [&](const std::string& t) { return Strip(t, given ? chars->AsString() : "", Side::kBoth); });
     }},
    {"unique", Unique},
    {"upper", [](const Value& v, const Arguments&,
                 Runtime* rt) { return OnText(v, rt, [](const std::string& t) { return ToUpper(t); }); }},
};

// The order of the value and the test's argument.
Result<int> Order(const Value& v, const Arguments& args, Runtime* rt) {
  const Value* other = args.Get(0, "");
  if (other == nullptr) return InvalidArgument("this test takes a value to compare with");
  return Compare(v, *other, &rt->budget);
}

Result<bool> Less(const Value& v, const Arguments& args, Runtime* rt) {
  KVS_ASSIGN_OR_RETURN(const int order, Order(v, args, rt));
  return order < 0;
}

Result<bool> LessOrEqual(const Value& v, const Arguments& args, Runtime* rt) {
  KVS_ASSIGN_OR_RETURN(const int order, Order(v, args, rt));
  return order <= 0;
}

Result<bool> Greater(const Value& v, const Arguments& args, Runtime* rt) {
  KVS_ASSIGN_OR_RETURN(const int order, Order(v, args, rt));
  return order > 0;
}

Result<bool> GreaterOrEqual(const Value& v, const Arguments& args, Runtime* rt) {
  KVS_ASSIGN_OR_RETURN(const int order, Order(v, args, rt));
  return order >= 0;
}

Result<bool> Same(const Value& v, const Arguments& args, Runtime* rt) {
  const Value* other = args.Get(0, "");
  if (other == nullptr) return InvalidArgument("this test takes a value to compare with");
  return Equal(v, *other, &rt->budget);
}

Result<bool> Differs(const Value& v, const Arguments& args, Runtime* rt) {
  KVS_ASSIGN_OR_RETURN(const bool same, Same(v, args, rt));
  return !same;
}

Result<bool> Divides(const Value& v, std::int64_t by, std::int64_t remainder) {
  if (!v.IsInt()) return InvalidArgument("this test takes an integer, not " + v.TypeName());
  if (by == 0) return InvalidArgument("division by zero");
  return by == -1 || std::abs(v.AsInt() % by) == remainder;
}

// One of the two is set.
struct NamedTest {
  std::string_view name;
  Test holds;
  bool (*is)(const Value&) = nullptr;  // a property of the value alone
};

constexpr NamedTest kTests[] = {
    {"!=", Differs},
    {"<", Less},
    {"<=", LessOrEqual},
    {"==", Same},
    {">", Greater},
    {">=", GreaterOrEqual},
    {"boolean", nullptr, [](const Value& v) { return v.kind() == Kind::kBool; }},
    {"callable", nullptr, [](const Value& v) { return v.kind() == Kind::kObject && v.AsObject()->IsCallable(); }},
    {"defined", nullptr, [](const Value& v) { return !v.IsUndefined(); }},
    {"divisibleby",
     [](const Value& v, const Arguments& args, Runtime*) -> Result<bool> {
       KVS_ASSIGN_OR_RETURN(const std::int64_t by, args.Int(0, "num", 0));
       return Divides(v, by, 0);
     }},
    {"eq", Same},
    {"equalto", Same},
    {"even", [](const Value& v, const Arguments&, Runtime*) { return Divides(v, 2, 0); }},
    {"false", nullptr, [](const Value& v) { return v.kind() == Kind::kBool && !v.AsBool(); }},
    {"float", nullptr, [](const Value& v) { return v.kind() == Kind::kFloat; }},
    {"ge", GreaterOrEqual},
    {"greaterthan", Greater},
    {"gt", Greater},
    {"in",
     [](const Value& v, const Arguments& args, Runtime* rt) -> Result<bool> {
       const Value* seq = args.Get(0, "seq");
       if (seq == nullptr) return InvalidArgument("this test takes a sequence");
       return Contains(*seq, v, rt);
     }},
    {"integer", nullptr, [](const Value& v) { return v.kind() == Kind::kInt; }},
    {"iterable", nullptr, [](const Value& v) { return v.IsString() || v.IsList() || v.IsDict() || v.IsUndefined(); }},
    {"le", LessOrEqual},
    {"lessthan", Less},
    {"lower",
     [](const Value& v, const Arguments&, Runtime* rt) -> Result<bool> {
       KVS_ASSIGN_OR_RETURN(const std::string text, ToText(v, &rt->budget));
       return ToLower(text) == text && ToUpper(text) != text;
     }},
    {"lt", Less},
    {"mapping", nullptr, [](const Value& v) { return v.IsDict(); }},
    {"ne", Differs},
    {"none", nullptr, [](const Value& v) { return v.IsNone(); }},
    {"number", nullptr, [](const Value& v) { return v.IsNumber(); }},
    {"odd", [](const Value& v, const Arguments&, Runtime*) { return Divides(v, 2, 1); }},
    {"sameas", Same},
    {"sequence", nullptr, [](const Value& v) { return v.IsString() || v.IsList() || v.IsDict() || v.IsUndefined(); }},
    {"string", nullptr, [](const Value& v) { return v.IsString(); }},
    {"true", nullptr, [](const Value& v) { return v.kind() == Kind::kBool && v.AsBool(); }},
    {"undefined", nullptr, [](const Value& v) { return v.IsUndefined(); }},
    {"upper",
     [](const Value& v, const Arguments&, Runtime* rt) -> Result<bool> {
       KVS_ASSIGN_OR_RETURN(const std::string text, ToText(v, &rt->budget));
       return ToUpper(text) == text && ToLower(text) != text;
     }},
};

template <typename Table>
auto* Find(const Table& table, std::string_view name) {
  const auto it = std::find_if(std::begin(table), std::end(table), [&](const auto& row) { return row.name == name; });
  return it == std::end(table) ? nullptr : &*it;
}

}  // namespace

bool IsFilter(std::string_view name) { return Find(kFilters, name) != nullptr; }

Result<Value> ApplyFilter(const std::string& name, const Value& value, const Arguments& arguments, Runtime* runtime) {
  KVS_RETURN_IF_ERROR(runtime->budget.Charge(1));
  const NamedFilter* filter = Find(kFilters, name);
  if (filter == nullptr) return InvalidArgument("unknown filter '" + name + "'");
  return filter->apply(value, arguments, runtime);
}

bool IsTest(std::string_view name) { return Find(kTests, name) != nullptr; }

Result<bool> ApplyTest(const std::string& name, const Value& value, const Arguments& arguments, Runtime* runtime) {
  KVS_RETURN_IF_ERROR(runtime->budget.Charge(1));
  const NamedTest* test = Find(kTests, name);
  if (test == nullptr) return InvalidArgument("unknown test '" + name + "'");
  if (test->is != nullptr) return test->is(value);
  return test->holds(value, arguments, runtime);
}

}  // namespace kvshare::runtime::jinja

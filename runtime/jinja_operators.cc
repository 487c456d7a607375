// Attributes, items, slices, arithmetic and global functions: Python's rules for them, as Jinja applies them.
#include <algorithm>
#include <cmath>
#include <ctime>

#include "libkvshare/core/status_macros.h"
#include "runtime/jinja_builtins.h"
#include "runtime/utf8.h"

namespace kvshare::runtime::jinja {
namespace {

constexpr std::int64_t kMaxRange = 100'000;  // as Jinja's sandbox has it

Status WrongOperands(const std::string& op, const Value& a, const Value& b) {
  if (a.IsUndefined()) return InvalidArgument(a.WhyUndefined());
  if (b.IsUndefined()) return InvalidArgument(b.WhyUndefined());
  return InvalidArgument("unsupported operand types for " + op + ": '" + a.TypeName() + "' and '" + b.TypeName() + "'");
}

Status Overflow() { return InvalidArgument("an integer beyond 64 bits"); }

Result<Value> IntegerPower(std::int64_t base, std::int64_t exponent) {
  if (exponent < 0) return Value::Float(std::pow(static_cast<double>(base), static_cast<double>(exponent)));
  std::int64_t out = 1;
  while (exponent > 0) {
    if ((exponent & 1) != 0 && __builtin_mul_overflow(out, base, &out)) return Overflow();
    exponent >>= 1;
    if (exponent > 0 && __builtin_mul_overflow(base, base, &base)) return Overflow();
  }
  return Value::Int(out);
}

Result<Value> IntegerArithmetic(const std::string& op, std::int64_t a, std::int64_t b) {
  std::int64_t out = 0;
  if (op == "+") return __builtin_add_overflow(a, b, &out) ? Result<Value>(Overflow()) : Value::Int(out);
  if (op == "-") return __builtin_sub_overflow(a, b, &out) ? Result<Value>(Overflow()) : Value::Int(out);
  if (op == "*") return __builtin_mul_overflow(a, b, &out) ? Result<Value>(Overflow()) : Value::Int(out);
  if (op == "**") return IntegerPower(a, b);
  if (b == 0) return InvalidArgument("division by zero");
  if (op == "/") return Value::Float(static_cast<double>(a) / static_cast<double>(b));
  if (b == -1) {  // INT64_MIN / -1 does not fit
    if (op == "%") return Value::Int(0);
    return __builtin_sub_overflow(std::int64_t{0}, a, &out) ? Result<Value>(Overflow()) : Value::Int(out);
  }
  // Python rounds towards minus infinity, and its remainder has the divisor's sign.
  const bool adjust = a % b != 0 && ((a < 0) != (b < 0));
  return op == "//" ? Value::Int(a / b - (adjust ? 1 : 0)) : Value::Int(a % b + (adjust ? b : 0));
}

Result<Value> FloatArithmetic(const std::string& op, double a, double b) {
  if (op == "+") return Value::Float(a + b);
  if (op == "-") return Value::Float(a - b);
  if (op == "*") return Value::Float(a * b);
  if (op == "**") return Value::Float(std::pow(a, b));
  if (b == 0) return InvalidArgument("division by zero");
  if (op == "/") return Value::Float(a / b);
  if (op == "//") return Value::Float(std::floor(a / b));
  const double remainder = std::fmod(a, b);
  return Value::Float(remainder != 0 && (remainder < 0) != (b < 0) ? remainder + b : remainder);
}

// "ab" * 2 and [x] * 2.
Result<Value> Repeat(const Value& what, std::int64_t times, Runtime* runtime) {
  const std::size_t size = what.IsString() ? what.AsString().size() : what.AsList().items.size();
  const std::size_t n = times <= 0 ? 0 : static_cast<std::size_t>(times);
  if (n > 0 && size > Budget::kStringBytes / n) return ResourceExhausted("a repetition makes too much");
  KVS_RETURN_IF_ERROR(runtime->budget.Charge(static_cast<std::int64_t>(size * n)));
  if (what.IsString()) {
    std::string out;
    if (size > 0) {
      for (std::size_t i = 0; i < n; ++i) out += what.AsString();
    }
    return Value::Str(std::move(out));
  }
  std::vector<Value> items;
  if (size > 0) {
    for (std::size_t i = 0; i < n; ++i)
      items.insert(items.end(), what.AsList().items.begin(), what.AsList().items.end());
  }
  return Value::Sequence(std::move(items), what.AsList().is_tuple);
}

Result<Value> Range(const Arguments& arguments, Runtime* runtime) {
  for (const Value& v : arguments.positional) {
    if (!v.IsInt()) return InvalidArgument("range takes integers, not " + v.TypeName());
  }
  const auto& given = arguments.positional;
  if (given.empty() || given.size() > 3 || !arguments.keywords.empty())
    return InvalidArgument("range takes 1 to 3 integers");
  const std::int64_t begin = given.size() > 1 ? given[0].AsInt() : 0;
  const std::int64_t end = given.size() > 1 ? given[1].AsInt() : given[0].AsInt();
  const std::int64_t step = given.size() > 2 ? given[2].AsInt() : 1;
  if (step == 0) return InvalidArgument("range takes no step of 0");
  std::vector<Value> items;
  for (std::int64_t i = begin; step > 0 ? i < end : i > end;) {
    if (items.size() >= static_cast<std::size_t>(kMaxRange)) {
      return ResourceExhausted("a range of more than " + std::to_string(kMaxRange) + " items");
    }
    items.push_back(Value::Int(i));
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  KVS_RETURN_IF_ERROR(runtime->budget.Charge(static_cast<std::int64_t>(items.size()) * 2));
  return Value::Sequence(std::move(items));
}

// namespace(dict, a=1, ...) and dict(...): the entries given.
Status CollectEntries(const Arguments& arguments, Runtime* runtime, Dict* out) {
  for (const Value& v : arguments.positional) {
    if (!v.IsDict()) return InvalidArgument("expected a dict, not " + v.TypeName());
    KVS_RETURN_IF_ERROR(runtime->budget.Charge(static_cast<std::int64_t>(v.AsDict().entries.size()) * 2));
    for (const auto& [key, value] : v.AsDict().entries) KVS_RETURN_IF_ERROR(out->Set(key, value));
  }
  for (const auto& [name, value] : arguments.keywords) KVS_RETURN_IF_ERROR(out->Set(Value::Str(name), value));
  return OkStatus();
}

Result<Value> StrftimeNow(const Arguments& arguments, Runtime* runtime) {
  KVS_ASSIGN_OR_RETURN(const std::string format, arguments.Text(0, "format", ""));
  if (format.size() > 256) return InvalidArgument("strftime_now: the format is too long");
  KVS_RETURN_IF_ERROR(runtime->budget.ChargeBytes(4096));
  const std::time_t now = std::time(nullptr);
  std::tm local{};
  localtime_r(&now, &local);
  char buffer[4096];
  const std::size_t n = std::strftime(buffer, sizeof buffer, format.c_str(), &local);
  return Value::Str(std::string(buffer, n));
}

Result<Value> RaiseException(const Arguments& arguments, Runtime* runtime) {
  const Value* message = arguments.Get(0, "message");
  KVS_ASSIGN_OR_RETURN(std::string text, message == nullptr ? std::string("the chat template refuses these messages")
                                                            : ToText(*message, &runtime->budget));
  runtime->raised = true;
  return InvalidArgument(std::move(text));
}

Result<Value> NewNamespace(const Arguments& arguments, Runtime* runtime) {
  Dict entries;
  KVS_RETURN_IF_ERROR(CollectEntries(arguments, runtime, &entries));
  auto* ns = runtime->New<Namespace>();
  for (const auto& [key, value] : entries.entries) {
    if (!key.IsString()) return InvalidArgument("the names in a namespace are strings");
    KVS_RETURN_IF_ERROR(ns->Set(key.AsString(), value));
  }
  return Value::Of(ns);
}

Result<Value> NewDict(const Arguments& arguments, Runtime* runtime) {
  Dict entries;
  KVS_RETURN_IF_ERROR(CollectEntries(arguments, runtime, &entries));
  return Value::Mapping(std::move(entries));
}

}  // namespace

Value Namespace::Attribute(std::string_view name, Runtime* runtime) {
  const Value* found = values_.Find(name);
  return found != nullptr ? *found : Object::Attribute(name, runtime);
}

Result<Value> GetAttribute(const Value& value, const std::string& name, Runtime* runtime) {
  KVS_RETURN_IF_ERROR(runtime->budget.Charge(1));
  if (value.IsUndefined()) return InvalidArgument(value.WhyUndefined());
  if (HasMethod(value, name)) {
    return Value::Of(runtime->New<Function>(
        [value, name](const Arguments& arguments, Runtime* rt) { return CallMethod(value, name, arguments, rt); }));
  }
  if (value.kind() == Kind::kObject) return value.AsObject()->Attribute(name, runtime);
  if (value.IsDict()) {
    if (const Value* found = value.AsDict().Find(name)) return *found;
  }
  return Value::Undefined("'" + value.TypeName() + " object' has no attribute '" + name + "'");
}

Result<Value> GetItem(const Value& value, const Value& key, Runtime* runtime) {
  KVS_RETURN_IF_ERROR(runtime->budget.Charge(1));
  if (value.IsUndefined()) return InvalidArgument(value.WhyUndefined());
  if (value.IsDict()) {
    if (const Value* found = value.AsDict().Find(key)) return *found;
  } else if (value.IsList() && key.IsInt()) {
    const auto& items = value.AsList().items;
    const std::int64_t n = static_cast<std::int64_t>(items.size());
    const std::int64_t i = key.AsInt() < 0 ? key.AsInt() + n : key.AsInt();
    if (i >= 0 && i < n) return items[static_cast<std::size_t>(i)];
  } else if (value.IsString() && key.IsInt()) {
    const Value one_more = Value::Int(key.AsInt() == -1          ? INT64_MAX
                                      : key.AsInt() == INT64_MAX ? INT64_MAX
                                                                 : key.AsInt() + 1);
    KVS_ASSIGN_OR_RETURN(Value character, GetSlice(value, key, one_more, Value::None(), runtime));
    const auto n = static_cast<std::int64_t>(CountCodePoints(value.AsString()));
    if (key.AsInt() >= -n && key.AsInt() < n) return character;
  }
  if (key.IsString()) return GetAttribute(value, key.AsString(), runtime);
  KVS_ASSIGN_OR_RETURN(const std::string text, ToRepr(key, &runtime->budget));
  return Value::Undefined("'" + value.TypeName() + " object' has no element " + text.substr(0, 80));
}

Result<Value> GetSlice(const Value& value, const Value& begin, const Value& end, const Value& step, Runtime* runtime) {
  if (value.IsUndefined()) return InvalidArgument(value.WhyUndefined());
  if (!value.IsString() && !value.IsList())
    return Value::Undefined("'" + value.TypeName() + "' object cannot be sliced");
  for (const Value* v : {&begin, &end, &step}) {
    if (!v->IsInt() && !v->IsNone() && !v->IsUndefined()) return InvalidArgument("slice indices must be integers");
  }
  const std::int64_t by = step.IsInt() ? step.AsInt() : 1;
  if (by == 0) return InvalidArgument("slice step cannot be zero");
  const auto n =
      static_cast<std::int64_t>(value.IsString() ? CountCodePoints(value.AsString()) : value.AsList().items.size());
  // As PySlice_AdjustIndices: positions before the first and after the last that a step in this direction can meet.
  const auto clamp = [&](const Value& v, std::int64_t fallback) {
    if (!v.IsInt()) return fallback;
    std::int64_t i = v.AsInt();
    if (i < 0) i = i < -n ? -1 : i + n;
    if (v.AsInt() < 0 && i < 0) return by < 0 ? std::int64_t{-1} : std::int64_t{0};
    return std::min(i, by < 0 ? n - 1 : n);
  };
  const std::int64_t from = clamp(begin, by < 0 ? n - 1 : 0);
  const std::int64_t to = clamp(end, by < 0 ? -1 : n);
  std::vector<std::int64_t> picks;
  KVS_RETURN_IF_ERROR(
      runtime->budget.Charge(n / static_cast<std::int64_t>(value.IsString() ? Budget::kBytesPerStep : 1)));
  if (value.IsString() && by == 1) {
    const std::string& text = value.AsString();
    std::size_t first = 0, i = 0;
    std::int64_t at = 0;
    for (; i < text.size() && at < from; ++at) i += Utf8Length(text[i]);
    for (first = i; i < text.size() && at < to; ++at) i += Utf8Length(text[i]);
    return Value::Str(text.substr(first, i - first));
  }
  for (std::int64_t i = from; by > 0 ? i < to : i > to;) {
    picks.push_back(i);
    if (__builtin_add_overflow(i, by, &i)) break;
  }
  KVS_RETURN_IF_ERROR(runtime->budget.Charge(static_cast<std::int64_t>(picks.size())));
  if (value.IsList()) {
    std::vector<Value> items;
    for (const std::int64_t i : picks) items.push_back(value.AsList().items[static_cast<std::size_t>(i)]);
    return Value::Sequence(std::move(items), value.AsList().is_tuple);
  }
  std::vector<std::string_view> characters;
  for (std::string_view rest = value.AsString(); !rest.empty(); rest.remove_prefix(Utf8Length(rest[0]))) {
    characters.push_back(rest.substr(0, Utf8Length(rest[0])));
  }
  KVS_RETURN_IF_ERROR(runtime->budget.Charge(n));
  std::string out;
  for (const std::int64_t i : picks) out += characters[static_cast<std::size_t>(i)];
  return Value::Str(std::move(out));
}

Result<Value> Arithmetic(const std::string& op, const Value& a, const Value& b, Runtime* runtime) {
  if (a.IsInt() && b.IsInt()) return IntegerArithmetic(op, a.AsInt(), b.AsInt());
  if (a.IsNumber() && b.IsNumber()) return FloatArithmetic(op, a.AsNumber(), b.AsNumber());
  if (op == "+" && a.IsString() && b.IsString()) {
    KVS_RETURN_IF_ERROR(runtime->budget.ChargeBytes(a.AsString().size() + b.AsString().size()));
    return Value::Str(a.AsString() + b.AsString());
  }
  if (op == "+" && a.IsList() && b.IsList() && a.AsList().is_tuple == b.AsList().is_tuple) {
    std::vector<Value> items = a.AsList().items;
    items.insert(items.end(), b.AsList().items.begin(), b.AsList().items.end());
    KVS_RETURN_IF_ERROR(runtime->budget.Charge(static_cast<std::int64_t>(items.size())));
    return Value::Sequence(std::move(items), a.AsList().is_tuple);
  }
  if (op == "*" && (a.IsString() || a.IsList()) && b.IsInt()) return Repeat(a, b.AsInt(), runtime);
  if (op == "*" && (b.IsString() || b.IsList()) && a.IsInt()) return Repeat(b, a.AsInt(), runtime);
  if (op == "%" && a.IsString()) return InvalidArgument("formatting with % is outside the subset; use ~");
  return WrongOperands(op, a, b);
}

Result<bool> Contains(const Value& haystack, const Value& needle, Runtime* runtime) {
  if (haystack.IsString()) {
    if (needle.IsUndefined()) return InvalidArgument(needle.WhyUndefined());
    if (!needle.IsString())
      return InvalidArgument("'in <string>' requires string as left operand, not " + needle.TypeName());
    KVS_RETURN_IF_ERROR(runtime->budget.ChargeBytes(haystack.AsString().size()));
    return haystack.AsString().find(needle.AsString()) != std::string::npos;
  }
  if (haystack.IsDict()) return haystack.AsDict().Find(needle) != nullptr;
  KVS_ASSIGN_OR_RETURN(const auto items, Iterate(haystack, &runtime->budget));
  for (const Value& item : items) {
    KVS_ASSIGN_OR_RETURN(const bool same, Equal(item, needle, &runtime->budget));
    if (same) return true;
  }
  return false;
}

Value GlobalFunction(std::string_view name, Runtime* runtime) {
  using Body = Result<Value> (*)(const Arguments&, Runtime*);
  static constexpr std::pair<std::string_view, Body> kGlobals[] = {
      {"range", Range},
      {"namespace", NewNamespace},
      {"dict", NewDict},
      {"raise_exception", RaiseException},
      {"strftime_now", StrftimeNow},
  };
  for (const auto& [known, body] : kGlobals) {
    if (name == known) return Value::Of(runtime->New<Function>(body));
  }
  return Value::Undefined("'" + std::string(name) + "' is undefined");
}

const Value* Arguments::Get(std::size_t position, std::string_view name) const {
  if (position < positional.size()) return &positional[position];
  for (const auto& [keyword, value] : keywords) {
    if (!name.empty() && keyword == name) return &value;
  }
  return nullptr;
}

Result<std::string> Arguments::Text(std::size_t position, std::string_view name, std::string fallback) const {
  const Value* v = Get(position, name);
  if (v == nullptr) return fallback;
  if (!v->IsString()) return InvalidArgument("expected a str, not " + v->TypeName());
  return v->AsString();
}

Result<std::int64_t> Arguments::Int(std::size_t position, std::string_view name, std::int64_t fallback) const {
  const Value* v = Get(position, name);
  if (v == nullptr || v->IsNone()) return fallback;
  if (!v->IsInt()) return InvalidArgument("expected an integer, not " + v->TypeName());
  return v->AsInt();
}

bool Arguments::Flag(std::size_t position, std::string_view name, bool fallback) const {
  const Value* v = Get(position, name);
  return v == nullptr ? fallback : v->Truthy();
}

}  // namespace kvshare::runtime::jinja

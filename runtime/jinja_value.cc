#include "runtime/jinja_value.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "libkvshare/core/status_macros.h"
#include "runtime/unicode.h"
#include "runtime/utf8.h"

namespace kvshare::runtime::jinja {
namespace {

// Equal keys have equal texts: 1, 1.0 and True are one key, as in Python.
std::string KeyOf(const Value& key) {
  switch (key.kind()) {
    case Kind::kString: return "s" + key.AsString();
    case Kind::kNone: return "n";
    case Kind::kBool:
    case Kind::kInt: return "i" + std::to_string(key.AsInt());
    case Kind::kFloat: {
      const double d = key.AsNumber();
      if (d == std::floor(d) && std::abs(d) < 9e18) return "i" + std::to_string(static_cast<std::int64_t>(d));
      return "f" + std::to_string(d);
    }
    default: return {};
  }
}

// repr() of a float: the shortest digits that read back the same.
std::string FloatText(double d) {
  if (std::isnan(d)) return "nan";
  if (std::isinf(d)) return d > 0 ? "inf" : "-inf";
  char buffer[64];
  const auto scientific = std::to_chars(buffer, buffer + sizeof buffer, d, std::chars_format::scientific);
  const std::string_view text(buffer, static_cast<std::size_t>(scientific.ptr - buffer));
  const int exponent = std::atoi(std::string(text.substr(text.find('e') + 1)).c_str());
  if (exponent < -4 || exponent >= 16) return std::string(text);
  const auto fixed = std::to_chars(buffer, buffer + sizeof buffer, d, std::chars_format::fixed);
  std::string out(buffer, fixed.ptr);
  if (out.find('.') == std::string::npos) out += ".0";
  return out;
}

void AppendHex(const char* format, char32_t c, std::string* out) {
  char buffer[16];
  std::snprintf(buffer, sizeof buffer, format, static_cast<unsigned>(c));
  *out += buffer;
}

void AppendQuoted(std::string_view text, std::string* out) {
  const char quote = text.find('\'') != std::string_view::npos && text.find('"') == std::string_view::npos ? '"' : '\'';
  *out += quote;
  while (!text.empty()) {
    const Utf8Step step = DecodeUtf8(text);
    const char32_t c = step.code_point;
    if (c == static_cast<char32_t>(quote) || c == '\\') {
      *out += '\\';
      *out += static_cast<char>(c);
    } else if (c == '\n') {
      *out += "\\n";
    } else if (c == '\r') {
      *out += "\\r";
    } else if (c == '\t') {
      *out += "\\t";
    } else if (c < 0x80 ? (c >= ' ' && c < 0x7F) : IsPrintable(c)) {
      out->append(text.substr(0, step.length));
    } else {
      AppendHex(c < 0x100 ? "\\x%02x" : c < 0x10000 ? "\\u%04x" : "\\U%08x", c, out);
    }
    text.remove_prefix(step.length);
  }
  *out += quote;
}

void AppendJsonString(std::string_view text, bool ensure_ascii, std::string* out) {
  *out += '"';
  while (!text.empty()) {
    const Utf8Step step = DecodeUtf8(text);
    const char32_t c = step.code_point;
    switch (c) {
      case '"': *out += "\\\""; break;
      case '\\': *out += "\\\\"; break;
      case '\n': *out += "\\n"; break;
      case '\r': *out += "\\r"; break;
      case '\t': *out += "\\t"; break;
      case '\f': *out += "\\f"; break;
      case '\b': *out += "\\b"; break;
      default:
        if (c < 0x20) {
          AppendHex("\\u%04x", c, out);
        } else if (c < 0x80 || !ensure_ascii) {
          out->append(text.substr(0, step.length));
        } else if (c < 0x10000) {
          AppendHex("\\u%04x", c, out);
        } else {
          AppendHex("\\u%04x", 0xD800 + ((c - 0x10000) >> 10), out);
          AppendHex("\\u%04x", 0xDC00 + ((c - 0x10000) & 0x3FF), out);
        }
    }
    text.remove_prefix(step.length);
  }
  *out += '"';
}

Status AppendRepr(const Value& value, Budget* budget, std::string* out) {
  KVS_RETURN_IF_ERROR(budget->Charge(1));
  const std::size_t before = out->size();
  switch (value.kind()) {
    case Kind::kUndefined: *out += "Undefined"; break;
    case Kind::kNone: *out += "None"; break;
    case Kind::kBool: *out += value.AsBool() ? "True" : "False"; break;
    case Kind::kInt: *out += std::to_string(value.AsInt()); break;
    case Kind::kFloat: *out += FloatText(value.AsNumber()); break;
    case Kind::kString: AppendQuoted(value.AsString(), out); break;
    case Kind::kObject: *out += "<" + value.TypeName() + ">"; break;
    case Kind::kList: {
      const List& list = value.AsList();
      *out += list.is_tuple ? '(' : '[';
      for (std::size_t i = 0; i < list.items.size(); ++i) {
        if (i > 0) *out += ", ";
        KVS_RETURN_IF_ERROR(AppendRepr(list.items[i], budget, out));
      }
      if (list.is_tuple && list.items.size() == 1) *out += ',';
      *out += list.is_tuple ? ')' : ']';
      break;
    }
    case Kind::kDict: {
      *out += '{';
      bool first = true;
      for (const auto& [key, item] : value.AsDict().entries) {
        if (!first) *out += ", ";
        first = false;
        KVS_RETURN_IF_ERROR(AppendRepr(key, budget, out));
        *out += ": ";
        KVS_RETURN_IF_ERROR(AppendRepr(item, budget, out));
      }
      *out += '}';
      break;
    }
  }
  if (value.kind() == Kind::kString) KVS_RETURN_IF_ERROR(budget->ChargeBytes(out->size() - before));
  if (out->size() > Budget::kStringBytes) return budget->ChargeBytes(out->size());
  return OkStatus();
}

class JsonWriter {
 public:
  JsonWriter(const JsonStyle& style, Budget* budget) : style_(style), budget_(budget) {}

  Status Write(const Value& value, int level) {
    KVS_RETURN_IF_ERROR(budget_->Charge(1));
    switch (value.kind()) {
      case Kind::kNone: out_ += "null"; break;
      case Kind::kBool: out_ += value.AsBool() ? "true" : "false"; break;
      case Kind::kInt: out_ += std::to_string(value.AsInt()); break;
      case Kind::kFloat: out_ += Float(value.AsNumber()); break;
      case Kind::kString:
        KVS_RETURN_IF_ERROR(budget_->ChargeBytes(value.AsString().size()));
        AppendJsonString(value.AsString(), style_.ensure_ascii, &out_);
        break;
      case Kind::kList: {
        const auto& items = value.AsList().items;
        out_ += '[';
        for (std::size_t i = 0; i < items.size(); ++i) {
          Separate(i > 0, level + 1);
          KVS_RETURN_IF_ERROR(Write(items[i], level + 1));
        }
        Close(items.empty(), level, ']');
        break;
      }
      case Kind::kDict: KVS_RETURN_IF_ERROR(WriteDict(value.AsDict(), level)); break;
      case Kind::kUndefined:
      case Kind::kObject: return InvalidArgument("a value of type " + value.TypeName() + " is not JSON serializable");
    }
    if (out_.size() > Budget::kStringBytes) return budget_->ChargeBytes(out_.size());
    return OkStatus();
  }

  std::string Take() { return std::move(out_); }

 private:
  static std::string Float(double d) {
    if (std::isnan(d)) return "NaN";
    if (std::isinf(d)) return d > 0 ? "Infinity" : "-Infinity";
    return FloatText(d);
  }

  Status WriteDict(const Dict& dict, int level) {
    std::vector<const std::pair<Value, Value>*> entries;
    for (const auto& entry : dict.entries) entries.push_back(&entry);
    if (style_.sort_keys) {
      Status failed;
      std::stable_sort(entries.begin(), entries.end(), [&](const auto* a, const auto* b) {
        const auto order = Compare(a->first, b->first, budget_);
        if (!order.ok()) failed = order.status();
        return order.ok() && *order < 0;
      });
      KVS_RETURN_IF_ERROR(failed);
    }
    out_ += '{';
    bool first = true;
    for (const auto* entry : entries) {
      Separate(!first, level + 1);
      first = false;
      const Value& key = entry->first;
      std::string text;
      switch (key.kind()) {
        case Kind::kString: text = key.AsString(); break;
        case Kind::kNone: text = "null"; break;
        case Kind::kBool: text = key.AsBool() ? "true" : "false"; break;
        case Kind::kInt: text = std::to_string(key.AsInt()); break;
        default: text = Float(key.AsNumber()); break;
      }
      AppendJsonString(text, style_.ensure_ascii, &out_);
      out_ += style_.key_separator;
      KVS_RETURN_IF_ERROR(Write(entry->second, level + 1));
    }
    Close(entries.empty(), level, '}');
    return OkStatus();
  }

  void NewLine(int level) {
    out_ += '\n';
    for (int i = 0; i < level; ++i) out_ += style_.indent;
  }
  void Separate(bool after_another, int level) {
    if (after_another) out_ += style_.item_separator;
    if (style_.pretty) NewLine(level);
  }
  void Close(bool empty, int level, char bracket) {
    if (style_.pretty && !empty) NewLine(level);
    out_ += bracket;
  }

  const JsonStyle& style_;
  Budget* budget_;
  std::string out_;
};

int Sign(double a, double b) { return a < b ? -1 : a > b ? 1 : 0; }

}  // namespace

Status Budget::Charge(std::int64_t steps) {
  left -= steps;
  if (left < 0) return ResourceExhausted("rendering takes more than " + std::to_string(kSteps) + " steps");
  return OkStatus();
}

Status Budget::ChargeBytes(std::size_t bytes) {
  if (bytes > kStringBytes)
    return ResourceExhausted("rendering makes a text of more than " + std::to_string(kStringBytes) + " bytes");
  return Charge(static_cast<std::int64_t>(bytes / kBytesPerStep));
}

Result<Value> Object::Call(const Arguments&, Runtime*) {
  return InvalidArgument("'" + TypeName() + "' object is not callable");
}
Value Object::Attribute(std::string_view name, Runtime*) {
  return Value::Undefined("'" + TypeName() + " object' has no attribute '" + std::string(name) + "'");
}

Value Value::Undefined(std::string why) { return Value(Missing{std::make_shared<const std::string>(std::move(why))}); }

Result<Value> Value::Sequence(std::vector<Value> items, bool is_tuple) {
  List list{.items = std::move(items), .is_tuple = is_tuple};
  for (const Value& item : list.items) list.depth = std::max(list.depth, item.depth() + 1);
  if (list.depth > Budget::kValueDepth) return ResourceExhausted("lists nest too deep");
  return Value(Data(std::make_shared<const List>(std::move(list))));
}

Result<Value> Value::Mapping(Dict dict) {
  for (const auto& entry : dict.entries) dict.depth = std::max(dict.depth, entry.second.depth() + 1);
  if (dict.depth > Budget::kValueDepth) return ResourceExhausted("dicts nest too deep");
  return Value(Data(std::make_shared<const Dict>(std::move(dict))));
}

std::string Value::WhyUndefined() const {
  const Missing& missing = std::get<Missing>(data_);
  return missing.why == nullptr ? "the value is undefined" : *missing.why;
}

bool Value::Truthy() const {
  switch (kind()) {
    case Kind::kUndefined:
    case Kind::kNone: return false;
    case Kind::kBool: return AsBool();
    case Kind::kInt: return AsInt() != 0;
    case Kind::kFloat: return AsNumber() != 0;
    case Kind::kString: return !AsString().empty();
    case Kind::kList: return !AsList().items.empty();
    case Kind::kDict: return !AsDict().entries.empty();
    case Kind::kObject: return true;
  }
  return false;
}

std::string Value::TypeName() const {
  switch (kind()) {
    case Kind::kUndefined: return "Undefined";
    case Kind::kNone: return "NoneType";
    case Kind::kBool: return "bool";
    case Kind::kInt: return "int";
    case Kind::kFloat: return "float";
    case Kind::kString: return "str";
    case Kind::kList: return AsList().is_tuple ? "tuple" : "list";
    case Kind::kDict: return "dict";
    case Kind::kObject: return AsObject()->TypeName();
  }
  return "object";
}

int Value::depth() const { return kind() == Kind::kList ? AsList().depth : kind() == Kind::kDict ? AsDict().depth : 0; }

Status Dict::Set(const Value& key, Value value) {
  const std::string name = KeyOf(key);
  if (name.empty()) return InvalidArgument("unhashable type: '" + key.TypeName() + "'");
  const auto [it, is_new] = index.emplace(name, entries.size());
  if (is_new) {
    entries.emplace_back(key, std::move(value));
  } else {
    entries[it->second].second = std::move(value);
  }
  return OkStatus();
}

const Value* Dict::Find(const Value& key) const {
  const auto it = index.find(KeyOf(key));
  return it == index.end() ? nullptr : &entries[it->second].second;
}

const Value* Dict::Find(std::string_view key) const {
  const auto it = index.find("s" + std::string(key));
  return it == index.end() ? nullptr : &entries[it->second].second;
}

Result<std::string> ToRepr(const Value& value, Budget* budget) {
  std::string out;
  KVS_RETURN_IF_ERROR(AppendRepr(value, budget, &out));
  return out;
}

Result<std::string> ToText(const Value& value, Budget* budget) {
  if (value.IsUndefined()) return std::string();
  if (!value.IsString()) return ToRepr(value, budget);
  KVS_RETURN_IF_ERROR(budget->ChargeBytes(value.AsString().size()));
  return value.AsString();
}

Result<std::string> ToJson(const Value& value, const JsonStyle& style, Budget* budget) {
  JsonWriter writer(style, budget);
  KVS_RETURN_IF_ERROR(writer.Write(value, 0));
  return writer.Take();
}

Result<bool> Equal(const Value& a, const Value& b, Budget* budget) {
  KVS_RETURN_IF_ERROR(budget->Charge(1));
  if (a.IsNumber() && b.IsNumber()) {
    return a.IsInt() && b.IsInt() ? a.AsInt() == b.AsInt() : a.AsNumber() == b.AsNumber();
  }
  if (a.kind() != b.kind()) return false;
  switch (a.kind()) {
    case Kind::kString:
      KVS_RETURN_IF_ERROR(budget->ChargeBytes(std::min(a.AsString().size(), b.AsString().size())));
      return a.AsString() == b.AsString();
    case Kind::kObject: return a.AsObject() == b.AsObject();
    case Kind::kList: {
      const List &x = a.AsList(), &y = b.AsList();
      if (x.items.size() != y.items.size() || x.is_tuple != y.is_tuple) return false;
      for (std::size_t i = 0; i < x.items.size(); ++i) {
        KVS_ASSIGN_OR_RETURN(const bool same, Equal(x.items[i], y.items[i], budget));
        if (!same) return false;
      }
      return true;
    }
    case Kind::kDict: {
      const Dict &x = a.AsDict(), &y = b.AsDict();
      if (x.entries.size() != y.entries.size()) return false;
      for (const auto& [key, item] : x.entries) {
        const Value* other = y.Find(key);
        if (other == nullptr) return false;
        KVS_ASSIGN_OR_RETURN(const bool same, Equal(item, *other, budget));
        if (!same) return false;
      }
      return true;
    }
    default: return true;  // undefined, none
  }
}

Result<int> Compare(const Value& a, const Value& b, Budget* budget) {
  KVS_RETURN_IF_ERROR(budget->Charge(1));
  if (a.IsInt() && b.IsInt()) return a.AsInt() < b.AsInt() ? -1 : a.AsInt() > b.AsInt() ? 1 : 0;
  if (a.IsNumber() && b.IsNumber()) return Sign(a.AsNumber(), b.AsNumber());
  if (a.IsString() && b.IsString()) {
    KVS_RETURN_IF_ERROR(budget->ChargeBytes(std::min(a.AsString().size(), b.AsString().size())));
    return a.AsString().compare(b.AsString());  // UTF-8 sorts as its code points do
  }
  if (a.IsList() && b.IsList() && a.AsList().is_tuple == b.AsList().is_tuple) {
    const auto &x = a.AsList().items, &y = b.AsList().items;
    for (std::size_t i = 0; i < std::min(x.size(), y.size()); ++i) {
      KVS_ASSIGN_OR_RETURN(const bool same, Equal(x[i], y[i], budget));
      if (!same) return Compare(x[i], y[i], budget);
    }
    return x.size() < y.size() ? -1 : x.size() > y.size() ? 1 : 0;
  }
  if (a.IsUndefined()) return InvalidArgument(a.WhyUndefined());
  if (b.IsUndefined()) return InvalidArgument(b.WhyUndefined());
  return InvalidArgument("values of type " + a.TypeName() + " and " + b.TypeName() + " have no order");
}

Result<std::vector<Value>> Iterate(const Value& value, Budget* budget) {
  std::vector<Value> out;
  switch (value.kind()) {
    case Kind::kUndefined: return out;
    case Kind::kList:
      KVS_RETURN_IF_ERROR(budget->Charge(static_cast<std::int64_t>(value.AsList().items.size())));
      return value.AsList().items;
    case Kind::kDict:
      KVS_RETURN_IF_ERROR(budget->Charge(static_cast<std::int64_t>(value.AsDict().entries.size())));
      for (const auto& entry : value.AsDict().entries) out.push_back(entry.first);
      return out;
    case Kind::kString: {
      std::string_view rest = value.AsString();
      KVS_RETURN_IF_ERROR(budget->Charge(static_cast<std::int64_t>(rest.size()) * 4));  // each becomes a string
      while (!rest.empty()) {
        const std::size_t n = DecodeUtf8(rest).length;
        out.push_back(Value::Str(std::string(rest.substr(0, n))));
        rest.remove_prefix(n);
      }
      return out;
    }
    default: return InvalidArgument("'" + value.TypeName() + "' object is not iterable");
  }
}

}  // namespace kvshare::runtime::jinja

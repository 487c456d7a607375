// Values of the Jinja subset: what Python objects a chat template meets, with Python's printing, comparing and JSON.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "kvshare/status.h"

namespace kvshare::runtime::jinja {

// What rendering may cost. Every operation charges what it does, so that no template, whatever its loops and its values
// that share parts, runs or grows without end.
struct Budget {
  static constexpr std::int64_t kSteps = 20'000'000;      // a long conversation takes about 100,000
  static constexpr std::size_t kStringBytes = 32u << 20;  // one string, the output included
  static constexpr std::size_t kBytesPerStep = 16;
  static constexpr int kValueDepth = 128;  // lists in lists; bounds every recursion over a value

  std::int64_t left = kSteps;

  // ResourceExhausted when the budget is spent.
  Status Charge(std::int64_t steps);
  // For a string of `bytes` that comes to be.
  Status ChargeBytes(std::size_t bytes);
};

enum class Kind { kUndefined, kNone, kBool, kInt, kFloat, kString, kList, kDict, kObject };

class Value;
struct List;
struct Dict;

struct Arguments;
struct Runtime;

// Things with identity: namespaces, macros, loops, functions. Owned by the rendering that made them.
class Object {
 public:
  virtual ~Object() = default;
  virtual std::string TypeName() const = 0;
  virtual bool IsCallable() const { return false; }
  virtual Result<Value> Call(const Arguments& arguments, Runtime* runtime);
  // The attribute's value, or undefined.
  virtual Value Attribute(std::string_view name, Runtime* runtime);
};

// Immutable, cheap to copy: lists, dicts and strings are shared.
class Value {
 public:
  Value() = default;  // undefined
  static Value Undefined(std::string why);
  static Value None() { return Value(Nothing{}); }
  static Value Bool(bool b) { return Value(b); }
  static Value Int(std::int64_t i) { return Value(i); }
  static Value Float(double d) { return Value(d); }
  static Value Str(std::string s) { return Value(std::make_shared<const std::string>(std::move(s))); }
  static Value Of(Object* object) { return Value(object); }
  // ResourceExhausted beyond Budget::kValueDepth.
  static Result<Value> Sequence(std::vector<Value> items, bool is_tuple = false);
  static Result<Value> Mapping(Dict dict);

  Kind kind() const { return static_cast<Kind>(data_.index()); }
  bool IsUndefined() const { return kind() == Kind::kUndefined; }
  bool IsNone() const { return kind() == Kind::kNone; }
  bool IsString() const { return kind() == Kind::kString; }
  bool IsList() const { return kind() == Kind::kList; }
  bool IsDict() const { return kind() == Kind::kDict; }
  bool IsInt() const { return kind() == Kind::kInt || kind() == Kind::kBool; }  // as in Python, a bool is one
  bool IsNumber() const { return IsInt() || kind() == Kind::kFloat; }

  // Each requires the kind it names.
  bool AsBool() const { return std::get<bool>(data_); }
  std::int64_t AsInt() const { return kind() == Kind::kBool ? (AsBool() ? 1 : 0) : std::get<std::int64_t>(data_); }
  double AsNumber() const { return kind() == Kind::kFloat ? std::get<double>(data_) : static_cast<double>(AsInt()); }
  const std::string& AsString() const { return *std::get<std::shared_ptr<const std::string>>(data_); }
  const List& AsList() const { return *std::get<std::shared_ptr<const List>>(data_); }
  const Dict& AsDict() const { return *std::get<std::shared_ptr<const Dict>>(data_); }
  Object* AsObject() const { return std::get<Object*>(data_); }

  std::string WhyUndefined() const;  // requires undefined
  bool Truthy() const;
  std::string TypeName() const;  // as Python calls it
  int depth() const;             // 0 for anything but lists and dicts

 private:
  struct Nothing {};
  struct Missing {
    std::shared_ptr<const std::string> why;
  };
  using Data = std::variant<Missing, Nothing, bool, std::int64_t, double, std::shared_ptr<const std::string>,
                            std::shared_ptr<const List>, std::shared_ptr<const Dict>, Object*>;
  explicit Value(Data data) : data_(std::move(data)) {}

  Data data_;
};

struct List {
  std::vector<Value> items;
  bool is_tuple = false;
  int depth = 1;
};

// In order of insertion. Keys: strings, numbers, bools, none.
struct Dict {
  std::vector<std::pair<Value, Value>> entries;
  std::unordered_map<std::string, std::size_t> index;  // by KeyOf
  int depth = 1;

  // InvalidArgument for a key that cannot be one.
  Status Set(const Value& key, Value value);
  const Value* Find(const Value& key) const;  // null = none
  const Value* Find(std::string_view key) const;
};

// str(), repr() and json.dumps(): ResourceExhausted past the budget, InvalidArgument for what JSON has no form for.
Result<std::string> ToText(const Value& value, Budget* budget);
Result<std::string> ToRepr(const Value& value, Budget* budget);

struct JsonStyle {
  bool ensure_ascii = false;
  bool pretty = false;  // one entry a line
  std::string indent;   // of a line per level, when pretty
  std::string item_separator = ", ";
  std::string key_separator = ": ";
  bool sort_keys = false;
};
Result<std::string> ToJson(const Value& value, const JsonStyle& style, Budget* budget);

// a == b.
Result<bool> Equal(const Value& a, const Value& b, Budget* budget);
// Negative, 0, positive for a < b, a == b, a > b; InvalidArgument for types that Python does not order.
Result<int> Compare(const Value& a, const Value& b, Budget* budget);

// What a for loop visits: list items, dict keys, characters. InvalidArgument for what Python cannot iterate.
Result<std::vector<Value>> Iterate(const Value& value, Budget* budget);

// A JSON document, keys in their order. InvalidArgument when it is not JSON, nests too deep, or has an integer beyond
// 64 bits.
Result<Value> ParseJsonValue(std::string_view text);

}  // namespace kvshare::runtime::jinja

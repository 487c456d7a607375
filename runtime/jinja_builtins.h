// What templates find in Jinja and Python without defining it: filters, tests, methods, attributes and global
// functions.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "runtime/jinja_value.h"

namespace kvshare::runtime::jinja {

struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> keywords;

  // The argument at `position` or called `name`; null = not given.
  const Value* Get(std::size_t position, std::string_view name) const;
  Result<std::string> Text(std::size_t position, std::string_view name, std::string fallback) const;
  Result<std::int64_t> Int(std::size_t position, std::string_view name, std::int64_t fallback) const;
  bool Flag(std::size_t position, std::string_view name, bool fallback) const;
};

// One rendering's state: its budget and the objects it made.
struct Runtime {
  Budget budget;
  std::vector<std::unique_ptr<Object>> objects;
  bool raised = false;  // the failure at hand is the template's own raise_exception

  template <typename T, typename... Args>
  T* New(Args&&... args) {
    objects.push_back(std::make_unique<T>(std::forward<Args>(args)...));
    return static_cast<T*>(objects.back().get());
  }
};

class Function : public Object {
 public:
  using Body = std::function<Result<Value>(const Arguments&, Runtime*)>;
  explicit Function(Body body) : body_(std::move(body)) {}
  std::string TypeName() const override { return "function"; }
  bool IsCallable() const override { return true; }
  Result<Value> Call(const Arguments& arguments, Runtime* runtime) override { return body_(arguments, runtime); }

 private:
  Body body_;
};

// The only mutable value: what loops use to remember.
class Namespace : public Object {
 public:
  std::string TypeName() const override { return "Namespace"; }
  Value Attribute(std::string_view name, Runtime* runtime) override;
  Status Set(const std::string& name, Value value) { return values_.Set(Value::Str(name), std::move(value)); }

 private:
  Dict values_;
};

// value.name and value[key], as Jinja looks them up: what is not there is undefined, and looking into undefined fails.
Result<Value> GetAttribute(const Value& value, const std::string& name, Runtime* runtime);
Result<Value> GetItem(const Value& value, const Value& key, Runtime* runtime);
// value[begin:end:step]; null or none where absent.
Result<Value> GetSlice(const Value& value, const Value& begin, const Value& end, const Value& step, Runtime* runtime);

bool IsFilter(std::string_view name);
Result<Value> ApplyFilter(const std::string& name, const Value& value, const Arguments& arguments, Runtime* runtime);

bool IsTest(std::string_view name);
Result<bool> ApplyTest(const std::string& name, const Value& value, const Arguments& arguments, Runtime* runtime);

// Methods of str, dict and list (jinja_methods.cc).
bool HasMethod(const Value& value, std::string_view name);
Result<Value> CallMethod(const Value& self, const std::string& name, const Arguments& arguments, Runtime* runtime);

// A binary operator: + - * / // % **.
Result<Value> Arithmetic(const std::string& op, const Value& a, const Value& b, Runtime* runtime);
// needle in haystack.
Result<bool> Contains(const Value& haystack, const Value& needle, Runtime* runtime);

// range, namespace, dict, raise_exception, strftime_now; undefined for other names.
Value GlobalFunction(std::string_view name, Runtime* runtime);

// Text helpers that filters and methods share. `chars` empty: white space.
enum class Side { kLeft, kRight, kBoth };
std::string Strip(std::string_view text, const std::string& chars, Side side);
Result<std::string> ReplaceAll(const std::string& text, const std::string& from, const std::string& to,
                               std::int64_t count, Budget* budget);
std::string Capitalize(std::string_view text);
std::vector<std::string> SplitLines(std::string_view text);
Result<std::string> JoinTexts(const std::vector<Value>& items, const std::string& glue, Budget* budget);

}  // namespace kvshare::runtime::jinja

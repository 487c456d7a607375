#include "runtime/json.h"

#include <cmath>
#include <sstream>

#include "libkvshare/core/json_text.h"

namespace kvshare::runtime {
namespace {

std::string Field(const char* key) { return "field '" + std::string(key) + "'"; }

Status Missing(const char* key) { return InvalidArgument(Field(key) + " is missing"); }

Status WrongType(const char* key, const char* wanted, const Json& value) {
  return InvalidArgument(Field(key) + " must be " + wanted + ", not a value of type " + value.type_name());
}

template <typename T>
Status OutOfRange(const char* key, const std::string& value, T lo, T hi) {
  std::ostringstream out;
  out << Field(key) << " is " << value << ", outside " << lo << ".." << hi;
  return InvalidArgument(out.str());
}

}  // namespace

Result<Json> ParseJsonObject(std::string_view text) {
  auto json = ParseJson(text);
  if (json.ok() && !json->is_object()) {
    return InvalidArgument(std::string("expected a JSON object, not a value of type ") + json->type_name());
  }
  return json;
}

const Json* FindField(const Json& object, const char* key) {
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

Result<std::int64_t> GetInt(const Json& object, const char* key, std::int64_t lo, std::int64_t hi,
                            std::optional<std::int64_t> fallback) {
  const Json* value = FindField(object, key);
  if (value == nullptr) {
    if (fallback.has_value()) return *fallback;
    return Missing(key);
  }
  if (!value->is_number_integer()) return WrongType(key, "an integer", *value);
  if (value->is_number_unsigned()) {
    const auto number = value->get<std::uint64_t>();
    if (hi < 0 || number > static_cast<std::uint64_t>(hi)) return OutOfRange(key, std::to_string(number), lo, hi);
  }
  const auto number = value->get<std::int64_t>();
  if (number < lo || number > hi) return OutOfRange(key, std::to_string(number), lo, hi);
  return number;
}

Result<double> GetNumber(const Json& object, const char* key, double lo, double hi, std::optional<double> fallback) {
  const Json* value = FindField(object, key);
  if (value == nullptr) {
    if (fallback.has_value()) return *fallback;
    return Missing(key);
  }
  if (!value->is_number()) return WrongType(key, "a number", *value);
  const auto number = value->get<double>();
  if (!std::isfinite(number) || number < lo || number > hi) return OutOfRange(key, std::to_string(number), lo, hi);
  return number;
}

Result<bool> GetBool(const Json& object, const char* key, bool fallback) {
  const Json* value = FindField(object, key);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) return WrongType(key, "true or false", *value);
  return value->get<bool>();
}

Result<std::string> GetString(const Json& object, const char* key, std::optional<std::string> fallback) {
  const Json* value = FindField(object, key);
  if (value == nullptr) {
    if (fallback.has_value()) return *fallback;
    return Missing(key);
  }
  if (!value->is_string()) return WrongType(key, "a string", *value);
  return value->get<std::string>();
}

}  // namespace kvshare::runtime

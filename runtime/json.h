// JSON of model files, read with type and range checks. Every error names the field, so that "hidden_size must be an
// integer" is what a user sees of a broken file.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "kvshare/status.h"

namespace kvshare::runtime {

using Json = nlohmann::json;

// As kvshare::ParseJson, and the document must be an object.
Result<Json> ParseJsonObject(std::string_view text);

// The value of object[key], or null when it is absent or JSON's null. Requires an object.
const Json* FindField(const Json& object, const char* key);

// A field that is absent or null gives `fallback`; without a fallback it is InvalidArgument "KEY is missing".
// A value of another type or outside [lo, hi] is InvalidArgument and names the field, the value and the range.
Result<std::int64_t> GetInt(const Json& object, const char* key, std::int64_t lo, std::int64_t hi,
                            std::optional<std::int64_t> fallback = std::nullopt);
// Finite numbers only, integers welcome.
Result<double> GetNumber(const Json& object, const char* key, double lo, double hi,
                         std::optional<double> fallback = std::nullopt);
Result<bool> GetBool(const Json& object, const char* key, bool fallback);
Result<std::string> GetString(const Json& object, const char* key, std::optional<std::string> fallback = std::nullopt);

}  // namespace kvshare::runtime

// Typed access to the fields of one line of a trace. An absent or null optional field leaves its default.
#pragma once

#include <cmath>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "kvshare/status.h"

namespace kvshare::trace {

class Fields {
 public:
  explicit Fields(const nlohmann::json& json) : json_(json) {}

  Status Text(const char* name, std::string* out) const {
    const auto it = json_.find(name);
    if (it == json_.end() || it->is_null()) return OkStatus();
    if (!it->is_string()) return Wrong(name, "is not a string");
    *out = it->get<std::string>();
    return OkStatus();
  }

  Status Count(const char* name, std::int64_t max, std::int64_t* out) const {
    const auto it = json_.find(name);
    if (it == json_.end() || it->is_null()) return OkStatus();
    const bool whole = it->is_number_integer() || it->is_number_unsigned();
    const double value = it->is_number() ? it->get<double>() : -1;
    if (!whole || value < 0 || value > static_cast<double>(max)) {
      return Wrong(name, "is not a whole number from 0 to " + std::to_string(max));
    }
    *out = it->get<std::int64_t>();
    return OkStatus();
  }

  Result<std::optional<double>> Milliseconds(const char* name) const {
    constexpr double kMaxMs = 1e15;  // 30,000 years; larger clocks are damage
    const auto it = json_.find(name);
    if (it == json_.end() || it->is_null()) return std::optional<double>();
    if (!it->is_number() || !(std::abs(it->get<double>()) <= kMaxMs)) {
      return Wrong(name, "is not a time in milliseconds");
    }
    return std::optional<double>(it->get<double>());
  }

  static Status Wrong(const char* name, const std::string& why) {
    return InvalidArgument("\"" + std::string(name) + "\" " + why);
  }

 private:
  const nlohmann::json& json_;
};

}  // namespace kvshare::trace

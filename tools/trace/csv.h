// Fields of a CSV file (RFC 4180).
#pragma once

#include <array>
#include <cstdio>
#include <string>
#include <string_view>

namespace kvshare::trace {

// Quoted where it must be. A leading '=', '+', '-' or '@' gets an apostrophe: names come from other people's logs, and
// spreadsheets take such fields for formulas.
inline std::string CsvField(std::string_view text) {
  std::string field(text);
  if (!field.empty() && std::string_view("=+-@").find(field[0]) != std::string_view::npos) field.insert(0, "'");
  if (field.find_first_of(",\"\r\n") == std::string::npos) return field;
  std::string quoted = "\"";
  for (const char c : field) {
    if (c == '"') quoted += '"';
    quoted += c;
  }
  return quoted + "\"";
}

inline std::string CsvNumber(double value) {
  std::array<char, 48> text;
  std::snprintf(text.data(), text.size(), "%.3f", value);
  return text.data();
}

}  // namespace kvshare::trace

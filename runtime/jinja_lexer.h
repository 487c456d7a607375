// Lexer of the Jinja subset: template source to tokens, white space control applied as transformers configures Jinja
// (trim_blocks, lstrip_blocks, one trailing newline dropped). Follows jinja2/lexer.py.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kvshare/status.h"

namespace kvshare::runtime::jinja {

struct Place {
  int line = 1;
  int column = 1;  // in bytes
};

// "line 3, column 7: what"
Status ErrorAt(const Place& place, const std::string& what);

struct Token {
  enum class Type {
    kData,
    kBlockBegin,
    kBlockEnd,
    kPrintBegin,
    kPrintEnd,
    kName,
    kString,
    kInt,
    kFloat,
    kOperator,
    kEnd
  };
  Type type = Type::kEnd;
  std::string text;  // data, name, operator, or a string's value
  std::int64_t integer = 0;
  double number = 0;
  Place place;

  bool Is(Type t, std::string_view value) const { return type == t && text == value; }
  bool IsOp(std::string_view op) const { return Is(Type::kOperator, op); }
  bool IsName(std::string_view name) const { return Is(Type::kName, name); }
};

// Ends with a kEnd token. InvalidArgument with line and column.
Result<std::vector<Token>> Tokenize(std::string_view source);

}  // namespace kvshare::runtime::jinja

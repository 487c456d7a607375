// Parser of the Jinja subset (docs/design/chat-template.md lists it). Follows jinja2/parser.py.
#pragma once

#include <string_view>

#include "kvshare/status.h"
#include "runtime/jinja_ast.h"

namespace kvshare::runtime::jinja {

inline constexpr std::size_t kMaxTemplateBytes = 1u << 20;  // the largest in use has about 30,000

// InvalidArgument with line and column for what does not parse, nests too deep, or is outside the subset: unknown tags,
// filters and tests are refused here, not when they are first reached.
Result<Block> Parse(std::string_view source);

}  // namespace kvshare::runtime::jinja

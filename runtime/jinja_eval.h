// Evaluator of the Jinja subset: a parsed template and its variables to text.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kvshare/status.h"
#include "runtime/jinja_ast.h"

namespace kvshare::runtime::jinja {

// Returns InvalidArgument with line and column when an expression fails, or with the plain text of the template's own
// raise_exception; ResourceExhausted past the Budget.
Result<std::string> Render(const Block& body, std::vector<std::pair<std::string, Value>> variables);

}  // namespace kvshare::runtime::jinja

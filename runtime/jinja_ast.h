// Syntax tree of the Jinja subset. Immutable once parsed; no node lies deeper than kMaxSyntaxDepth, which bounds every
// recursion over it.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "runtime/jinja_lexer.h"
#include "runtime/jinja_value.h"

namespace kvshare::runtime::jinja {

inline constexpr int kMaxSyntaxDepth = 150;

struct Expr;
using ExprPtr = std::unique_ptr<Expr>;

struct Expr {
  enum class Kind {
    kConst,    // value
    kName,     // name
    kList,     // parts
    kTuple,    // parts
    kDict,     // parts: key, value, key, value, ...
    kAttr,     // parts[0].name
    kItem,     // parts[0][parts[1]]
    kSlice,    // parts: begin, end, step, each of them null where absent
    kCall,     // parts[0](parts[1..], keywords)
    kFilter,   // parts[0] | name(parts[1..], keywords); parts[0] is null in a filter block
    kTest,     // parts[0] is name(parts[1..], keywords)
    kNot,      // not parts[0]
    kNegate,   // -parts[0]
    kPlus,     // +parts[0]
    kBinary,   // parts[0] name parts[1]
    kAnd,      // parts[0] and parts[1]
    kOr,       // parts[0] or parts[1]
    kConcat,   // parts joined as text
    kCompare,  // parts[0] operators[0] parts[1] operators[1] ...
    kChoose,   // parts[1] if parts[0] else parts[2]; parts[2] may be null
  };
  Kind kind = Kind::kConst;
  Place place;
  std::string name;
  Value value;
  std::vector<ExprPtr> parts;
  std::vector<std::pair<std::string, ExprPtr>> keywords;
  std::vector<std::string> operators;
  int depth = 1;
};

// What is assigned to: a name, an attribute of a namespace, or a list of these.
struct Target {
  Place place;
  std::string name;
  std::string attribute;      // of the namespace `name`; empty: the name itself
  std::vector<Target> parts;  // not empty: unpacks into these
};

struct Stmt;
using Block = std::vector<std::unique_ptr<Stmt>>;

struct Stmt {
  enum class Kind {
    kText,         // text
    kPrint,        // expr
    kIf,           // branches; body = else
    kFor,          // target in expr if condition: body; or_else
    kSet,          // target = expr
    kSetBlock,     // target = body [| expr]
    kMacro,        // name(parameters): body
    kFilterBlock,  // body | expr
    kScope,        // body in a scope of its own: with (assigns), generation
    kDo,           // expr, for its effect
    kBreak,
    kContinue,
  };
  Kind kind = Kind::kText;
  Place place;
  std::string text;
  std::string name;
  ExprPtr expr;
  ExprPtr condition;
  Target target;
  std::vector<std::pair<ExprPtr, Block>> branches;
  std::vector<std::pair<std::string, ExprPtr>> parameters;  // with default or null
  std::vector<std::pair<Target, ExprPtr>> assigns;
  Block body;
  Block or_else;
};

}  // namespace kvshare::runtime::jinja

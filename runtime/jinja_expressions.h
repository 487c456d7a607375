// Parser of the Jinja subset's expressions: the half of jinja2/parser.py below the statements.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "libkvshare/core/status_macros.h"
#include "runtime/jinja_ast.h"

namespace kvshare::runtime::jinja {

// Names that end an expression or connect two, and so are never a variable.
bool IsReservedName(std::string_view name);

// The tokens of a template and the place that parsing has come to.
class ExpressionParser {
 protected:
  using Type = Token::Type;

  // Requires a kEnd token at the end, as Tokenize gives.
  explicit ExpressionParser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  const Token& Cur() const { return tokens_[pos_]; }
  const Token& Ahead() const { return tokens_[std::min(pos_ + 1, tokens_.size() - 1)]; }
  Token Next() { return tokens_[pos_ + 1 < tokens_.size() ? pos_++ : pos_]; }
  bool SkipOp(std::string_view op) { return Cur().IsOp(op) && (++pos_, true); }
  bool SkipName(std::string_view name) { return Cur().IsName(name) && (++pos_, true); }

  static std::string Describe(const Token& t) {
    switch (t.type) {
      case Type::kEnd: return "the end of the template";
      case Type::kBlockEnd: return "'%}'";
      case Type::kPrintEnd: return "'}}'";
      case Type::kString: return "a string";
      default: return "'" + t.text.substr(0, 40) + "'";
    }
  }
  Status Unexpected(const std::string& wanted) const {
    return ErrorAt(Cur().place, "expected " + wanted + ", found " + Describe(Cur()));
  }
  Status ExpectOp(std::string_view op) { return SkipOp(op) ? OkStatus() : Unexpected("'" + std::string(op) + "'"); }
  Result<std::string> ExpectName() {
    if (Cur().type != Type::kName || IsReservedName(Cur().text)) return Unexpected("a name");
    return Next().text;
  }
  Status ExpectBlockEnd() {
    if (Cur().type != Type::kBlockEnd) return Unexpected("'%}'");
    Next();
    return OkStatus();
  }

  // Counts the recursion of the parser itself: parentheses, blocks, signs.
  class Nested {
   public:
    explicit Nested(ExpressionParser* p) : p_(p) { ++p_->nesting_; }
    ~Nested() { --p_->nesting_; }
    Nested(const Nested&) = delete;
    Nested& operator=(const Nested&) = delete;
    Status Check() const {
      return p_->nesting_ > kMaxSyntaxDepth ? ErrorAt(p_->Cur().place, "this nests too deep") : OkStatus();
    }

   private:
    ExpressionParser* p_;
  };

  static ExprPtr New(Expr::Kind kind, Place place) {
    auto e = std::make_unique<Expr>();
    e->kind = kind;
    e->place = place;
    return e;
  }
  // To be called once an expression has its parts: long chains nest as deep as parentheses do.
  static Result<ExprPtr> Finish(ExprPtr e) {
    for (const ExprPtr& part : e->parts) {
      if (part != nullptr) e->depth = std::max(e->depth, part->depth + 1);
    }
    for (const auto& keyword : e->keywords) e->depth = std::max(e->depth, keyword.second->depth + 1);
    if (e->depth > kMaxSyntaxDepth) return ErrorAt(e->place, "this expression nests too deep");
    return e;
  }
  static Result<ExprPtr> Join(Expr::Kind kind, const Token& op, ExprPtr left, ExprPtr right) {
    ExprPtr e = New(kind, op.place);
    e->name = op.text;
    e->parts.push_back(std::move(left));
    e->parts.push_back(std::move(right));
    return Finish(std::move(e));
  }

  // One expression, or several separated by commas: a tuple.
  Result<ExprPtr> ParseTuple(bool with_choice = true);
  Result<ExprPtr> ParseExpression();
  Result<ExprPtr> ParseOr();
  // Filters, tests and calls that follow an expression. For blocks `e` is null; with inline_only the first filter has
  // its bar before it.
  Result<ExprPtr> ParseFilters(ExprPtr e, bool inline_only);

 private:
  Result<ExprPtr> ParseAnd();
  Result<ExprPtr> ParseNot();
  // The comparison operator at hand, consumed; empty when there is none.
  std::string TakeComparison();
  Result<ExprPtr> ParseCompare();
  bool CurIsOneOf(std::initializer_list<std::string_view> ops) const;
  Result<ExprPtr> ParseSum();
  Result<ExprPtr> ParseConcat();
  Result<ExprPtr> ParseProduct();
  Result<ExprPtr> ParsePower();
  Result<ExprPtr> ParseUnary(bool with_filters);
  Result<ExprPtr> ParsePrimary();
  Result<ExprPtr> ParsePostfix(ExprPtr e);
  Result<ExprPtr> ParseSubscript();
  // "(a, b, name=c)", at the parenthesis.
  Status ParseArguments(Expr* call);
  Result<ExprPtr> ParseTest(ExprPtr subject);

  const std::vector<Token> tokens_;
  std::size_t pos_ = 0;
  int nesting_ = 0;
};

}  // namespace kvshare::runtime::jinja

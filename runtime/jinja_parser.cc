#include "runtime/jinja_parser.h"

#include <algorithm>
#include <initializer_list>

#include "libkvshare/core/status_macros.h"
#include "runtime/jinja_builtins.h"
#include "runtime/utf8.h"

namespace kvshare::runtime::jinja {
namespace {

using Type = Token::Type;

constexpr std::size_t kMaxArguments = 32;

// Names that end an expression or connect two, and so are never a variable.
bool IsReserved(std::string_view name) {
  for (const std::string_view word : {"and", "or", "not", "in", "is", "if", "else", "elif", "endif", "for", "endfor"}) {
    if (name == word) return true;
  }
  return false;
}

class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  Result<Block> Run() { return ParseBody({}); }

 private:
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
    if (Cur().type != Type::kName || IsReserved(Cur().text)) return Unexpected("a name");
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
    explicit Nested(Parser* p) : p_(p) { ++p_->nesting_; }
    ~Nested() { --p_->nesting_; }
    Nested(const Nested&) = delete;
    Nested& operator=(const Nested&) = delete;
    Status Check() const {
      return p_->nesting_ > kMaxSyntaxDepth ? ErrorAt(p_->Cur().place, "this nests too deep") : OkStatus();
    }

   private:
    Parser* p_;
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

  // Statements up to a block tag named in `ends`, whose name is left as the current token; without ends, to the end.
  Result<Block> ParseBody(std::initializer_list<std::string_view> ends) {
    const Nested nested(this);
    KVS_RETURN_IF_ERROR(nested.Check());
    Block body;
    const Place begin = Cur().place;
    while (true) {
      const Token& token = Cur();
      if (token.type == Type::kEnd) {
        if (ends.size() == 0) return body;
        return ErrorAt(begin, "the block that begins here has no " + std::string(*(ends.end() - 1)));
      }
      if (token.type == Type::kData) {
        auto text = NewStmt(Stmt::Kind::kText);
        text->text = Next().text;
        body.push_back(std::move(text));
      } else if (token.type == Type::kPrintBegin) {
        auto print = NewStmt(Stmt::Kind::kPrint);
        Next();
        KVS_ASSIGN_OR_RETURN(print->expr, ParseTuple());
        if (Cur().type != Type::kPrintEnd) return Unexpected("'}}'");
        Next();
        body.push_back(std::move(print));
      } else {
        Next();  // kBlockBegin
        if (Cur().type == Type::kName && std::find(ends.begin(), ends.end(), Cur().text) != ends.end()) return body;
        KVS_ASSIGN_OR_RETURN(auto statement, ParseStatement());
        body.push_back(std::move(statement));
      }
    }
  }
  // A body and its end tag, both consumed.
  Result<Block> ParseBodyTo(std::string_view end) {
    KVS_ASSIGN_OR_RETURN(Block body, ParseBody({end}));
    Next();
    if (end == "endmacro" && Cur().type == Type::kName) Next();  // its name may be repeated
    KVS_RETURN_IF_ERROR(ExpectBlockEnd());
    return body;
  }

  std::unique_ptr<Stmt> NewStmt(Stmt::Kind kind) const {
    auto s = std::make_unique<Stmt>();
    s->kind = kind;
    s->place = Cur().place;
    return s;
  }

  Result<std::unique_ptr<Stmt>> ParseStatement() {
    if (Cur().type != Type::kName) return Unexpected("a tag's name");
    const Token tag = Cur();
    auto s = NewStmt(Stmt::Kind::kScope);
    Next();
    if (tag.text == "if") return ParseIf(std::move(s));
    if (tag.text == "for") return ParseFor(std::move(s));
    if (tag.text == "set") return ParseSet(std::move(s));
    if (tag.text == "macro") return ParseMacro(std::move(s));
    if (tag.text == "break" || tag.text == "continue") {
      if (loops_ == 0) return ErrorAt(tag.place, "'" + tag.text + "' outside a loop");
      s->kind = tag.text == "break" ? Stmt::Kind::kBreak : Stmt::Kind::kContinue;
      KVS_RETURN_IF_ERROR(ExpectBlockEnd());
      return s;
    }
    if (tag.text == "do") {
      s->kind = Stmt::Kind::kDo;
      KVS_ASSIGN_OR_RETURN(s->expr, ParseTuple());
      KVS_RETURN_IF_ERROR(ExpectBlockEnd());
      return s;
    }
    if (tag.text == "filter") {
      s->kind = Stmt::Kind::kFilterBlock;
      KVS_ASSIGN_OR_RETURN(s->expr, ParseFilters(nullptr, /*inline_only=*/false));
      KVS_RETURN_IF_ERROR(ExpectBlockEnd());
      KVS_ASSIGN_OR_RETURN(s->body, ParseBodyTo("endfilter"));
      return s;
    }
    if (tag.text == "generation") {
      KVS_RETURN_IF_ERROR(ExpectBlockEnd());
      KVS_ASSIGN_OR_RETURN(s->body, ParseBodyTo("endgeneration"));
      return s;
    }
    if (tag.text == "with") {
      while (Cur().type != Type::kBlockEnd) {
        if (!s->assigns.empty()) KVS_RETURN_IF_ERROR(ExpectOp(","));
        KVS_ASSIGN_OR_RETURN(Target target, ParseTarget(false));
        KVS_RETURN_IF_ERROR(ExpectOp("="));
        KVS_ASSIGN_OR_RETURN(ExprPtr value, ParseExpression());
        s->assigns.emplace_back(std::move(target), std::move(value));
      }
      Next();
      KVS_ASSIGN_OR_RETURN(s->body, ParseBodyTo("endwith"));
      return s;
    }
    return ErrorAt(tag.place, "unknown tag '" + tag.text.substr(0, 40) +
                                  "' (known: if, for, set, macro, filter, with, do, break, continue, generation, raw)");
  }

  Result<std::unique_ptr<Stmt>> ParseIf(std::unique_ptr<Stmt> s) {
    s->kind = Stmt::Kind::kIf;
    while (true) {
      KVS_ASSIGN_OR_RETURN(ExprPtr condition, ParseTuple(/*with_choice=*/false));
      KVS_RETURN_IF_ERROR(ExpectBlockEnd());
      KVS_ASSIGN_OR_RETURN(Block body, ParseBody({"elif", "else", "endif"}));
      s->branches.emplace_back(std::move(condition), std::move(body));
      const std::string end = Next().text;
      if (end == "elif") continue;
      KVS_RETURN_IF_ERROR(ExpectBlockEnd());
      if (end == "else") {
        KVS_ASSIGN_OR_RETURN(s->body, ParseBodyTo("endif"));
      }
      return s;
    }
  }

  Result<std::unique_ptr<Stmt>> ParseFor(std::unique_ptr<Stmt> s) {
    s->kind = Stmt::Kind::kFor;
    KVS_ASSIGN_OR_RETURN(s->target, ParseTarget(false));
    if (!SkipName("in")) return Unexpected("'in'");
    KVS_ASSIGN_OR_RETURN(s->expr, ParseTuple(/*with_choice=*/false));
    if (SkipName("if")) {
      KVS_ASSIGN_OR_RETURN(s->condition, ParseExpression());
    }
    if (Cur().IsName("recursive")) return ErrorAt(Cur().place, "recursive loops are outside the subset");
    KVS_RETURN_IF_ERROR(ExpectBlockEnd());
    ++loops_;
    auto body = ParseBody({"else", "endfor"});
    --loops_;
    if (!body.ok()) return body.status();
    s->body = std::move(*body);
    const bool has_else = Next().text == "else";
    KVS_RETURN_IF_ERROR(ExpectBlockEnd());
    if (has_else) {
      KVS_ASSIGN_OR_RETURN(s->or_else, ParseBodyTo("endfor"));
    }
    return s;
  }

  Result<std::unique_ptr<Stmt>> ParseSet(std::unique_ptr<Stmt> s) {
    KVS_ASSIGN_OR_RETURN(s->target, ParseTarget(true));
    if (SkipOp("=")) {
      s->kind = Stmt::Kind::kSet;
      KVS_ASSIGN_OR_RETURN(s->expr, ParseTuple());
      KVS_RETURN_IF_ERROR(ExpectBlockEnd());
      return s;
    }
    s->kind = Stmt::Kind::kSetBlock;
    if (Cur().IsOp("|")) {
      KVS_ASSIGN_OR_RETURN(s->expr, ParseFilters(nullptr, /*inline_only=*/true));
    }
    KVS_RETURN_IF_ERROR(ExpectBlockEnd());
    KVS_ASSIGN_OR_RETURN(s->body, ParseBodyTo("endset"));
    return s;
  }

  Result<std::unique_ptr<Stmt>> ParseMacro(std::unique_ptr<Stmt> s) {
    s->kind = Stmt::Kind::kMacro;
    KVS_ASSIGN_OR_RETURN(s->name, ExpectName());
    KVS_RETURN_IF_ERROR(ExpectOp("("));
    while (!SkipOp(")")) {
      if (!s->parameters.empty()) KVS_RETURN_IF_ERROR(ExpectOp(","));
      KVS_ASSIGN_OR_RETURN(std::string name, ExpectName());
      ExprPtr fallback;
      if (SkipOp("=")) {
        KVS_ASSIGN_OR_RETURN(fallback, ParseExpression());
      } else if (!s->parameters.empty() && s->parameters.back().second != nullptr) {
        return ErrorAt(Cur().place, "a parameter without default after one with");
      }
      s->parameters.emplace_back(std::move(name), std::move(fallback));
    }
    KVS_RETURN_IF_ERROR(ExpectBlockEnd());
    const int outer_loops = std::exchange(loops_, 0);
    auto body = ParseBodyTo("endmacro");
    loops_ = outer_loops;
    if (!body.ok()) return body.status();
    s->body = std::move(*body);
    return s;
  }

  Result<Target> ParseTarget(bool with_namespace) {
    const Nested nested(this);
    KVS_RETURN_IF_ERROR(nested.Check());
    Target list{.place = Cur().place};
    bool is_list = false;
    while (true) {
      Target one{.place = Cur().place};
      if (SkipOp("(")) {
        KVS_ASSIGN_OR_RETURN(one, ParseTarget(with_namespace));
        KVS_RETURN_IF_ERROR(ExpectOp(")"));
      } else {
        KVS_ASSIGN_OR_RETURN(one.name, ExpectName());
        if (with_namespace && SkipOp(".")) {
          KVS_ASSIGN_OR_RETURN(one.attribute, ExpectName());
        }
      }
      list.parts.push_back(std::move(one));
      if (!SkipOp(",")) break;
      is_list = true;
      if (Cur().type != Type::kName && !Cur().IsOp("(")) break;
    }
    if (is_list) return list;
    Target only = std::move(list.parts[0]);
    return only;
  }

  // One expression, or several separated by commas: a tuple.
  Result<ExprPtr> ParseTuple(bool with_choice = true) {
    KVS_ASSIGN_OR_RETURN(ExprPtr first, with_choice ? ParseExpression() : ParseOr());
    if (!Cur().IsOp(",")) return first;
    ExprPtr tuple = New(Expr::Kind::kTuple, first->place);
    tuple->parts.push_back(std::move(first));
    while (SkipOp(",")) {
      if (Cur().type == Type::kBlockEnd || Cur().type == Type::kPrintEnd || Cur().IsOp(")")) break;
      KVS_ASSIGN_OR_RETURN(ExprPtr part, with_choice ? ParseExpression() : ParseOr());
      tuple->parts.push_back(std::move(part));
    }
    return Finish(std::move(tuple));
  }

  Result<ExprPtr> ParseExpression() {
    const Nested nested(this);
    KVS_RETURN_IF_ERROR(nested.Check());
    KVS_ASSIGN_OR_RETURN(ExprPtr e, ParseOr());
    while (Cur().IsName("if")) {
      ExprPtr choose = New(Expr::Kind::kChoose, Next().place);
      KVS_ASSIGN_OR_RETURN(ExprPtr condition, ParseOr());
      ExprPtr otherwise;
      if (SkipName("else")) {
        KVS_ASSIGN_OR_RETURN(otherwise, ParseExpression());
      }
      choose->parts.push_back(std::move(condition));
      choose->parts.push_back(std::move(e));
      choose->parts.push_back(std::move(otherwise));
      KVS_ASSIGN_OR_RETURN(e, Finish(std::move(choose)));
    }
    return e;
  }

  Result<ExprPtr> ParseOr() {
    KVS_ASSIGN_OR_RETURN(ExprPtr left, ParseAnd());
    while (Cur().IsName("or")) {
      const Token op = Next();
      KVS_ASSIGN_OR_RETURN(ExprPtr right, ParseAnd());
      KVS_ASSIGN_OR_RETURN(left, Join(Expr::Kind::kOr, op, std::move(left), std::move(right)));
    }
    return left;
  }

  Result<ExprPtr> ParseAnd() {
    KVS_ASSIGN_OR_RETURN(ExprPtr left, ParseNot());
    while (Cur().IsName("and")) {
      const Token op = Next();
      KVS_ASSIGN_OR_RETURN(ExprPtr right, ParseNot());
      KVS_ASSIGN_OR_RETURN(left, Join(Expr::Kind::kAnd, op, std::move(left), std::move(right)));
    }
    return left;
  }

  Result<ExprPtr> ParseNot() {
    if (!Cur().IsName("not")) return ParseCompare();
    const Nested nested(this);
    KVS_RETURN_IF_ERROR(nested.Check());
    ExprPtr e = New(Expr::Kind::kNot, Next().place);
    KVS_ASSIGN_OR_RETURN(ExprPtr operand, ParseNot());
    e->parts.push_back(std::move(operand));
    return Finish(std::move(e));
  }

  // The comparison operator at hand, consumed; empty when there is none.
  std::string TakeComparison() {
    for (const std::string_view op : {"==", "!=", "<", "<=", ">", ">="}) {
      if (Cur().IsOp(op)) return Next().text;
    }
    if (Cur().IsName("in")) return Next().text;
    if (Cur().IsName("not") && Ahead().IsName("in")) {
      Next();
      Next();
      return "not in";
    }
    return {};
  }

  Result<ExprPtr> ParseCompare() {
    KVS_ASSIGN_OR_RETURN(ExprPtr first, ParseSum());
    const Place place = Cur().place;
    std::string op = TakeComparison();
    if (op.empty()) return first;
    ExprPtr e = New(Expr::Kind::kCompare, place);
    e->parts.push_back(std::move(first));
    for (; !op.empty(); op = TakeComparison()) {
      KVS_ASSIGN_OR_RETURN(ExprPtr part, ParseSum());
      e->operators.push_back(op);
      e->parts.push_back(std::move(part));
    }
    return Finish(std::move(e));
  }

  bool CurIsOneOf(std::initializer_list<std::string_view> ops) const {
    return std::any_of(ops.begin(), ops.end(), [this](std::string_view op) { return Cur().IsOp(op); });
  }

  Result<ExprPtr> ParseSum() {
    KVS_ASSIGN_OR_RETURN(ExprPtr left, ParseConcat());
    while (CurIsOneOf({"+", "-"})) {
      const Token op = Next();
      KVS_ASSIGN_OR_RETURN(ExprPtr right, ParseConcat());
      KVS_ASSIGN_OR_RETURN(left, Join(Expr::Kind::kBinary, op, std::move(left), std::move(right)));
    }
    return left;
  }

  Result<ExprPtr> ParseConcat() {
    KVS_ASSIGN_OR_RETURN(ExprPtr first, ParseProduct());
    if (!Cur().IsOp("~")) return first;
    ExprPtr e = New(Expr::Kind::kConcat, Cur().place);
    e->parts.push_back(std::move(first));
    while (SkipOp("~")) {
      KVS_ASSIGN_OR_RETURN(ExprPtr part, ParseProduct());
      e->parts.push_back(std::move(part));
    }
    return Finish(std::move(e));
  }

  Result<ExprPtr> ParseProduct() {
    KVS_ASSIGN_OR_RETURN(ExprPtr left, ParsePower());
    while (CurIsOneOf({"*", "/", "//", "%"})) {
      const Token op = Next();
      KVS_ASSIGN_OR_RETURN(ExprPtr right, ParsePower());
      KVS_ASSIGN_OR_RETURN(left, Join(Expr::Kind::kBinary, op, std::move(left), std::move(right)));
    }
    return left;
  }

  Result<ExprPtr> ParsePower() {
    KVS_ASSIGN_OR_RETURN(ExprPtr left, ParseUnary(true));
    while (Cur().IsOp("**")) {
      const Token op = Next();
      KVS_ASSIGN_OR_RETURN(ExprPtr right, ParseUnary(true));
      KVS_ASSIGN_OR_RETURN(left, Join(Expr::Kind::kBinary, op, std::move(left), std::move(right)));
    }
    return left;
  }

  Result<ExprPtr> ParseUnary(bool with_filters) {
    const Nested nested(this);
    KVS_RETURN_IF_ERROR(nested.Check());
    ExprPtr e;
    if (CurIsOneOf({"-", "+"})) {
      e = New(Cur().IsOp("-") ? Expr::Kind::kNegate : Expr::Kind::kPlus, Cur().place);
      Next();
      KVS_ASSIGN_OR_RETURN(ExprPtr operand, ParseUnary(false));
      e->parts.push_back(std::move(operand));
      KVS_ASSIGN_OR_RETURN(e, Finish(std::move(e)));
    } else {
      KVS_ASSIGN_OR_RETURN(e, ParsePrimary());
    }
    KVS_ASSIGN_OR_RETURN(e, ParsePostfix(std::move(e)));
    return with_filters ? ParseFilters(std::move(e), /*inline_only=*/true) : std::move(e);
  }

  Result<ExprPtr> ParsePrimary() {
    const Token token = Cur();
    ExprPtr e = New(Expr::Kind::kConst, token.place);
    switch (token.type) {
      case Type::kInt: e->value = Value::Int(Next().integer); return e;
      case Type::kFloat: e->value = Value::Float(Next().number); return e;
      case Type::kString: {
        std::string text;
        while (Cur().type == Type::kString) text += Next().text;
        if (!IsValidUtf8(text)) return ErrorAt(token.place, "this string is not UTF-8");
        e->value = Value::Str(std::move(text));
        return e;
      }
      case Type::kName: {
        if (IsReserved(token.text)) return Unexpected("an expression");
        Next();
        if (token.text == "true" || token.text == "True") {
          e->value = Value::Bool(true);
        } else if (token.text == "false" || token.text == "False") {
          e->value = Value::Bool(false);
        } else if (token.text == "none" || token.text == "None") {
          e->value = Value::None();
        } else {
          e->kind = Expr::Kind::kName;
          e->name = token.text;
        }
        return e;
      }
      default: break;
    }
    if (SkipOp("(")) {
      if (SkipOp(")")) {
        e->kind = Expr::Kind::kTuple;
        return e;
      }
      KVS_ASSIGN_OR_RETURN(e, ParseTuple());
      KVS_RETURN_IF_ERROR(ExpectOp(")"));
      return e;
    }
    if (SkipOp("[")) {
      e->kind = Expr::Kind::kList;
      while (!SkipOp("]")) {
        if (!e->parts.empty()) KVS_RETURN_IF_ERROR(ExpectOp(","));
        if (SkipOp("]")) break;
        KVS_ASSIGN_OR_RETURN(ExprPtr part, ParseExpression());
        e->parts.push_back(std::move(part));
      }
      return Finish(std::move(e));
    }
    if (SkipOp("{")) {
      e->kind = Expr::Kind::kDict;
      while (!SkipOp("}")) {
        if (!e->parts.empty()) KVS_RETURN_IF_ERROR(ExpectOp(","));
        if (SkipOp("}")) break;
        KVS_ASSIGN_OR_RETURN(ExprPtr key, ParseExpression());
        KVS_RETURN_IF_ERROR(ExpectOp(":"));
        KVS_ASSIGN_OR_RETURN(ExprPtr value, ParseExpression());
        e->parts.push_back(std::move(key));
        e->parts.push_back(std::move(value));
      }
      return Finish(std::move(e));
    }
    return Unexpected("an expression");
  }

  Result<ExprPtr> ParsePostfix(ExprPtr e) {
    while (true) {
      const Place place = Cur().place;
      if (SkipOp(".")) {
        if (Cur().type != Type::kName && Cur().type != Type::kInt) return Unexpected("an attribute's name");
        const bool is_index = Cur().type == Type::kInt;
        ExprPtr get = New(is_index ? Expr::Kind::kItem : Expr::Kind::kAttr, place);
        get->parts.push_back(std::move(e));
        if (is_index) {
          get->parts.push_back(New(Expr::Kind::kConst, Cur().place));
          get->parts.back()->value = Value::Int(Cur().integer);
        } else {
          get->name = Cur().text;
        }
        Next();
        KVS_ASSIGN_OR_RETURN(e, Finish(std::move(get)));
      } else if (SkipOp("[")) {
        ExprPtr get = New(Expr::Kind::kItem, place);
        get->parts.push_back(std::move(e));
        KVS_ASSIGN_OR_RETURN(ExprPtr index, ParseSubscript());
        get->parts.push_back(std::move(index));
        KVS_RETURN_IF_ERROR(ExpectOp("]"));
        KVS_ASSIGN_OR_RETURN(e, Finish(std::move(get)));
      } else if (Cur().IsOp("(")) {
        ExprPtr call = New(Expr::Kind::kCall, place);
        call->parts.push_back(std::move(e));
        KVS_RETURN_IF_ERROR(ParseArguments(call.get()));
        KVS_ASSIGN_OR_RETURN(e, Finish(std::move(call)));
      } else {
        return e;
      }
    }
  }

  Result<ExprPtr> ParseSubscript() {
    ExprPtr slice = New(Expr::Kind::kSlice, Cur().place);
    slice->parts.resize(3);
    for (std::size_t i = 0;; ++i) {
      if (!Cur().IsOp(":") && !Cur().IsOp("]")) {
        KVS_ASSIGN_OR_RETURN(slice->parts[i], ParseExpression());
      }
      if (i == 0 && !Cur().IsOp(":")) {
        if (slice->parts[0] == nullptr) return Unexpected("an index");
        return std::move(slice->parts[0]);
      }
      if (i == 2 || !SkipOp(":")) return Finish(std::move(slice));
    }
  }

  // "(a, b, name=c)", at the parenthesis.
  Status ParseArguments(Expr* call) {
    KVS_RETURN_IF_ERROR(ExpectOp("("));
    bool first = true;
    while (!SkipOp(")")) {
      if (!first) KVS_RETURN_IF_ERROR(ExpectOp(","));
      first = false;
      if (SkipOp(")")) break;
      // Filters pass their arguments on to filters, one fewer each time: this bounds that recursion.
      if (call->parts.size() + call->keywords.size() > kMaxArguments) return ErrorAt(Cur().place, "too many arguments");
      if (CurIsOneOf({"*", "**"})) return ErrorAt(Cur().place, "unpacked arguments are outside the subset");
      if (Cur().type == Type::kName && Ahead().IsOp("=")) {
        std::string name = Next().text;
        Next();
        KVS_ASSIGN_OR_RETURN(ExprPtr value, ParseExpression());
        call->keywords.emplace_back(std::move(name), std::move(value));
      } else {
        if (!call->keywords.empty()) return ErrorAt(Cur().place, "a positional argument after a keyword argument");
        KVS_ASSIGN_OR_RETURN(ExprPtr value, ParseExpression());
        call->parts.push_back(std::move(value));
      }
    }
    return OkStatus();
  }

  // Filters, tests and calls that follow an expression. For blocks `e` is null; with inline_only the first filter has
  // its bar before it.
  Result<ExprPtr> ParseFilters(ExprPtr e, bool inline_only) {
    bool bar_given = !inline_only;
    while (true) {
      if (bar_given || SkipOp("|")) {
        bar_given = false;
        ExprPtr filter = New(Expr::Kind::kFilter, Cur().place);
        KVS_ASSIGN_OR_RETURN(filter->name, ExpectName());
        if (!IsFilter(filter->name))
          return ErrorAt(filter->place, "unknown filter '" + filter->name.substr(0, 40) + "'");
        filter->parts.push_back(std::move(e));
        if (Cur().IsOp("(")) KVS_RETURN_IF_ERROR(ParseArguments(filter.get()));
        KVS_ASSIGN_OR_RETURN(e, Finish(std::move(filter)));
      } else if (Cur().IsName("is") && e != nullptr) {
        KVS_ASSIGN_OR_RETURN(e, ParseTest(std::move(e)));
      } else if (Cur().IsOp("(") && e != nullptr) {
        KVS_ASSIGN_OR_RETURN(e, ParsePostfix(std::move(e)));
      } else {
        return e;
      }
    }
  }

  Result<ExprPtr> ParseTest(ExprPtr subject) {
    const Nested nested(this);
    KVS_RETURN_IF_ERROR(nested.Check());
    Next();  // is
    const bool negated = SkipName("not");
    ExprPtr test = New(Expr::Kind::kTest, Cur().place);
    if (Cur().type != Type::kName) return Unexpected("a test's name");
    test->name = Next().text;
    if (!IsTest(test->name)) return ErrorAt(test->place, "unknown test '" + test->name.substr(0, 40) + "'");
    test->parts.push_back(std::move(subject));
    const Token& t = Cur();
    const bool connects = t.IsName("else") || t.IsName("or") || t.IsName("and") || t.IsName("if") || t.IsName("is") ||
                          t.IsName("not") || t.IsName("in");
    if (t.IsOp("(")) {
      KVS_RETURN_IF_ERROR(ParseArguments(test.get()));
    } else if (!connects && (t.type == Type::kName || t.type == Type::kString || t.type == Type::kInt ||
                             t.type == Type::kFloat || t.IsOp("[") || t.IsOp("{"))) {
      KVS_ASSIGN_OR_RETURN(ExprPtr argument, ParsePrimary());
      KVS_ASSIGN_OR_RETURN(argument, ParsePostfix(std::move(argument)));
      test->parts.push_back(std::move(argument));
    }
    KVS_ASSIGN_OR_RETURN(ExprPtr e, Finish(std::move(test)));
    if (!negated) return e;
    ExprPtr inverse = New(Expr::Kind::kNot, e->place);
    inverse->parts.push_back(std::move(e));
    return Finish(std::move(inverse));
  }

  const std::vector<Token> tokens_;
  std::size_t pos_ = 0;
  int nesting_ = 0;
  int loops_ = 0;  // that surround the statement at hand
};

}  // namespace

Result<Block> Parse(std::string_view source) {
  if (source.size() > kMaxTemplateBytes) {
    return InvalidArgument("the template is longer than " + std::to_string(kMaxTemplateBytes) + " bytes");
  }
  if (!IsValidUtf8(source)) return InvalidArgument("the template is not UTF-8");
  KVS_ASSIGN_OR_RETURN(auto tokens, Tokenize(source));
  Parser parser(std::move(tokens));
  return parser.Run();
}

}  // namespace kvshare::runtime::jinja

#include "runtime/jinja_expressions.h"

#include "runtime/jinja_builtins.h"
#include "runtime/utf8.h"

namespace kvshare::runtime::jinja {
namespace {

constexpr std::size_t kMaxArguments = 32;

}  // namespace

bool IsReservedName(std::string_view name) {
  for (const std::string_view word : {"and", "or", "not", "in", "is", "if", "else", "elif", "endif", "for", "endfor"}) {
    if (name == word) return true;
  }
  return false;
}

Result<ExprPtr> ExpressionParser::ParseTuple(bool with_choice) {
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

Result<ExprPtr> ExpressionParser::ParseExpression() {
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

Result<ExprPtr> ExpressionParser::ParseOr() {
  KVS_ASSIGN_OR_RETURN(ExprPtr left, ParseAnd());
  while (Cur().IsName("or")) {
    const Token op = Next();
    KVS_ASSIGN_OR_RETURN(ExprPtr right, ParseAnd());
    KVS_ASSIGN_OR_RETURN(left, Join(Expr::Kind::kOr, op, std::move(left), std::move(right)));
  }
  return left;
}

Result<ExprPtr> ExpressionParser::ParseAnd() {
  KVS_ASSIGN_OR_RETURN(ExprPtr left, ParseNot());
  while (Cur().IsName("and")) {
    const Token op = Next();
    KVS_ASSIGN_OR_RETURN(ExprPtr right, ParseNot());
    KVS_ASSIGN_OR_RETURN(left, Join(Expr::Kind::kAnd, op, std::move(left), std::move(right)));
  }
  return left;
}

Result<ExprPtr> ExpressionParser::ParseNot() {
  if (!Cur().IsName("not")) return ParseCompare();
  const Nested nested(this);
  KVS_RETURN_IF_ERROR(nested.Check());
  ExprPtr e = New(Expr::Kind::kNot, Next().place);
  KVS_ASSIGN_OR_RETURN(ExprPtr operand, ParseNot());
  e->parts.push_back(std::move(operand));
  return Finish(std::move(e));
}

std::string ExpressionParser::TakeComparison() {
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

Result<ExprPtr> ExpressionParser::ParseCompare() {
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

bool ExpressionParser::CurIsOneOf(std::initializer_list<std::string_view> ops) const {
  return std::any_of(ops.begin(), ops.end(), [this](std::string_view op) { return Cur().IsOp(op); });
}

Result<ExprPtr> ExpressionParser::ParseSum() {
  KVS_ASSIGN_OR_RETURN(ExprPtr left, ParseConcat());
  while (CurIsOneOf({"+", "-"})) {
    const Token op = Next();
    KVS_ASSIGN_OR_RETURN(ExprPtr right, ParseConcat());
    KVS_ASSIGN_OR_RETURN(left, Join(Expr::Kind::kBinary, op, std::move(left), std::move(right)));
  }
  return left;
}

Result<ExprPtr> ExpressionParser::ParseConcat() {
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

Result<ExprPtr> ExpressionParser::ParseProduct() {
  KVS_ASSIGN_OR_RETURN(ExprPtr left, ParsePower());
  while (CurIsOneOf({"*", "/", "//", "%"})) {
    const Token op = Next();
    KVS_ASSIGN_OR_RETURN(ExprPtr right, ParsePower());
    KVS_ASSIGN_OR_RETURN(left, Join(Expr::Kind::kBinary, op, std::move(left), std::move(right)));
  }
  return left;
}

Result<ExprPtr> ExpressionParser::ParsePower() {
  KVS_ASSIGN_OR_RETURN(ExprPtr left, ParseUnary(true));
  while (Cur().IsOp("**")) {
    const Token op = Next();
    KVS_ASSIGN_OR_RETURN(ExprPtr right, ParseUnary(true));
    KVS_ASSIGN_OR_RETURN(left, Join(Expr::Kind::kBinary, op, std::move(left), std::move(right)));
  }
  return left;
}

Result<ExprPtr> ExpressionParser::ParseUnary(bool with_filters) {
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

Result<ExprPtr> ExpressionParser::ParsePrimary() {
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
      if (IsReservedName(token.text)) return Unexpected("an expression");
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

Result<ExprPtr> ExpressionParser::ParsePostfix(ExprPtr e) {
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

Result<ExprPtr> ExpressionParser::ParseSubscript() {
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

Status ExpressionParser::ParseArguments(Expr* call) {
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

Result<ExprPtr> ExpressionParser::ParseFilters(ExprPtr e, bool inline_only) {
  bool bar_given = !inline_only;
  while (true) {
    if (bar_given || SkipOp("|")) {
      bar_given = false;
      ExprPtr filter = New(Expr::Kind::kFilter, Cur().place);
      KVS_ASSIGN_OR_RETURN(filter->name, ExpectName());
      if (!IsFilter(filter->name)) return ErrorAt(filter->place, "unknown filter '" + filter->name.substr(0, 40) + "'");
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

Result<ExprPtr> ExpressionParser::ParseTest(ExprPtr subject) {
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

}  // namespace kvshare::runtime::jinja

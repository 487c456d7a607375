#include "runtime/jinja_parser.h"

#include "libkvshare/core/status_macros.h"
#include "runtime/jinja_expressions.h"
#include "runtime/utf8.h"

namespace kvshare::runtime::jinja {
namespace {

class Parser : private ExpressionParser {
 public:
  explicit Parser(std::vector<Token> tokens) : ExpressionParser(std::move(tokens)) {}

  Result<Block> Run() { return ParseBody({}); }

 private:
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

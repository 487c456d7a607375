#include "runtime/jinja_eval.h"

#include "libkvshare/core/status_macros.h"
#include "runtime/jinja_builtins.h"

namespace kvshare::runtime::jinja {
namespace {

// Statements and expressions within each other while they run, through the macros they call. With a sanitizer's frames
// of 11 KiB this is half of an 8 MiB stack. One syntax tree alone (kMaxSyntaxDepth) stays below it.
constexpr int kMaxRunDepth = 300;
static_assert(kMaxRunDepth > kMaxSyntaxDepth);

// Names and their values. A name is looked for here, then in the scope around. Shared, because a macro keeps the scope
// it was defined in.
struct Scope {
  std::vector<std::pair<std::string, Value>> names;
  std::shared_ptr<Scope> outer;

  const Value* Find(const std::string& name) const {
    for (const Scope* s = this; s != nullptr; s = s->outer.get()) {
      for (const auto& [known, value] : s->names) {
        if (known == name) return &value;
      }
    }
    return nullptr;
  }
  void Set(const std::string& name, Value value) {
    for (auto& [known, old] : names) {
      if (known == name) {
        old = std::move(value);
        return;
      }
    }
    names.emplace_back(name, std::move(value));
  }
};
using ScopePtr = std::shared_ptr<Scope>;

// The variable `loop`.
class Loop : public Object {
 public:
  explicit Loop(std::vector<Value> items) : items_(std::move(items)) {}

  std::string TypeName() const override { return "LoopContext"; }
  const std::vector<Value>& items() const { return items_; }
  void MoveTo(std::size_t i) { i_ = i; }

  Value Attribute(std::string_view name, Runtime* runtime) override {
    const auto i = static_cast<std::int64_t>(i_), n = static_cast<std::int64_t>(items_.size());
    if (name == "index") return Value::Int(i + 1);
    if (name == "index0") return Value::Int(i);
    if (name == "revindex") return Value::Int(n - i);
    if (name == "revindex0") return Value::Int(n - i - 1);
    if (name == "first") return Value::Bool(i == 0);
    if (name == "last") return Value::Bool(i + 1 == n);
    if (name == "length") return Value::Int(n);
    if (name == "depth") return Value::Int(1);  // of recursive loops, which are outside the subset
    if (name == "depth0") return Value::Int(0);
    if (name == "previtem") return i > 0 ? items_[i_ - 1] : Value::Undefined("there is no previous item");
    if (name == "nextitem") return i + 1 < n ? items_[i_ + 1] : Value::Undefined("there is no next item");
    if (name == "cycle") {
      return Value::Of(runtime->New<Function>([this](const Arguments& arguments, Runtime*) -> Result<Value> {
        if (arguments.positional.empty()) return InvalidArgument("no items for cycling given");
        return arguments.positional[i_ % arguments.positional.size()];
      }));
    }
    if (name == "changed") {
      return Value::Of(runtime->New<Function>([this](const Arguments& arguments, Runtime* rt) -> Result<Value> {
        KVS_ASSIGN_OR_RETURN(Value now, Value::Sequence(arguments.positional));
        KVS_ASSIGN_OR_RETURN(const bool same, Equal(now, last_changed_, &rt->budget));
        last_changed_ = std::move(now);
        return Value::Bool(!same);
      }));
    }
    return Object::Attribute(name, runtime);
  }

 private:
  const std::vector<Value> items_;
  std::size_t i_ = 0;
  Value last_changed_ = Value::None();
};

enum class Flow { kNext, kBreak, kContinue };

class Evaluator {
 public:
  explicit Evaluator(std::vector<std::pair<std::string, Value>> variables) : scope_(std::make_shared<Scope>()) {
    scope_->names = std::move(variables);
  }

  Result<std::string> Run(const Block& body) {
    std::string out;
    out_ = &out;
    KVS_RETURN_IF_ERROR(Exec(body).status());
    return out;
  }

 private:
  class Macro;

  // The failure, with the place where it began (once) unless it is the template's own message.
  Status At(const Place& place, const Status& status) {
    if (status.ok() || located_ || runtime_.raised) return status;
    located_ = true;
    return Status(status.code(), ErrorAt(place, status.message()).message());
  }
  template <typename T>
  Result<T> At(const Place& place, Result<T> result) {
    return result.ok() ? std::move(result) : Result<T>(At(place, result.status()));
  }

  // A scope inside the present one, for as long as this lives.
  class Inner {
   public:
    Inner(Evaluator* e, ScopePtr outer) : e_(e), saved_(std::move(e->scope_)) {
      e_->scope_ = std::make_shared<Scope>();
      e_->scope_->outer = outer == nullptr ? saved_ : std::move(outer);
    }
    ~Inner() { e_->scope_ = std::move(saved_); }
    Inner(const Inner&) = delete;
    Inner& operator=(const Inner&) = delete;

   private:
    Evaluator* e_;
    ScopePtr saved_;
  };

  // One statement or expression at work.
  class Running {
   public:
    explicit Running(Evaluator* e) : e_(e) { ++e_->run_depth_; }
    ~Running() { --e_->run_depth_; }
    Running(const Running&) = delete;
    Running& operator=(const Running&) = delete;
    // Pays for the step.
    Status Check() const {
      if (e_->run_depth_ > kMaxRunDepth) return ResourceExhausted("this nests too deep as it runs");
      return e_->runtime_.budget.Charge(1);
    }

   private:
    Evaluator* e_;
  };

  Status Emit(const std::string& text) {
    KVS_RETURN_IF_ERROR(runtime_.budget.ChargeBytes(
        out_->size() + text.size() > Budget::kStringBytes ? out_->size() + text.size() : text.size()));
    *out_ += text;
    return OkStatus();
  }

  Result<Flow> Exec(const Block& block) {
    for (const auto& statement : block) {
      KVS_ASSIGN_OR_RETURN(const Flow flow, ExecOne(*statement));
      if (flow != Flow::kNext) return flow;
    }
    return Flow::kNext;
  }

  Result<Flow> ExecOne(const Stmt& s) {
    const Running running(this);
    KVS_RETURN_IF_ERROR(At(s.place, running.Check()));
    switch (s.kind) {
      case Stmt::Kind::kText: KVS_RETURN_IF_ERROR(At(s.place, Emit(s.text))); return Flow::kNext;
      case Stmt::Kind::kPrint: {
        KVS_ASSIGN_OR_RETURN(const Value value, Eval(*s.expr));
        KVS_ASSIGN_OR_RETURN(const std::string text, At(s.place, ToText(value, &runtime_.budget)));
        KVS_RETURN_IF_ERROR(At(s.place, Emit(text)));
        return Flow::kNext;
      }
      case Stmt::Kind::kIf:
        for (const auto& [condition, body] : s.branches) {
          KVS_ASSIGN_OR_RETURN(const Value holds, Eval(*condition));
          if (holds.Truthy()) return Exec(body);
        }
        return Exec(s.body);
      case Stmt::Kind::kFor: return ExecFor(s);
      case Stmt::Kind::kSet: {
        KVS_ASSIGN_OR_RETURN(Value value, Eval(*s.expr));
        KVS_RETURN_IF_ERROR(Assign(s.target, std::move(value)));
        return Flow::kNext;
      }
      case Stmt::Kind::kSetBlock: {
        KVS_ASSIGN_OR_RETURN(Value value, Capture(s.body));
        if (s.expr != nullptr) {
          KVS_ASSIGN_OR_RETURN(value, EvalFilter(*s.expr, &value));
        }
        KVS_RETURN_IF_ERROR(Assign(s.target, std::move(value)));
        return Flow::kNext;
      }
      case Stmt::Kind::kMacro: scope_->Set(s.name, Value::Of(NewMacro(s))); return Flow::kNext;
      case Stmt::Kind::kFilterBlock: {
        KVS_ASSIGN_OR_RETURN(Value value, Capture(s.body));
        KVS_ASSIGN_OR_RETURN(value, EvalFilter(*s.expr, &value));
        KVS_ASSIGN_OR_RETURN(const std::string text, At(s.place, ToText(value, &runtime_.budget)));
        KVS_RETURN_IF_ERROR(At(s.place, Emit(text)));
        return Flow::kNext;
      }
      case Stmt::Kind::kScope: {
        std::vector<Value> values;  // of `with`: all see the scope around
        for (const auto& assign : s.assigns) {
          KVS_ASSIGN_OR_RETURN(Value value, Eval(*assign.second));
          values.push_back(std::move(value));
        }
        const Inner inner(this, nullptr);
        for (std::size_t i = 0; i < values.size(); ++i) {
          KVS_RETURN_IF_ERROR(Assign(s.assigns[i].first, std::move(values[i])));
        }
        return Exec(s.body);
      }
      case Stmt::Kind::kDo: KVS_RETURN_IF_ERROR(Eval(*s.expr).status()); return Flow::kNext;
      case Stmt::Kind::kBreak: return Flow::kBreak;
      case Stmt::Kind::kContinue: return Flow::kContinue;
    }
    return Flow::kNext;
  }

  Result<Flow> ExecFor(const Stmt& s) {
    KVS_ASSIGN_OR_RETURN(const Value source, Eval(*s.expr));
    KVS_ASSIGN_OR_RETURN(std::vector<Value> items, At(s.place, Iterate(source, &runtime_.budget)));
    if (s.condition != nullptr) {
      std::vector<Value> kept;
      for (Value& item : items) {
        const Inner inner(this, nullptr);
        KVS_RETURN_IF_ERROR(Assign(s.target, item));
        KVS_ASSIGN_OR_RETURN(const Value holds, Eval(*s.condition));
        if (holds.Truthy()) kept.push_back(std::move(item));
      }
      items = std::move(kept);
    }
    if (items.empty()) {
      const Inner inner(this, nullptr);
      return Exec(s.or_else);
    }
    auto* loop = runtime_.New<Loop>(std::move(items));
    for (std::size_t i = 0; i < loop->items().size(); ++i) {
      loop->MoveTo(i);
      const Inner inner(this, nullptr);
      scope_->Set("loop", Value::Of(loop));
      KVS_RETURN_IF_ERROR(Assign(s.target, loop->items()[i]));
      KVS_ASSIGN_OR_RETURN(const Flow flow, Exec(s.body));
      if (flow == Flow::kBreak) break;
    }
    return Flow::kNext;
  }

  Status Assign(const Target& target, Value value) {
    if (!target.parts.empty()) {
      KVS_ASSIGN_OR_RETURN(const auto items, At(target.place, Iterate(value, &runtime_.budget)));
      if (items.size() != target.parts.size()) {
        return At(target.place, InvalidArgument("cannot unpack " + std::to_string(items.size()) + " values into " +
                                                std::to_string(target.parts.size()) + " names"));
      }
      for (std::size_t i = 0; i < items.size(); ++i) KVS_RETURN_IF_ERROR(Assign(target.parts[i], items[i]));
      return OkStatus();
    }
    if (target.attribute.empty()) {
      scope_->Set(target.name, std::move(value));
      return OkStatus();
    }
    const Value* holder = scope_->Find(target.name);
    auto* ns =
        holder != nullptr && holder->kind() == Kind::kObject ? dynamic_cast<Namespace*>(holder->AsObject()) : nullptr;
    if (ns == nullptr) return At(target.place, InvalidArgument("cannot assign attribute on non-namespace object"));
    return At(target.place, ns->Set(target.attribute, std::move(value)));
  }

  // The body's output as a value, in a scope of its own.
  Result<Value> Capture(const Block& body) {
    std::string text;
    std::string* const outer = std::exchange(out_, &text);
    const Inner inner(this, nullptr);
    const Status done = Exec(body).status();
    out_ = outer;
    KVS_RETURN_IF_ERROR(done);
    return Value::Str(std::move(text));
  }

  Object* NewMacro(const Stmt& s);
  Result<Value> CallMacro(const Stmt& s, const ScopePtr& around, const Arguments& arguments);

  Result<Value> Eval(const Expr& e) {
    const Running running(this);
    KVS_RETURN_IF_ERROR(At(e.place, running.Check()));
    switch (e.kind) {
      case Expr::Kind::kConst: return e.value;
      case Expr::Kind::kName: {
        const Value* found = scope_->Find(e.name);
        return found != nullptr ? *found : GlobalFunction(e.name, &runtime_);
      }
      case Expr::Kind::kList:
      case Expr::Kind::kTuple: {
        KVS_ASSIGN_OR_RETURN(auto items, EvalAll(e.parts, 0));
        return At(e.place, Value::Sequence(std::move(items), e.kind == Expr::Kind::kTuple));
      }
      case Expr::Kind::kDict: {
        KVS_ASSIGN_OR_RETURN(auto items, EvalAll(e.parts, 0));
        Dict dict;
        for (std::size_t i = 0; i + 1 < items.size(); i += 2) {
          KVS_RETURN_IF_ERROR(At(e.place, dict.Set(items[i], std::move(items[i + 1]))));
        }
        return At(e.place, Value::Mapping(std::move(dict)));
      }
      case Expr::Kind::kAttr: {
        KVS_ASSIGN_OR_RETURN(const Value value, Eval(*e.parts[0]));
        return At(e.place, GetAttribute(value, e.name, &runtime_));
      }
      case Expr::Kind::kItem: return EvalItem(e);
      case Expr::Kind::kSlice: return At(e.place, Result<Value>(InvalidArgument("a slice outside brackets")));
      case Expr::Kind::kCall: {
        KVS_ASSIGN_OR_RETURN(const Value callee, Eval(*e.parts[0]));
        KVS_ASSIGN_OR_RETURN(const Arguments arguments, EvalArguments(e));
        if (callee.IsUndefined()) return At(e.place, Result<Value>(InvalidArgument(callee.WhyUndefined())));
        if (callee.kind() != Kind::kObject) {
          return At(e.place, Result<Value>(InvalidArgument("'" + callee.TypeName() + "' object is not callable")));
        }
        return At(e.place, callee.AsObject()->Call(arguments, &runtime_));
      }
      case Expr::Kind::kFilter: return EvalFilter(e, nullptr);
      case Expr::Kind::kTest: {
        KVS_ASSIGN_OR_RETURN(const Value value, Eval(*e.parts[0]));
        KVS_ASSIGN_OR_RETURN(const Arguments arguments, EvalArguments(e));
        KVS_ASSIGN_OR_RETURN(const bool holds, At(e.place, ApplyTest(e.name, value, arguments, &runtime_)));
        return Value::Bool(holds);
      }
      case Expr::Kind::kNot: {
        KVS_ASSIGN_OR_RETURN(const Value value, Eval(*e.parts[0]));
        return Value::Bool(!value.Truthy());
      }
      case Expr::Kind::kNegate:
      case Expr::Kind::kPlus: {
        KVS_ASSIGN_OR_RETURN(const Value value, Eval(*e.parts[0]));
        const Value zero = value.IsInt() ? Value::Int(0) : Value::Float(e.kind == Expr::Kind::kNegate ? -0.0 : 0.0);
        return At(e.place, Arithmetic(e.kind == Expr::Kind::kNegate ? "-" : "+", zero, value, &runtime_));
      }
      case Expr::Kind::kBinary: {
        KVS_ASSIGN_OR_RETURN(const Value a, Eval(*e.parts[0]));
        KVS_ASSIGN_OR_RETURN(const Value b, Eval(*e.parts[1]));
        return At(e.place, Arithmetic(e.name, a, b, &runtime_));
      }
      case Expr::Kind::kAnd:
      case Expr::Kind::kOr: {
        KVS_ASSIGN_OR_RETURN(Value left, Eval(*e.parts[0]));
        return left.Truthy() == (e.kind == Expr::Kind::kOr) ? std::move(left) : Eval(*e.parts[1]);
      }
      case Expr::Kind::kConcat: {
        KVS_ASSIGN_OR_RETURN(const auto items, EvalAll(e.parts, 0));
        KVS_ASSIGN_OR_RETURN(std::string text, At(e.place, JoinTexts(items, "", &runtime_.budget)));
        return Value::Str(std::move(text));
      }
      case Expr::Kind::kCompare: return EvalCompare(e);
      case Expr::Kind::kChoose: {
        KVS_ASSIGN_OR_RETURN(const Value holds, Eval(*e.parts[0]));
        if (holds.Truthy()) return Eval(*e.parts[1]);
        if (e.parts[2] != nullptr) return Eval(*e.parts[2]);
        return Value::Undefined("the inline if-expression evaluated to false and no else section was defined");
      }
    }
    return Value();
  }

  Result<std::vector<Value>> EvalAll(const std::vector<ExprPtr>& parts, std::size_t from) {
    std::vector<Value> values;
    for (std::size_t i = from; i < parts.size(); ++i) {
      KVS_ASSIGN_OR_RETURN(Value value, Eval(*parts[i]));
      values.push_back(std::move(value));
    }
    return values;
  }

  Result<Arguments> EvalArguments(const Expr& e) {
    Arguments arguments;
    KVS_ASSIGN_OR_RETURN(arguments.positional, EvalAll(e.parts, 1));
    for (const auto& [name, expr] : e.keywords) {
      KVS_ASSIGN_OR_RETURN(Value value, Eval(*expr));
      arguments.keywords.emplace_back(name, std::move(value));
    }
    return arguments;
  }

  Result<Value> EvalItem(const Expr& e) {
    KVS_ASSIGN_OR_RETURN(const Value value, Eval(*e.parts[0]));
    const Expr& index = *e.parts[1];
    if (index.kind != Expr::Kind::kSlice) {
      KVS_ASSIGN_OR_RETURN(const Value key, Eval(index));
      return At(e.place, GetItem(value, key, &runtime_));
    }
    Value bounds[3] = {Value::None(), Value::None(), Value::None()};
    for (std::size_t i = 0; i < 3; ++i) {
      if (index.parts[i] == nullptr) continue;
      KVS_ASSIGN_OR_RETURN(bounds[i], Eval(*index.parts[i]));
    }
    return At(e.place, GetSlice(value, bounds[0], bounds[1], bounds[2], &runtime_));
  }

  // `piped`: what a filter block's innermost filter applies to.
  Result<Value> EvalFilter(const Expr& e, const Value* piped) {
    Value value;
    if (e.parts[0] == nullptr) {
      if (piped != nullptr) value = *piped;
    } else if (piped != nullptr && e.parts[0]->kind == Expr::Kind::kFilter) {
      KVS_ASSIGN_OR_RETURN(value, EvalFilter(*e.parts[0], piped));
    } else {
      KVS_ASSIGN_OR_RETURN(value, Eval(*e.parts[0]));
    }
    KVS_ASSIGN_OR_RETURN(const Arguments arguments, EvalArguments(e));
    return At(e.place, ApplyFilter(e.name, value, arguments, &runtime_));
  }

  Result<bool> Compares(const std::string& op, const Value& a, const Value& b) {
    if (op == "==" || op == "!=") {
      KVS_ASSIGN_OR_RETURN(const bool same, Equal(a, b, &runtime_.budget));
      return same == (op == "==");
    }
    if (op == "in" || op == "not in") {
      KVS_ASSIGN_OR_RETURN(const bool contains, Contains(b, a, &runtime_));
      return contains == (op == "in");
    }
    KVS_ASSIGN_OR_RETURN(const int order, Compare(a, b, &runtime_.budget));
    return op == "<" ? order < 0 : op == "<=" ? order <= 0 : op == ">" ? order > 0 : order >= 0;
  }

  Result<Value> EvalCompare(const Expr& e) {
    KVS_ASSIGN_OR_RETURN(Value left, Eval(*e.parts[0]));
    for (std::size_t i = 0; i < e.operators.size(); ++i) {
      KVS_ASSIGN_OR_RETURN(Value right, Eval(*e.parts[i + 1]));
      KVS_ASSIGN_OR_RETURN(const bool holds, At(e.place, Compares(e.operators[i], left, right)));
      if (!holds) return Value::Bool(false);
      left = std::move(right);
    }
    return Value::Bool(true);
  }

  Runtime runtime_;
  ScopePtr scope_;
  std::string* out_ = nullptr;
  bool located_ = false;
  int run_depth_ = 0;
};

class Evaluator::Macro : public Object {
 public:
  Macro(Evaluator* evaluator, const Stmt* definition, ScopePtr around)
      : evaluator_(evaluator), definition_(definition), around_(std::move(around)) {}
  std::string TypeName() const override { return "Macro"; }
  bool IsCallable() const override { return true; }
  Result<Value> Call(const Arguments& arguments, Runtime*) override {
    return evaluator_->CallMacro(*definition_, around_, arguments);
  }

 private:
  Evaluator* const evaluator_;
  const Stmt* const definition_;
  const ScopePtr around_;
};

Object* Evaluator::NewMacro(const Stmt& s) { return runtime_.New<Macro>(this, &s, scope_); }

Result<Value> Evaluator::CallMacro(const Stmt& s, const ScopePtr& around, const Arguments& arguments) {
  if (arguments.positional.size() > s.parameters.size()) {
    return InvalidArgument("macro '" + s.name + "' takes not more than " + std::to_string(s.parameters.size()) +
                           " argument(s)");
  }
  for (const auto& keyword : arguments.keywords) {
    bool known = false;
    for (const auto& parameter : s.parameters) known = known || parameter.first == keyword.first;
    if (!known) return InvalidArgument("macro '" + s.name + "' takes no keyword argument '" + keyword.first + "'");
  }
  const Inner inner(this, around);
  for (std::size_t i = 0; i < s.parameters.size(); ++i) {
    const auto& [name, fallback] = s.parameters[i];
    Value value = Value::Undefined("parameter '" + name + "' was not provided");
    if (const Value* given = arguments.Get(i, name)) {
      value = *given;
    } else if (fallback != nullptr) {
      KVS_ASSIGN_OR_RETURN(value, Eval(*fallback));
    }
    scope_->Set(name, std::move(value));
  }
  return Capture(s.body);
}

}  // namespace

Result<std::string> Render(const Block& body, std::vector<std::pair<std::string, Value>> variables) {
  Evaluator evaluator(std::move(variables));
  return evaluator.Run(body);
}

}  // namespace kvshare::runtime::jinja

// JSON text to template values, straight from the parser's events: keys keep their order, and depth is bounded on the
// way.
#include <nlohmann/json.hpp>

#include "runtime/jinja_value.h"

namespace kvshare::runtime::jinja {
namespace {

class Builder : public nlohmann::json_sax<nlohmann::json> {
 public:
  bool null() override { return Add(Value::None()); }
  bool boolean(bool b) override { return Add(Value::Bool(b)); }
  bool number_integer(number_integer_t i) override { return Add(Value::Int(i)); }
  bool number_unsigned(number_unsigned_t u) override {
    if (u > static_cast<number_unsigned_t>(INT64_MAX)) return Fail(InvalidArgument("an integer beyond 64 bits"));
    return Add(Value::Int(static_cast<std::int64_t>(u)));
  }
  bool number_float(number_float_t d, const string_t& text) override {
    if (text.find_first_of(".eE") == string_t::npos) return Fail(InvalidArgument("an integer beyond 64 bits"));
    return Add(Value::Float(d));
  }
  bool string(string_t& text) override { return Add(Value::Str(std::move(text))); }
  bool binary(binary_t&) override { return Fail(InvalidArgument("binary data")); }
  bool start_object(std::size_t) override { return Open(true); }
  bool start_array(std::size_t) override { return Open(false); }
  bool key(string_t& text) override {
    open_.back().key = std::move(text);
    return true;
  }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) override {
    return Fail(InvalidArgument("not valid JSON at byte " + std::to_string(position)));
  }

  Result<Value> Take() {
    if (!status_.ok()) return status_;
    return root_;
  }

 private:
  struct Level {
    bool is_object = false;
    std::string key;
    std::vector<Value> items;
    Dict dict;
  };

  bool Fail(Status status) {
    if (status_.ok()) status_ = std::move(status);
    return false;
  }
  bool Open(bool is_object) {
    // Templates may nest what they are given a little further.
    if (open_.size() >= Budget::kValueDepth / 2) return Fail(InvalidArgument("JSON nests too deep"));
    open_.push_back({.is_object = is_object});
    return true;
  }
  bool Close() {
    Level level = std::move(open_.back());
    open_.pop_back();
    auto value = level.is_object ? Value::Mapping(std::move(level.dict)) : Value::Sequence(std::move(level.items));
    return value.ok() ? Add(std::move(*value)) : Fail(value.status());
  }
  bool Add(Value value) {
    if (open_.empty()) {
      root_ = std::move(value);
    } else if (open_.back().is_object) {
      const Status set = open_.back().dict.Set(Value::Str(open_.back().key), std::move(value));
      if (!set.ok()) return Fail(set);
    } else {
      open_.back().items.push_back(std::move(value));
    }
    return true;
  }

  std::vector<Level> open_;
  Value root_;
  Status status_;
};

}  // namespace

Result<Value> ParseJsonValue(std::string_view text) {
  Builder builder;
  nlohmann::json::sax_parse(text.begin(), text.end(), &builder);
  return builder.Take();
}

}  // namespace kvshare::runtime::jinja

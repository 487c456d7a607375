#include "runtime/chat_template.h"

#include <utility>
#include <vector>

#include "libkvshare/core/status_macros.h"
#include "runtime/jinja_eval.h"
#include "runtime/jinja_parser.h"
#include "runtime/jinja_value.h"
#include "runtime/utf8.h"

namespace kvshare::runtime {
namespace {

using jinja::Kind;
using jinja::Value;

std::string FieldName(std::size_t message, const std::string& field) {
  return "messages[" + std::to_string(message) + "]." + field;
}

Status WrongField(std::size_t message, const std::string& field, const char* wanted, const Value* found) {
  const std::string name = FieldName(message, field);
  if (found == nullptr) return InvalidArgument(name + " is missing: it must be " + wanted);
  return InvalidArgument(name + " must be " + wanted + ", not " + found->TypeName());
}

Status CheckParts(std::size_t message, const Value& content) {
  const auto& parts = content.AsList().items;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const std::string field = "content[" + std::to_string(i) + "]";
    if (!parts[i].IsDict()) return WrongField(message, field, "an object with type and text", &parts[i]);
    const Value* type = parts[i].AsDict().Find("type");
    if (type == nullptr || !type->IsString()) return WrongField(message, field + ".type", "a string", type);
    if (type->AsString() != "text") {
      return InvalidArgument(FieldName(message, field) + " has type '" + type->AsString().substr(0, 40) +
                             "': only text parts are supported");
    }
    const Value* text = parts[i].AsDict().Find("text");
    if (text == nullptr || !text->IsString()) return WrongField(message, field + ".text", "a string", text);
  }
  return OkStatus();
}

Status CheckMessages(const Value& messages) {
  if (!messages.IsList()) return InvalidArgument("messages must be a list of objects, not " + messages.TypeName());
  const auto& list = messages.AsList().items;
  if (list.empty()) return InvalidArgument("messages is empty: it must have at least one message");
  for (std::size_t i = 0; i < list.size(); ++i) {
    if (!list[i].IsDict()) {
      return InvalidArgument("messages[" + std::to_string(i) + "] must be an object, not " + list[i].TypeName());
    }
    const jinja::Dict& message = list[i].AsDict();
    const Value* role = message.Find("role");
    if (role == nullptr || !role->IsString()) return WrongField(i, "role", "a string", role);
    const Value* calls = message.Find("tool_calls");
    const bool has_calls = calls != nullptr && !calls->IsNone();
    if (has_calls && !calls->IsList()) return WrongField(i, "tool_calls", "a list", calls);
    const Value* content = message.Find("content");
    if (content != nullptr && content->IsList()) {
      KVS_RETURN_IF_ERROR(CheckParts(i, *content));
    } else if (!(content != nullptr && content->IsString()) &&
               !((content == nullptr || content->IsNone()) && has_calls)) {
      return WrongField(i, "content", "a string or a list of text parts (null only beside tool_calls)", content);
    }
  }
  return OkStatus();
}

class JinjaTemplate : public ChatTemplate {
 public:
  JinjaTemplate(jinja::Block body, ChatTemplateTokens tokens) : body_(std::move(body)), tokens_(std::move(tokens)) {}

  Result<std::string> Render(std::string_view messages_json, std::string_view tools_json,
                             bool add_generation_prompt) const override {
    auto messages = jinja::ParseJsonValue(messages_json);
    if (!messages.ok()) return messages.status().WithContext("messages");
    KVS_RETURN_IF_ERROR(CheckMessages(*messages));
    Value tools = Value::None();
    if (!tools_json.empty()) {
      auto parsed = jinja::ParseJsonValue(tools_json);
      if (!parsed.ok()) return parsed.status().WithContext("tools");
      if (!parsed->IsList()) return InvalidArgument("tools must be a list, not " + parsed->TypeName());
      tools = std::move(*parsed);
    }
    // The variables that transformers gives a template. A token that the model lacks stays undefined there too.
    std::vector<std::pair<std::string, Value>> variables = {
        {"messages", std::move(*messages)},
        {"tools", std::move(tools)},
        {"documents", Value::None()},
        {"add_generation_prompt", Value::Bool(add_generation_prompt)},
    };
    if (!tokens_.bos.empty()) variables.emplace_back("bos_token", Value::Str(tokens_.bos));
    if (!tokens_.eos.empty()) variables.emplace_back("eos_token", Value::Str(tokens_.eos));
    auto text = jinja::Render(body_, std::move(variables));
    if (!text.ok()) return text.status().WithContext("chat template");
    return text;
  }

 private:
  const jinja::Block body_;
  const ChatTemplateTokens tokens_;
};

}  // namespace

Result<std::unique_ptr<ChatTemplate>> NewChatTemplate(std::string_view source, ChatTemplateTokens tokens) {
  tokens.bos = RepairUtf8(tokens.bos);
  tokens.eos = RepairUtf8(tokens.eos);
  auto body = jinja::Parse(source);
  if (!body.ok()) return body.status().WithContext("chat template");
  return std::unique_ptr<ChatTemplate>(std::make_unique<JinjaTemplate>(std::move(*body), std::move(tokens)));
}

}  // namespace kvshare::runtime

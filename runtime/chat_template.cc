#include "runtime/chat_template.h"

#include <algorithm>
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

bool AllAreText(const Value& messages) {
  return std::all_of(messages.AsList().items.begin(), messages.AsList().items.end(), [](const Value& message) {
    const Value* content = message.AsDict().Find("content");
    return content != nullptr && content->IsString();
  });
}

// Text parts joined by line ends, and "" for the content of tool calls alone: what templates can read that take content
// for a string. As vLLM and llama.cpp do; transformers fails there.
Result<Value> AsText(const Value& messages) {
  std::vector<Value> list = messages.AsList().items;
  for (Value& message : list) {
    jinja::Dict dict = message.AsDict();
    const Value* content = dict.Find("content");
    if (content != nullptr && content->IsString()) continue;
    std::string text;
    if (content != nullptr && content->IsList()) {
      for (const Value& part : content->AsList().items) {
        if (!text.empty()) text += '\n';
        text += part.AsDict().Find("text")->AsString();
      }
    }
    KVS_RETURN_IF_ERROR(dict.Set(Value::Str("content"), Value::Str(std::move(text))));
    KVS_ASSIGN_OR_RETURN(message, Value::Mapping(std::move(dict)));
  }
  return Value::Sequence(std::move(list));
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
    Result<std::string> text = RenderValues(*messages, tools, add_generation_prompt);
    if (text.ok()) return text;
    if (text.status().code() == StatusCode::kInvalidArgument && !AllAreText(*messages)) {
      KVS_ASSIGN_OR_RETURN(const Value as_text, AsText(*messages));
      if (auto again = RenderValues(as_text, tools, add_generation_prompt); again.ok()) return again;
    }
    return text.status().WithContext("chat template");
  }

 private:
  Result<std::string> RenderValues(const Value& messages, const Value& tools, bool add_generation_prompt) const {
    // The variables that transformers gives a template. A token that the model lacks stays undefined there too.
    std::vector<std::pair<std::string, Value>> variables = {
        {"messages", messages},
        {"tools", tools},
        {"documents", Value::None()},
        {"add_generation_prompt", Value::Bool(add_generation_prompt)},
    };
    if (!tokens_.bos.empty()) variables.emplace_back("bos_token", Value::Str(tokens_.bos));
    if (!tokens_.eos.empty()) variables.emplace_back("eos_token", Value::Str(tokens_.eos));
    return jinja::Render(body_, std::move(variables));
  }

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

// ChatTemplate: chat messages to prompt text through the Jinja subset that model files use
// (docs/design/chat-template.md).
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "kvshare/status.h"

namespace kvshare::runtime {

struct ChatTemplateTokens {
  std::string bos;
  std::string eos;
};

// Immutable once made; safe from any thread.
class ChatTemplate {
 public:
  virtual ~ChatTemplate() = default;

  // `messages_json`: a non-empty JSON array of objects with a string `role` and a `content` that is a string, null
  // (with tool_calls) or a list of text parts; `tools_json`: a JSON array or empty. Returns InvalidArgument naming the
  // message and field that is wrong, or with the template's own raise_exception text; ResourceExhausted when rendering
  // exceeds its bounds (steps, output bytes, depth).
  virtual Result<std::string> Render(std::string_view messages_json, std::string_view tools_json,
                                     bool add_generation_prompt) const = 0;
};

// InvalidArgument with line and column when the template does not parse or uses what the subset lacks.
Result<std::unique_ptr<ChatTemplate>> NewChatTemplate(std::string_view source, ChatTemplateTokens tokens);

}  // namespace kvshare::runtime

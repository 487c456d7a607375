// kvctl tokenize, detokenize, render: text to token ids and back. JSON lines in, JSON lines out, in order.
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>
#include <span>

#include "libkvshare/core/json_text.h"
#include "libkvshare/core/status_macros.h"
#include "tools/kvctl/commands.h"
#include "tools/kvctl/files.h"
#include "tools/kvctl/target.h"

namespace kvshare::kvctl {
namespace {

using Json = nlohmann::ordered_json;

void Print(const Json& json) { std::puts(JsonText(json).c_str()); }

// The text half of a model, from a daemon or from files; with files no KV pool is made.
class TextSource {
 public:
  int Open(const Source& source) {
    if (!source.endpoint.empty()) {
      Failure failure;
      target_ = Target::Open(TargetOf(source), &failure);
      return target_ ? kOk : Fail(failure);
    }
    auto model = LoadModelAt(source.model, LoadOptionsOf(source));
    if (!model.ok()) return Fail(kModel, model.status().message());
    model_ = std::move(*model);
    if (model_->tokenizer() == nullptr) return Fail(kModel, source.model + ": has no tokenizer");
    return kOk;
  }

  Result<std::vector<TokenId>> Tokenize(const std::string& text) {
    if (target_) return target_->client().Tokenize(text);
    return model_->tokenizer()->Encode(text);
  }

  Result<std::string> Detokenize(const std::vector<TokenId>& ids) {
    if (target_) return target_->client().Detokenize(ids);
    KVS_RETURN_IF_ERROR(CheckIds(ids, model_->tokenizer()->vocab_size()));
    return model_->tokenizer()->Decode(ids);
  }

  Result<RenderReply> Render(const ChatPrompt& chat) {
    if (target_) return target_->client().Render({chat});
    if (model_->chat_template() == nullptr) return InvalidArgument("the model has no chat template");
    RenderReply reply;
    KVS_ASSIGN_OR_RETURN(
        reply.prompt, model_->chat_template()->Render(chat.messages_json, chat.tools_json, chat.add_generation_prompt));
    reply.ids = model_->tokenizer()->Encode(reply.prompt);
    return reply;
  }

 private:
  std::unique_ptr<Target> target_;
  std::unique_ptr<runtime::Model> model_;
};

// Applies `line_to_json` to each line; the first that fails is named.
int ForEachLine(const TextOptions& options,
                const std::function<Result<Json>(TextSource&, const std::string&)>& line_to_json) {
  const auto content = ReadFile(options.jsonl_file);
  if (!content.ok()) return Fail(content.status());
  TextSource source;
  if (const int code = source.Open(options.source); code != kOk) return code;
  std::size_t number = 0;
  for (std::size_t begin = 0; begin < content->size() && !Interrupted();) {
    const std::size_t end = std::min(content->find('\n', begin), content->size());
    const std::string line = content->substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == line.npos) continue;
    const auto json = line_to_json(source, line);
    if (!json.ok()) return Fail(json.status().WithContext(options.jsonl_file + ": line " + std::to_string(number)));
    Print(*json);
  }
  return Interrupted() ? kInterrupted : kOk;
}

}  // namespace

int RunTokenize(const TextOptions& options) {
  return ForEachLine(options, [](TextSource& source, const std::string& line) -> Result<Json> {
    KVS_ASSIGN_OR_RETURN(const std::string text, ParseTextLine(line));
    KVS_ASSIGN_OR_RETURN(const auto ids, source.Tokenize(text));
    return Json{{"ids", ids}};
  });
}

int RunDetokenize(const TextOptions& options) {
  return ForEachLine(options, [](TextSource& source, const std::string& line) -> Result<Json> {
    KVS_ASSIGN_OR_RETURN(const auto ids, ParseIds(line, true));
    KVS_ASSIGN_OR_RETURN(const std::string text, source.Detokenize(ids));
    return Json{{"text", text}};
  });
}

int RunRender(const TextOptions& options) {
  ChatPrompt chat{.add_generation_prompt = options.add_generation_prompt};
  const auto messages = ReadMessages(options.messages_file);
  if (!messages.ok()) return Fail(messages.status());
  const auto tools = ReadTools(options.tools_file);
  if (!tools.ok()) return Fail(tools.status());
  chat.messages_json = *messages;
  chat.tools_json = *tools;
  TextSource source;
  if (const int code = source.Open(options.source); code != kOk) return code;
  const auto reply = source.Render(chat);
  if (!reply.ok()) return Fail(reply.status().WithContext(options.messages_file));
  Print(Json{{"prompt", reply->prompt}, {"ids", reply->ids}});
  return kOk;
}

}  // namespace kvshare::kvctl

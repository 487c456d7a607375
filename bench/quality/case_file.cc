// Cases from a file of JSON lines: chat messages through the model's own template.
#include <algorithm>
#include <optional>
#include <set>
#include <span>
#include <utility>

#include "bench/quality/prompt.h"
#include "bench/quality/quality_run.h"
#include "bench/quality/suite.h"
#include "libkvshare/core/hash.h"
#include "libkvshare/core/status_macros.h"
#include "runtime/json.h"

namespace kvshare::quality {
namespace {

using runtime::Json;

// Tokens of exact's greedy reply that are compared.
constexpr int kReplyTokens = 32;

std::string_view Trimmed(std::string_view text) {
  constexpr std::string_view kBlank = " \t\r\n";
  const std::size_t first = text.find_first_not_of(kBlank);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kBlank) - first + 1);
}

// Fields of one line that must hold before anything is rendered.
struct Line {
  Json messages;
  std::set<std::size_t> shared;
  bool has_question = false;
};

Result<Line> ReadLine(const Json& json) {
  Line line;
  const Json* messages = runtime::FindField(json, "messages");
  if (messages == nullptr || !messages->is_array() || messages->empty())
    return InvalidArgument("'messages' must be an array of chat messages, at least one");
  for (std::size_t i = 0; i < messages->size(); ++i) {
    const Json& message = (*messages)[i];
    const bool object = message.is_object();
    for (const char* field : {"role", "content"}) {
      if (!object || !message.contains(field) || !message[field].is_string())
        return InvalidArgument("message " + std::to_string(i) + " needs a string '" + field + "'");
    }
  }
  line.messages = *messages;
  const Json* shared = runtime::FindField(json, "shared");
  if (shared != nullptr && !shared->is_array()) return InvalidArgument("'shared' must be an array of message indexes");
  for (std::size_t i = 0; shared != nullptr && i < shared->size(); ++i) {
    const Json& index = (*shared)[i];
    if (!index.is_number_unsigned() || index.get<std::uint64_t>() >= messages->size())
      return InvalidArgument("'shared' holds " + index.dump() + ", which is the index of no message");
    line.shared.insert(static_cast<std::size_t>(index.get<std::uint64_t>()));
  }
  KVS_ASSIGN_OR_RETURN(const std::string question, runtime::GetString(json, "question", ""));
  if (!question.empty()) {
    line.messages.push_back({{"role", "user"}, {"content", question}});
    line.has_question = true;
  }
  return line;
}

// Finds every message's text in the rendered prompt, one after another; the shared ones become chunks. Text that the
// template left out or rewrote is nowhere to be found and stays fresh.
void FindChunks(const Line& line, PromptText* text) {
  std::size_t at = 0;
  for (std::size_t i = 0; i < line.messages.size(); ++i) {
    const std::string content = line.messages[i]["content"].get<std::string>();
    const std::string_view core = Trimmed(content);
    const std::size_t found = core.empty() ? std::string::npos : text->text.find(core, at);
    if (found == std::string::npos) continue;
    at = found + core.size();
    text->suffix_begin = found;
    if (!line.shared.contains(i)) continue;
    const Json& message = line.messages[i];
    const Json* name = runtime::FindField(message, "name");
    const std::string producer =
        name != nullptr && name->is_string() ? name->get<std::string>() : message["role"].get<std::string>();
    text->chunks.push_back({found, at, PlainSha256(std::as_bytes(std::span(core))).Hex(),
                            "message_" + std::to_string(text->chunks.size()), producer});
  }
}

Result<std::pair<JudgedCase, bool>> ReadCase(const runtime::Model& model, std::string_view source,
                                             const std::string& place) {
  KVS_ASSIGN_OR_RETURN(const Json json, runtime::ParseJsonObject(source));
  KVS_ASSIGN_OR_RETURN(const Line line, ReadLine(json));
  JudgedCase judged;
  judged.contained = true;
  KVS_ASSIGN_OR_RETURN(judged.c.id, runtime::GetString(json, "id", place));
  KVS_ASSIGN_OR_RETURN(judged.kind, runtime::GetString(json, "kind", "case"));
  KVS_ASSIGN_OR_RETURN(judged.c.agent, runtime::GetString(json, "agent", "reader"));
  KVS_ASSIGN_OR_RETURN(const std::string answer, runtime::GetString(json, "answer", ""));
  KVS_ASSIGN_OR_RETURN(const bool warm_up, runtime::GetBool(json, "warm_up", false));
  KVS_ASSIGN_OR_RETURN(judged.c.session, runtime::GetString(json, "session", judged.c.id));
  if (!answer.empty()) {
    if (IsRight("", answer, judged.contained)) {
      return InvalidArgument("'answer' is '" + answer + "', which holds no word, so that every reply would be right");
    }
    judged.answer = answer;
  }
  PromptText text;
  KVS_ASSIGN_OR_RETURN(text.text, model.chat_template()->Render(line.messages.dump(), "", true));
  FindChunks(line, &text);
  KVS_RETURN_IF_ERROR(Tokenise(*model.tokenizer(), text, &judged.c));
  const std::int64_t room = model.config().max_positions - kReplyTokens;
  if (static_cast<std::int64_t>(judged.c.prompt.size()) > room) {
    return InvalidArgument("the prompt has " + std::to_string(judged.c.prompt.size()) + " tokens, and the model's " +
                           "window leaves " + std::to_string(room) + " before the reply");
  }
  return std::pair(std::move(judged), warm_up);
}

}  // namespace

Result<Suite> FileSuite(const runtime::Model& model, const std::string& jsonl, std::int64_t limit) {
  if (model.tokenizer() == nullptr || model.chat_template() == nullptr)
    return InvalidArgument("cases are chat messages, and this model has no chat template");
  Suite suite;
  suite.max_answer_tokens = kReplyTokens;
  std::int64_t number = 0;
  for (std::size_t at = 0; at < jsonl.size() && (limit == 0 || suite.samples < limit);) {
    const std::size_t end = std::min(jsonl.find('\n', at), jsonl.size());
    const std::string_view source = std::string_view(jsonl).substr(at, end - at);
    at = end + 1;
    ++number;
    if (Trimmed(source).empty()) continue;
    const std::string place = "line " + std::to_string(number);
    auto read = ReadCase(model, source, place);
    if (!read.ok()) return read.status().WithContext(place);
    if (read->second) {
      suite.warm_up.push_back(std::move(read->first.c));
    } else {
      suite.judged.push_back(std::move(read->first));
      ++suite.samples;
    }
  }
  if (suite.judged.empty()) return InvalidArgument("no case to judge");
  return suite;
}

}  // namespace kvshare::quality

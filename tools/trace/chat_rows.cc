#include "tools/trace/chat_rows.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <limits>
#include <utility>

#include "libkvshare/core/json_text.h"
#include "libkvshare/core/status_macros.h"
#include "tools/trace/fields.h"

namespace kvshare::trace {
namespace {

using Json = nlohmann::json;

std::string Dump(const Json& json) { return JsonText(json); }

// The member if it is there and not null.
const Json* Find(const Json* object, const char* name) {
  if (object == nullptr || !object->is_object()) return nullptr;
  const auto it = object->find(name);
  return it == object->end() || it->is_null() ? nullptr : &*it;
}

const Json* FindFirst(std::initializer_list<const Json*> objects, std::initializer_list<const char*> names) {
  for (const char* name : names) {
    for (const Json* object : objects) {
      if (const Json* found = Find(object, name)) return found;
    }
  }
  return nullptr;
}

// The request as the API took it: the line itself, a batch line's "body", a log line's "request" (and its "body").
const Json* RequestOf(const Json& line) {
  const Json* request = Find(&line, "request");
  if (request != nullptr && request->is_object()) {
    const Json* body = Find(request, "body");
    return body != nullptr && body->is_object() ? body : request;
  }
  const Json* body = Find(&line, "body");
  return body != nullptr && body->is_object() ? body : &line;
}

// Text, or the text parts of a list; parts without text (images) are left out.
std::string TextOf(const Json* content) {
  if (content == nullptr) return "";
  if (content->is_string()) return content->get<std::string>();
  if (!content->is_array()) return Dump(*content);
  std::string text;
  for (const Json& part : *content) {
    const Json* own = part.is_string() ? &part : FindFirst({&part}, {"text", "content"});
    if (own == nullptr || !own->is_string()) continue;
    text += (text.empty() ? "" : "\n") + own->get<std::string>();
  }
  return text;
}

std::string MessageText(const Json& message) {
  std::string text = TextOf(Find(&message, "content"));
  if (const Json* calls = Find(&message, "tool_calls"); calls != nullptr && calls->is_array() && !calls->empty()) {
    Json functions = Json::array();
    for (const Json& call : *calls) {
      const Json* function = Find(&call, "function");
      functions.push_back(function != nullptr ? *function : call);
    }
    text += "\n" + Dump(functions);
  }
  if (const Json* call = Find(&message, "function_call")) text += "\n" + Dump(*call);
  return text;
}

// A reply as text, a message, a completion, or a logged HTTP response that holds one.
Result<std::optional<std::string>> ReplyText(const Json* reply) {
  if (const Json* body = Find(reply, "body")) reply = body;
  if (reply == nullptr) return std::optional<std::string>();
  if (reply->is_string()) return std::optional(reply->get<std::string>());
  if (reply->is_array()) {  // the items of a "Responses" output
    std::string text;
    for (const Json& item : *reply) text += MessageText(item);
    return std::optional(text);
  }
  if (const Json* choices = Find(reply, "choices"); choices != nullptr && choices->is_array()) {
    if (choices->empty()) return std::optional<std::string>();
    if (const Json* message = Find(&(*choices)[0], "message")) return std::optional(MessageText(*message));
    return std::optional(TextOf(Find(&(*choices)[0], "text")));
  }
  if (Find(reply, "role") != nullptr || Find(reply, "content") != nullptr) return std::optional(MessageText(*reply));
  if (const Json* items = Find(reply, "output"); items != nullptr && items->is_array()) return ReplyText(items);
  if (Find(reply, "error") != nullptr) return std::optional<std::string>();
  return Fields::Wrong("response", "is neither text nor a chat reply");
}

// "Thu, 27 Nov 2025 05:51:54 GMT", "2025-11-27T05:51:54.123Z" or "2025-11-27 11:21:54,123+0530" (UTC unless it says
// otherwise) to ms since 1970.
std::optional<double> DateMs(const std::string& text) {
  std::tm tm{};
  const char* rest = strptime(text.c_str(), "%a, %d %b %Y %H:%M:%S", &tm);
  if (rest == nullptr) {
    tm = {};
    rest = strptime(text.c_str(), "%Y-%m-%d", &tm);
    if (rest != nullptr && (*rest == 'T' || *rest == ' ')) rest = strptime(rest + 1, "%H:%M:%S", &tm);
  }
  if (rest == nullptr) return std::nullopt;
  double ms = static_cast<double>(timegm(&tm)) * 1000;
  double digit = 100;
  if (*rest == '.' || *rest == ',') {
    for (++rest; *rest >= '0' && *rest <= '9'; ++rest, digit /= 10) ms += digit * (*rest - '0');
  }
  int hours = 0, minutes = 0;
  if (*rest == '+' || *rest == '-') {
    if (std::sscanf(rest + 1, "%2d:%2d", &hours, &minutes) < 2) std::sscanf(rest + 1, "%2d%2d", &hours, &minutes);
    ms -= (*rest == '+' ? 1 : -1) * (hours * 60 + minutes) * 60000.0;
  }
  return ms;
}

// Numbers: a clock that counts from 1970 is told by its size (s, ms, us or ns); anything smaller is milliseconds.
Result<std::optional<double>> Timestamp(const Json& line, const Json* response) {
  const Json* time = FindFirst({&line}, {"timestamp", "date", "created_at", "start_time", "time", "created"});
  if (time == nullptr) time = FindFirst({response, Find(response, "body")}, {"created", "created_at"});
  if (time == nullptr) return std::optional<double>();
  if (time->is_string()) {
    const auto ms = DateMs(time->get<std::string>());
    if (!ms) return InvalidArgument("a date that cannot be read: " + Dump(*time));
    return ms;
  }
  const double value = time->is_number() ? time->get<double>() : -1;
  if (!(value >= 0 && value < 1e20)) return Fields::Wrong("timestamp", "is neither a time nor a date");
  if (value >= 1e17) return std::optional(value / 1e6);
  if (value >= 1e14) return std::optional(value / 1e3);
  if (value >= 1e11 || value < 1e9) return std::optional(value);
  return std::optional(value * 1e3);
}

// "You are the planner. ..." names an agent where the log does not.
std::string AgentOf(const std::vector<ChatRow::Message>& messages) {
  for (const ChatRow::Message& message : messages) {
    if (message.role != "system" && message.role != "developer") continue;
    if (!message.text.starts_with("You are ")) break;
    std::string_view rest = std::string_view(message.text).substr(8);
    for (const std::string_view article : {"an ", "a ", "the "}) {
      if (rest.starts_with(article)) {
        rest.remove_prefix(article.size());
        break;
      }
    }
    std::size_t end = std::min(rest.find_first_of(".\n"), rest.size());
    end = std::min<std::size_t>(end, 60);
    while (end < rest.size() && end > 0 && (static_cast<unsigned char>(rest[end]) & 0xc0) == 0x80) --end;
    if (end > 0) return std::string(rest.substr(0, end));
    break;
  }
  return "agent";
}

// `instructions`, or null, is a system message before the list's.
Status ReadMessages(const Json* instructions, const Json& list, ChatRow* row) {
  if (!list.is_array() || list.empty()) return Fields::Wrong("messages", "is not a list with something in it");
  Json messages = Json::array();
  if (instructions != nullptr && instructions->is_string()) {
    messages.push_back({{"role", "system"}, {"content", *instructions}});
  }
  messages.insert(messages.end(), list.begin(), list.end());
  for (const Json& message : messages) {
    const Json* role = Find(&message, "role");
    if (role == nullptr || !role->is_string() || role->get_ref<const std::string&>().empty()) {
      return Fields::Wrong("messages", "holds something that is no message with a role");
    }
    const std::string name = role->get<std::string>();
    if (name == "+" || name == kRawRole)
      return Fields::Wrong("messages", "has the role \"" + name + "\", kept for KTR");
    row->messages.push_back({name, MessageText(message)});
  }
  row->messages_json = Dump(messages);
  return OkStatus();
}

Status ReadPrompt(const Json& prompt, ChatRow* row) {
  if (prompt.is_string()) {
    row->messages.push_back({kRawRole, prompt.get<std::string>()});
    return OkStatus();
  }
  const auto token = [](const Json& id) {
    return (id.is_number_integer() || id.is_number_unsigned()) && id.get<double>() >= 0 &&
           id.get<double>() <= std::numeric_limits<TokenId>::max();
  };
  if (!prompt.is_array() || prompt.empty() || !std::all_of(prompt.begin(), prompt.end(), token)) {
    return Fields::Wrong("prompt", "is neither text nor a list of token ids");
  }
  if (prompt.size() > static_cast<std::size_t>(kMaxTokens)) return Fields::Wrong("prompt", "is too long");
  row->ids = prompt.get<std::vector<TokenId>>();
  return OkStatus();
}

std::int64_t TokenCount(const Json* usage, std::initializer_list<const char*> names) {
  const Json* count = FindFirst({usage}, names);
  if (count == nullptr || !count->is_number()) return 0;
  const double value = count->get<double>();
  return value >= 1 && value <= static_cast<double>(kMaxTokens) ? static_cast<std::int64_t>(value) : 0;
}

double Ratio(const Json* request, const char* name, double most, double otherwise) {
  const Json* value = Find(request, name);
  const double ratio = value != nullptr && value->is_number() ? value->get<double>() : otherwise;
  return ratio >= 0 && ratio <= most ? ratio : otherwise;
}

// A name that may be written as text or as a number.
std::string Name(const Json* value) {
  if (value == nullptr) return "";
  return value->is_string() ? value->get<std::string>() : value->is_number() ? Dump(*value) : "";
}

}  // namespace

bool IsChatRow(const Json& json) {
  const Json* request = RequestOf(json);
  return FindFirst({request}, {"messages", "prompt", "ids", "text_input", "input"}) != nullptr;
}

Result<ChatRow> ParseChatRow(const Json& json) {
  const Json* request = RequestOf(json);
  const Json* response = FindFirst({&json}, {"response", "output", "completion", "reply"});
  ChatRow row;
  const Json* instructions = Find(request, "instructions");
  if (const Json* messages = Find(request, "messages")) {
    KVS_RETURN_IF_ERROR(ReadMessages(instructions, *messages, &row));
  } else if (const Json* prompt = FindFirst({request}, {"prompt", "ids", "text_input"})) {
    KVS_RETURN_IF_ERROR(ReadPrompt(*prompt, &row));
  } else if (const Json* input = Find(request, "input"); input != nullptr && input->is_array()) {
    KVS_RETURN_IF_ERROR(ReadMessages(instructions, *input, &row));
  } else if (input != nullptr && input->is_string()) {
    KVS_RETURN_IF_ERROR(ReadMessages(instructions, {{{"role", "user"}, {"content", *input}}}, &row));
  } else {
    return InvalidArgument("no \"messages\" and no \"prompt\"");
  }
  if (const Json* tools = Find(request, "tools"); tools != nullptr && !tools->empty()) {
    if (!tools->is_array()) return Fields::Wrong("tools", "is not a list");
    row.tools_json = Dump(*tools);
    if (!row.messages_json.empty()) row.messages.insert(row.messages.begin(), {"tools", row.tools_json});
  }
  KVS_ASSIGN_OR_RETURN(row.output, ReplyText(response));
  KVS_ASSIGN_OR_RETURN(row.timestamp_ms, Timestamp(json, response));
  KVS_ASSIGN_OR_RETURN(const std::optional<double> delay, Fields(json).Milliseconds("delay"));
  row.delay_ms = std::max(0.0, delay.value_or(0.0));
  const Json* meta = FindFirst({&json, request}, {"metadata"});
  row.id = Name(FindFirst({&json}, {"request_id", "custom_id"}));
  row.session = Name(FindFirst({&json, request, meta}, {"session_id", "session", "conversation_id", "thread_id"}));
  row.agent = Name(FindFirst({&json, request, meta}, {"agent_id", "agent", "agent_name"}));
  if (row.agent.empty()) row.agent = AgentOf(row.messages);
  row.model = Name(FindFirst({request, &json}, {"model"}));
  row.max_tokens = TokenCount(request, {"max_tokens", "max_completion_tokens", "output_length"});
  row.temperature = Ratio(request, "temperature", 100, 0);
  row.top_p = Ratio(request, "top_p", 1, 1);
  if (const Json* seed = Find(request, "seed"); seed != nullptr && seed->is_number_unsigned()) {
    row.seed = seed->get<std::uint64_t>();
  }
  const Json* usage = FindFirst({&json, response, Find(response, "body")}, {"usage"});
  row.prompt_tokens = TokenCount(usage, {"prompt_tokens", "input_tokens"});
  row.completion_tokens = TokenCount(usage, {"completion_tokens", "output_tokens"});
  return row;
}

Result<std::size_t> AddChatRow(const ChatRow& row, TraceBuilder* builder) {
  const std::size_t index = builder->trace().requests.size();
  TraceRequest request;
  request.session = row.session.empty() ? "0" : row.session;
  request.id = row.id;
  const std::optional<std::size_t> before = builder->LastOf(request.session);
  if (request.id.empty()) request.id = request.session + "/" + std::to_string(builder->CountOf(request.session));
  request.agent = row.agent;
  request.model = row.model;
  request.timestamp_ms = row.timestamp_ms;
  request.delay_ms = row.delay_ms;
  request.input_length = row.prompt_tokens;
  request.output_length = row.completion_tokens > 0 ? row.completion_tokens : row.output ? 0 : row.max_tokens;
  if (before) request.wait_for.push_back(*before);
  if (!row.ids.empty()) {
    KVS_ASSIGN_OR_RETURN(const std::uint32_t added, builder->AddTokens(row.ids));
    request.messages.push_back({kRawRole, {{added, std::nullopt}}});
  }
  for (const ChatRow::Message& message : row.messages) {
    KVS_ASSIGN_OR_RETURN(std::vector<SegmentRef> refs, builder->CutAtOutputs(request.session, message.text));
    if (refs.empty()) {
      KVS_ASSIGN_OR_RETURN(const std::uint32_t empty, builder->AddText(""));
      refs.push_back({empty, std::nullopt});
    }
    for (const SegmentRef& ref : refs) {
      const bool known = !ref.source || std::find(request.wait_for.begin(), request.wait_for.end(), *ref.source) !=
                                            request.wait_for.end();
      if (!known) request.wait_for.push_back(*ref.source);
    }
    request.messages.push_back({message.role, std::move(refs)});
  }
  KVS_RETURN_IF_ERROR(builder->AddRequest(std::move(request)));
  if (row.output) KVS_RETURN_IF_ERROR(AddChatOutput(index, *row.output, builder));
  return index;
}

Status AddChatOutput(std::size_t index, const std::string& text, TraceBuilder* builder) {
  const std::size_t begin = text.find_first_not_of(" \t\r\n");
  const std::size_t end = text.find_last_not_of(" \t\r\n");
  KVS_ASSIGN_OR_RETURN(const std::uint32_t segment,
                       builder->AddText(begin == text.npos ? "" : text.substr(begin, end - begin + 1)));
  TraceRequest& request = builder->trace().requests[index];
  request.output = segment;
  builder->RememberOutput(request.session, index, segment);
  return OkStatus();
}

}  // namespace kvshare::trace

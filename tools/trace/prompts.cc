#include "tools/trace/prompts.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>

#include "libkvshare/core/status_macros.h"

namespace kvshare::trace {
namespace {

constexpr std::string_view kProbe = "kvshare role probe";
constexpr int kMaxCuts = 16;

std::string ToJson(const std::string& role, const std::string& text) {
  return nlohmann::json{{"role", role}, {"content", text}}.dump(-1, ' ', false,
                                                                nlohmann::json::error_handler_t::replace);
}

}  // namespace

PromptBuilder::PromptBuilder(Client* client, const Trace* trace, const PromptOptions& options)
    : client_(client), trace_(trace), options_(options) {}

Status PromptBuilder::ProbeRoles() {
  const auto probe = [&](const std::string& messages) {
    return client_->Render({ChatPrompt{.messages_json = messages}});
  };
  const std::string user = ToJson("user", std::string(kProbe));
  const Result<RenderReply> plain = probe("[" + user + "]");
  if (!plain.ok()) {
    const StatusCode code = plain.status().code();
    if (code == StatusCode::kUnavailable || code == StatusCode::kDeadlineExceeded) return plain.status();
    has_template_ = false;
    return OkStatus();
  }
  std::set<std::string> roles;
  for (const TraceRequest& request : trace_->requests) {
    for (const TraceMessage& message : request.messages) roles.insert(MappedRole(message.role));
  }
  for (const std::string& role : roles) {
    if (role == "user") continue;
    const std::string mine = ToJson(role, std::string(kProbe) + " mine");
    const Result<RenderReply> reply =
        probe(role == "system" ? "[" + mine + "," + user + "]" : "[" + user + "," + mine + "]");
    if (!reply.ok() || reply->prompt.find(" mine") == std::string::npos) unknown_roles_.push_back(role);
  }
  return OkStatus();
}

std::string PromptBuilder::MappedRole(const std::string& role) const {
  const std::string mapped = role == "developer" || role == "tools" ? "system" : role;
  const bool unknown = std::find(unknown_roles_.begin(), unknown_roles_.end(), mapped) != unknown_roles_.end();
  return unknown ? "user" : mapped;
}

std::vector<PromptBuilder::Message> PromptBuilder::Messages(const TraceRequest& request) const {
  std::vector<Message> messages;
  for (const TraceMessage& message : request.messages) {
    Message next{MappedRole(message.role), trace_->MessageText(message)};
    if (!messages.empty() && next.role == "system" && messages.back().role == "system") {
      messages.back().text += "\n\n" + next.text;
    } else {
      messages.push_back(std::move(next));
    }
  }
  return messages;
}

Result<std::vector<TokenId>> PromptBuilder::Render(const std::vector<Message>& messages) {
  if (!has_template_) {
    std::string text;
    for (const Message& message : messages) text += message.role + ": " + message.text + "\n\n";
    return client_->Tokenize(text + "assistant:");
  }
  std::string json = "[";
  for (const Message& message : messages) json += (json.size() > 1 ? "," : "") + ToJson(message.role, message.text);
  KVS_ASSIGN_OR_RETURN(RenderReply reply, client_->Render({ChatPrompt{.messages_json = json + "]"}}));
  return std::move(reply.ids);
}

Status PromptBuilder::CutLongest(std::int64_t excess, std::vector<Message>* messages) {
  const auto longest = std::max_element(messages->begin(), messages->end(), [](const Message& a, const Message& b) {
    return a.text.size() < b.text.size();
  });
  KVS_ASSIGN_OR_RETURN(const std::vector<TokenId> ids, client_->Tokenize(longest->text));
  // Cutting between tokens can change how the rest is cut into tokens: the caller renders again and looks.
  const auto cut = std::min(static_cast<std::int64_t>(ids.size()), excess);
  if (cut == 0) return ResourceExhausted("the template alone does not fit the model's window");
  KVS_ASSIGN_OR_RETURN(longest->text, client_->Detokenize(std::span(ids).subspan(static_cast<std::size_t>(cut))));
  return OkStatus();
}

void PromptBuilder::DropFront(std::size_t kept, std::int64_t excess, std::vector<Message>* messages) {
  // A token is at least one byte, so as many bytes as there are tokens too many can go before the next rendering.
  const auto first = messages->begin() + static_cast<std::ptrdiff_t>(kept);
  auto last = first + 1;
  auto bytes = static_cast<std::int64_t>(first->text.size());
  for (; last + 1 != messages->end() && bytes + static_cast<std::int64_t>(last->text.size()) <= excess; ++last) {
    bytes += static_cast<std::int64_t>(last->text.size());
  }
  messages->erase(first, last);
}

Result<int> PromptBuilder::OutputTokens(const TraceRequest& request) {
  std::int64_t recorded = request.output_length;
  if (recorded == 0 && request.output) {
    KVS_ASSIGN_OR_RETURN(const auto ids, client_->Tokenize(trace_->segments[*request.output]));
    recorded = static_cast<std::int64_t>(ids.size());
  }
  const std::int64_t most = std::max<std::int64_t>(1, options_.window / 2);
  const std::int64_t cap = options_.max_output > 0 ? std::min<std::int64_t>(options_.max_output, most) : most;
  return static_cast<int>(std::clamp<std::int64_t>(recorded, 1, cap));
}

Result<PreparedPrompt> PromptBuilder::Build(std::size_t r) {
  const TraceRequest& request = trace_->requests[r];
  const auto named = [&](const Status& status) { return status.WithContext("request " + request.id); };
  if (request.messages.empty()) {
    return named(InvalidArgument("carries block hashes and no text: only text traces can be replayed on a model"));
  }
  PreparedPrompt prompt{.request = r};
  const Result<int> output = OutputTokens(request);
  if (!output.ok()) return named(output.status());
  prompt.max_tokens = *output;
  const std::int64_t room = options_.window - prompt.max_tokens;
  std::vector<Message> messages = Messages(request);
  for (int cuts = 0;;) {
    Result<std::vector<TokenId>> ids = Render(messages);
    if (!ids.ok()) return named(ids.status());
    const std::int64_t excess = static_cast<std::int64_t>(ids->size()) - room;
    if (excess <= 0) {
      prompt.ids = std::move(*ids);
      return prompt;
    }
    prompt.truncated = true;
    const std::size_t kept = messages.front().role == "system" ? 1 : 0;
    if (messages.size() > kept + 1) {
      DropFront(kept, excess, &messages);
    } else if (const Status cut = cuts++ < kMaxCuts ? CutLongest(excess, &messages)
                                                    : ResourceExhausted("cannot be cut to the model's window");
               !cut.ok()) {
      return named(cut);
    }
  }
}

}  // namespace kvshare::trace

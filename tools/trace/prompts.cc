#include "tools/trace/prompts.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>

#include "libkvshare/core/json_text.h"
#include "libkvshare/core/status_macros.h"
#include "tools/trace/mix.h"

namespace kvshare::trace {
namespace {

constexpr std::string_view kProbe = "kvshare role probe";
constexpr int kMaxCuts = 16;
constexpr std::int64_t kCutTokens = 64;  // what token prompts are cut by where they have no blocks

std::string ToJson(const std::string& role, const std::string& text) {
  return JsonText(nlohmann::json{{"role", role}, {"content", text}});
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

Result<const Vocabulary*> PromptBuilder::Words() {
  if (!vocabulary_) {
    KVS_ASSIGN_OR_RETURN(vocabulary_, Vocabulary::Of(client_));
  }
  return &*vocabulary_;
}

Result<std::string> PromptBuilder::SegmentText(std::uint32_t index) {
  const TraceSegment& segment = trace_->segments[index];
  switch (segment.kind) {
    case TraceSegment::Kind::kText: break;
    case TraceSegment::Kind::kTokens: return client_->Detokenize(segment.tokens);
    case TraceSegment::Kind::kWithheld: {
      KVS_ASSIGN_OR_RETURN(const Vocabulary* words, Words());
      return words->Text(HashText(segment.name), segment.withheld_tokens);
    }
  }
  return segment.text;
}

Result<std::vector<PromptBuilder::Message>> PromptBuilder::Messages(const TraceRequest& request) {
  std::vector<Message> messages;
  for (const TraceMessage& message : request.messages) {
    Message next{MappedRole(message.role), ""};
    for (const SegmentRef& ref : message.segments) {
      KVS_ASSIGN_OR_RETURN(const std::string text, SegmentText(ref.segment));
      next.text += text;
    }
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
    const TraceSegment& output = trace_->segments[*request.output];
    recorded = output.withheld_tokens + static_cast<std::int64_t>(output.tokens.size());
    if (output.kind == TraceSegment::Kind::kText) {
      KVS_ASSIGN_OR_RETURN(const auto ids, client_->Tokenize(output.text));
      recorded = static_cast<std::int64_t>(ids.size());
    }
  }
  const std::int64_t most = std::max<std::int64_t>(1, options_.window / 2);
  const std::int64_t cap = options_.max_output > 0 ? std::min<std::int64_t>(options_.max_output, most) : most;
  return static_cast<int>(std::clamp<std::int64_t>(recorded, 1, cap));
}

Result<PreparedPrompt> PromptBuilder::BuildMessages(PreparedPrompt prompt, std::int64_t room) {
  KVS_ASSIGN_OR_RETURN(std::vector<Message> messages, Messages(trace_->requests[prompt.request]));
  for (int cuts = 0;;) {
    KVS_ASSIGN_OR_RETURN(std::vector<TokenId> ids, Render(messages));
    const std::int64_t excess = static_cast<std::int64_t>(ids.size()) - room;
    if (excess <= 0) {
      prompt.ids = std::move(ids);
      return prompt;
    }
    prompt.truncated = true;
    const std::size_t kept = messages.front().role == "system" ? 1 : 0;
    if (messages.size() > kept + 1) {
      DropFront(kept, excess, &messages);
    } else if (cuts++ < kMaxCuts) {
      KVS_RETURN_IF_ERROR(CutLongest(excess, &messages));
    } else {
      return ResourceExhausted("cannot be cut to the model's window");
    }
  }
}

Result<PreparedPrompt> PromptBuilder::BuildRaw(PreparedPrompt prompt, std::int64_t room) {
  std::string text;  // of neighbouring text segments, tokenised as one
  const auto flush = [&]() -> Status {
    KVS_ASSIGN_OR_RETURN(const std::vector<TokenId> ids, client_->Tokenize(text));
    prompt.ids.insert(prompt.ids.end(), ids.begin(), ids.end());
    text.clear();
    return OkStatus();
  };
  for (const SegmentRef& ref : trace_->requests[prompt.request].messages.front().segments) {
    const TraceSegment& segment = trace_->segments[ref.segment];
    if (segment.kind != TraceSegment::Kind::kTokens) {
      KVS_ASSIGN_OR_RETURN(const std::string more, SegmentText(ref.segment));
      text += more;
      continue;
    }
    KVS_RETURN_IF_ERROR(flush());
    prompt.ids.insert(prompt.ids.end(), segment.tokens.begin(), segment.tokens.end());
  }
  KVS_RETURN_IF_ERROR(flush());
  if (prompt.ids.empty()) return InvalidArgument("its prompt has no tokens");
  const auto excess = static_cast<std::int64_t>(prompt.ids.size()) - room;
  if (excess > 0) {
    const std::int64_t cut = std::min((excess + kCutTokens - 1) / kCutTokens * kCutTokens, excess + room - 1);
    prompt.ids.erase(prompt.ids.begin(), prompt.ids.begin() + cut);
    prompt.truncated = true;
  }
  return prompt;
}

Result<PreparedPrompt> PromptBuilder::BuildTokens(PreparedPrompt prompt, std::int64_t room) {
  const TraceRequest& request = trace_->requests[prompt.request];
  const std::int64_t tokens = PromptTokens(*trace_, request);
  const std::int64_t block = trace_->header.block_tokens;
  std::int64_t begin = 0;
  if (tokens > room) {
    begin = (tokens - room + block - 1) / block * block;
    if (begin >= tokens) begin = tokens - room;  // a block larger than the window
    prompt.truncated = true;
  }
  KVS_ASSIGN_OR_RETURN(const Vocabulary* words, Words());
  prompt.ids = SynthesiseTokens(*trace_, prompt.request, *words, begin, tokens);
  return prompt;
}

Result<PreparedPrompt> PromptBuilder::Build(std::size_t r) {
  const TraceRequest& request = trace_->requests[r];
  const auto build = [&]() -> Result<PreparedPrompt> {
    PreparedPrompt prompt{.request = r};
    KVS_ASSIGN_OR_RETURN(prompt.max_tokens, OutputTokens(request));
    const std::int64_t room = options_.window - prompt.max_tokens;
    if (room < 1) return ResourceExhausted("the model's window has no room for a prompt");
    if (request.messages.empty()) return BuildTokens(std::move(prompt), room);
    if (request.messages.front().role == kRawRole) return BuildRaw(std::move(prompt), room);
    return BuildMessages(std::move(prompt), room);
  };
  Result<PreparedPrompt> prompt = build();
  if (!prompt.ok()) return prompt.status().WithContext("request " + request.id);
  return prompt;
}

}  // namespace kvshare::trace

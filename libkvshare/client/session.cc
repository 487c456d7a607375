#include "kvshare/session.h"

#include <algorithm>
#include <utility>

namespace kvshare {
namespace {

void AppendJsonString(const std::string& text, std::string* out) {
  constexpr char kHex[] = "0123456789abcdef";
  out->push_back('"');
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out->push_back('\\');
      out->push_back(c);
    } else if (byte < 0x20) {
      *out += "\\u00";
      out->push_back(kHex[byte >> 4]);
      out->push_back(kHex[byte & 15]);
    } else {
      out->push_back(c);
    }
  }
  out->push_back('"');
}

}  // namespace

struct Context::Node {
  Segment segment;
  std::shared_ptr<const Node> before;
  std::size_t count = 0;

  Node(Segment s, std::shared_ptr<const Node> b) : segment(std::move(s)), before(std::move(b)) {
    count = before == nullptr ? 1 : before->count + 1;
  }
  // By a loop: a long conversation would overflow the stack by recursion.
  ~Node() {
    std::shared_ptr<const Node> next = std::move(before);
    while (next != nullptr && next.use_count() == 1) {
      std::shared_ptr<const Node> after = std::move(const_cast<Node&>(*next).before);
      next = std::move(after);
    }
  }
};

Context& Context::Append(Segment segment) {
  last_ = std::make_shared<const Node>(std::move(segment), std::move(last_));
  return *this;
}

std::size_t Context::size() const { return last_ == nullptr ? 0 : last_->count; }

std::vector<Segment> Context::segments() const {
  std::vector<Segment> segments;
  segments.reserve(size());
  for (const Node* node = last_.get(); node != nullptr; node = node->before.get()) segments.push_back(node->segment);
  std::reverse(segments.begin(), segments.end());
  return segments;
}

ChatPrompt Context::ToChat(bool add_generation_prompt) const {
  std::vector<const Segment*> segments;
  segments.reserve(size());
  for (const Node* node = last_.get(); node != nullptr; node = node->before.get()) segments.push_back(&node->segment);
  ChatPrompt chat{.messages_json = "[", .add_generation_prompt = add_generation_prompt};
  for (auto it = segments.rbegin(); it != segments.rend(); ++it) {
    std::string& out = chat.messages_json;
    if (it != segments.rbegin()) out.push_back(',');
    out += "{\"role\":";
    AppendJsonString((*it)->role, &out);
    if (!(*it)->name.empty()) {
      out += ",\"name\":";
      AppendJsonString((*it)->name, &out);
    }
    out += ",\"content\":";
    AppendJsonString((*it)->content, &out);
    out.push_back('}');
  }
  chat.messages_json.push_back(']');
  return chat;
}

ChatPrompt Session::Chat(const Context& context) const {
  ChatPrompt chat = context.ToChat();
  chat.tools_json = options_.tools_json;
  return chat;
}

GenerateRequest Session::Request(const Context& context, const GenerateRequest& base) const {
  GenerateRequest request = base;
  request.prompt = Chat(context);
  request.agent = options_.agent;
  request.session = options_.session;
  if (!request.reuse.has_value()) request.reuse = options_.reuse;
  return request;
}

Result<std::unique_ptr<TokenStream>> Session::Generate(const Context& context, const GenerateRequest& base) {
  return client_->Generate(Request(context, base));
}

Result<GenerateReply> Session::GenerateAll(const Context& context, const GenerateRequest& base) {
  return client_->GenerateAll(Request(context, base));
}

Result<GenerateReply> Session::Put(const Context& context) {
  return client_->GenerateAll(Request(context, {.max_tokens = 0}));
}

Result<Match> Session::Lookup(const Context& context) {
  return client_->Lookup({.prompt = Chat(context), .agent = options_.agent, .session = options_.session});
}

Result<Lease> Session::Acquire(const Context& context, std::chrono::milliseconds ttl) {
  return client_->Acquire({.prompt = Chat(context), .agent = options_.agent, .session = options_.session, .ttl = ttl});
}

Result<Explanation> Session::Explain(const Context& context) {
  return client_->Explain(
      {.prompt = Chat(context), .agent = options_.agent, .session = options_.session, .reuse = options_.reuse});
}

}  // namespace kvshare

// Context and Session: a conversation as the agent keeps it, and who asks.
//
//   kvshare::Session planner(client.get(), {.agent = "planner", .session = "run-7"});
//   kvshare::Context context;
//   context.Append("system", "You plan.").Append("user", task);
//   auto reply = planner.GenerateAll(context);
//   kvshare::Context retry = context;  // a fork: shares what is there, and goes its own way
//   context.Append("assistant", reply->text);
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kvshare/client.h"
#include "kvshare/status.h"
#include "kvshare/types.h"

namespace kvshare {

struct Segment {
  std::string role;  // system | user | assistant | tool, or what the model's template knows
  std::string content;
  std::string name;  // who of that role; empty: none
};

// Segments in order. Copies share them and cost a pointer, whatever the length; appending to one changes no other. A
// value: one thread at a time for one object.
class Context {
 public:
  Context& Append(Segment segment);
  Context& Append(std::string role, std::string content) { return Append({std::move(role), std::move(content), ""}); }

  std::size_t size() const;
  bool empty() const { return last_ == nullptr; }
  std::vector<Segment> segments() const;
  // OpenAI messages, one a segment. Contents must be UTF-8: the daemon refuses what is not.
  ChatPrompt ToChat(bool add_generation_prompt = true) const;

 private:
  struct Node;
  std::shared_ptr<const Node> last_;
};

struct SessionOptions {
  std::string agent;               // "" is reported as "default"
  std::string session;             // which conversation
  std::string tools_json;          // a JSON array of OpenAI tools, or empty
  std::optional<ReuseMode> reuse;  // unset: the daemon's own mode
};

// An agent's requests: Context and who asks, put together. The client must outlive it. Thread-safe as the client is.
class Session {
 public:
  Session(Client* client, SessionOptions options) : client_(client), options_(std::move(options)) {}

  const SessionOptions& options() const { return options_; }

  // `base` gives all but prompt, agent, session and (unless set there) reuse.
  Result<std::unique_ptr<TokenStream>> Generate(const Context& context, const GenerateRequest& base = {});
  Result<GenerateReply> GenerateAll(const Context& context, const GenerateRequest& base = {});
  // Computes and stores the context's KV, and generates nothing: the next request that begins with it finds it.
  Result<GenerateReply> Put(const Context& context);
  Result<Match> Lookup(const Context& context);
  Result<Lease> Acquire(const Context& context, std::chrono::milliseconds ttl = std::chrono::seconds(30));
  Result<Explanation> Explain(const Context& context);

 private:
  ChatPrompt Chat(const Context& context) const;
  GenerateRequest Request(const Context& context, const GenerateRequest& base) const;

  Client* const client_;
  const SessionOptions options_;
};

}  // namespace kvshare

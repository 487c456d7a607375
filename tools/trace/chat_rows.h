// Logs of OpenAI-compatible requests, one JSON object per line, in the shapes that gateways and batch files write.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "kvshare/status.h"
#include "tools/trace/builder.h"

namespace kvshare::trace {

// One logged request. Where a field may stand is said in docs/reference/traces.md.
struct ChatRow {
  struct Message {
    std::string role;
    std::string text;  // content, then tool calls as JSON
  };
  std::vector<Message> messages;  // tools, if any, as a first message of role "tools"
  std::vector<TokenId> ids;       // instead of messages: a prompt of token ids
  std::string messages_json;      // as given, to be sent again; empty for a prompt that is text or ids
  std::string tools_json;
  std::optional<std::string> output;
  std::string id;  // empty: the log names none
  std::string session;
  std::string agent;
  std::string model;
  std::optional<double> timestamp_ms;  // since 1970, or whatever the log counts from
  double delay_ms = 0;
  std::int64_t prompt_tokens = 0;  // 0: not logged
  std::int64_t completion_tokens = 0;
  // What it asked for; defaults where it says nothing.
  std::int64_t max_tokens = 0;
  double temperature = 0;
  double top_p = 1;
  std::uint64_t seed = 0;
};

// Whether a line without a KTR header is one of these.
bool IsChatRow(const nlohmann::json& json);

// InvalidArgument names the field and what is wrong with it.
Result<ChatRow> ParseChatRow(const nlohmann::json& json);

// The row as a request that waits for the one before it in its session and for those whose output its prompt holds;
// returns its index.
Result<std::size_t> AddChatRow(const ChatRow& row, TraceBuilder* builder);
// The reply, when it became known: to be called once for a row that had none.
Status AddChatOutput(std::size_t request, const std::string& text, TraceBuilder* builder);

}  // namespace kvshare::trace

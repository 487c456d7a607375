// The vocabulary of a request and its reply, shared by every client, the wire codec and the daemon.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "kvshare/status.h"

namespace kvshare {

using TokenId = std::int32_t;

// How KV that the daemon already holds may be used for a prompt. Only the exact modes exist so far; the
// approximate ones (rotate, epic, cacheblend, dhd, kvcomm, auto) are refused by name until they are built.
enum class ReuseMode : std::uint8_t {
  kOff = 0,    // every token is computed, and nothing is stored
  kExact = 1,  // the longest stored prefix, bit for bit what computing it would give
};

std::string_view ReuseModeName(ReuseMode mode);
Result<ReuseMode> ParseReuseMode(std::string_view name);

// A prompt is text, token ids, or chat messages that the model's template turns into text.
struct TextPrompt {
  std::string text;  // special tokens in the text are recognised; none is added
};
struct TokenPrompt {
  std::vector<TokenId> ids;
};
struct ChatPrompt {
  std::string messages_json;  // a JSON array of OpenAI chat messages
  std::string tools_json;     // a JSON array of OpenAI tools, or empty
  bool add_generation_prompt = true;
};
using Prompt = std::variant<TextPrompt, TokenPrompt, ChatPrompt>;

struct SamplingParams {
  float temperature = 0.0f;  // 0: greedy, whatever the others say
  int top_k = 0;             // 0: no limit
  float top_p = 1.0f;
  std::uint64_t seed = 0;  // same seed, same prompt, same parameters: same tokens
};

struct GenerateRequest {
  Prompt prompt;
  SamplingParams sampling;
  int max_tokens = 128;
  std::vector<std::string> stop;   // generation ends before the first of these; it is not part of the text
  bool ignore_eos = false;         // replay: decode max_tokens whatever the model says
  std::string agent;               // who asks; for statistics ("" is reported as "default")
  std::string session;             // which conversation; advisory
  std::optional<ReuseMode> reuse;  // unset: the daemon's own mode
  std::chrono::milliseconds timeout{300000};
};

// Why a token of the prompt had to be computed. The names are part of the surface (docs/miss-reasons.md).
struct MissReason {
  std::string reason;
  std::int64_t tokens = 0;
};

// What became of the prompt's tokens. prefix + moved + recomputed + fresh == prompt tokens, always; the
// miss reasons add up to recomputed + fresh.
struct ReuseReport {
  std::int64_t prefix_tokens = 0;      // exact hits
  std::int64_t moved_tokens = 0;       // reused at another position, as stored or corrected
  std::int64_t recomputed_tokens = 0;  // computed although a chunk was found
  std::int64_t fresh_tokens = 0;       // the rest
  bool approximate = false;
  std::vector<MissReason> miss_reasons;
};

struct Timings {
  double queue_ms = 0;      // from arrival to the first computation
  double ttft_ms = 0;       // from arrival to the first generated token
  double prompt_ms = 0;     // computing the prompt
  double predicted_ms = 0;  // from the first generated token to the last
};

enum class FinishReason : std::uint8_t { kStop = 0, kLength = 1 };
std::string_view FinishReasonName(FinishReason reason);

struct GenerateReply {
  std::uint64_t request_id = 0;
  std::vector<TokenId> ids;  // generated tokens, without the end-of-turn token
  std::string text;
  FinishReason finish_reason = FinishReason::kStop;
  std::int64_t prompt_tokens = 0;
  ReuseReport reuse;
  Timings timings;
};

// A piece of a reply as it is produced. `text` holds whole UTF-8 characters only; it may lag behind `ids`.
struct TokenChunk {
  std::vector<TokenId> ids;
  std::string text;
};

struct RenderRequest {
  ChatPrompt chat;
};
struct RenderReply {
  std::string prompt;
  std::vector<TokenId> ids;
};

// One span of a prompt in an explanation. Spans cover the prompt without gap or overlap, in order.
struct ExplainSpan {
  std::string kind;        // exact | moved | fresh
  std::int64_t start = 0;  // token index in the prompt
  std::int64_t length = 0;
  std::string source;       // for reused spans: the agent whose request stored it
  std::string tier;         // host | cold | ""
  std::string repair;       // none | a repair policy | ""
  std::string miss_reason;  // for fresh spans
};
struct ExplainRequest {
  Prompt prompt;                 // used unless request_id is set
  std::uint64_t request_id = 0;  // an earlier request, as it was served
  std::string agent;
  std::string session;
  std::optional<ReuseMode> reuse;
};
struct Explanation {
  std::vector<ExplainSpan> spans;
};

// Totals since the daemon started.
struct ReuseTotals {
  std::int64_t requests = 0;
  std::int64_t prompt_tokens = 0;
  std::int64_t prefix_tokens = 0;
  std::int64_t moved_tokens = 0;
  std::int64_t recomputed_tokens = 0;
  std::int64_t fresh_tokens = 0;
  std::int64_t generated_tokens = 0;
};
struct PoolStats {
  std::int64_t capacity_bytes = 0;
  std::int64_t used_bytes = 0;
  std::int64_t pages = 0;      // pages that hold KV
  std::int64_t leases = 0;     // pages pinned by running requests
  std::int64_t evictions = 0;  // pages evicted since start
};
struct ColdStats {  // zero until a cold tier is configured
  std::int64_t entries = 0;
  std::int64_t bytes = 0;
  std::int64_t hits = 0;
  std::int64_t misses = 0;
  std::int64_t integrity_errors = 0;
};
struct Stats {
  ReuseTotals totals;
  PoolStats pool;
  ColdStats cold;
  std::int64_t requests_running = 0;
  std::int64_t requests_waiting = 0;
  std::int64_t requests_failed = 0;
  std::map<std::string, std::int64_t> miss_reasons;  // reason -> tokens
  std::map<std::string, ReuseTotals> agents;
};

// What the daemon serves.
struct ServerInfo {
  std::string version;  // kvshare's version
  std::string model;    // the model's name, as its files give it
  std::string space;    // hex digest of everything that makes KV comparable (docs/formats/keys.md)
  std::string dtype;    // float32 | bfloat16
  std::string isa;      // the kernels in use
  ReuseMode reuse = ReuseMode::kExact;
  std::int64_t max_context_tokens = 0;
  std::int64_t vocab_size = 0;
};

}  // namespace kvshare

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

// How KV that the daemon already holds may be used for a prompt. Every mode but the first uses exact prefixes; those
// after kExact also use chunks that stand elsewhere and differ in how they repair them (docs/reference/reuse.md). Their
// answers are labelled approximate.
enum class ReuseMode : std::uint8_t {
  kOff = 0,         // every token is computed, and nothing is stored
  kExact = 1,       // the longest stored prefix, bit for bit what computing it would give
  kRotate = 2,      // moved chunks as stored, at their new positions
  kEpic = 3,        // and the first tokens of each chunk recomputed (EPIC, arXiv 2410.15332)
  kCacheBlend = 4,  // and the tokens whose V deviates most recomputed (CacheBlend, arXiv 2405.16444)
  kDhd = 5,         // and those that deviate most where attention looks (KVShare, arXiv 2503.16525)
  kKvcomm = 6,      // corrected by anchors' offsets, else computed (KVCOMM, arXiv 2510.12872)
  kAuto = 7,        // probes, selection and a measured error that sends a chunk back to exact
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
  int max_tokens = 128;            // 0: the prompt's KV is computed and stored, and nothing is generated
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

// ---- stored KV by name: what an agent or an operator may ask about it, and do with it ----

struct LookupRequest {
  Prompt prompt;
  std::string agent;
  std::string session;
};

// What of a prompt is stored at this moment. host + cold == prefix tokens.
struct Match {
  std::int64_t prompt_tokens = 0;
  std::int64_t prefix_tokens = 0;  // an exact prefix, at most prompt_tokens - 1: the last token is always computed
  std::int64_t host_tokens = 0;    // of the prefix, ready in memory
  std::int64_t cold_tokens = 0;    // of the prefix, to be loaded
  std::int64_t chunk_tokens = 0;   // beyond the prefix, of chunks that the request's session has stored elsewhere
};

// The shape of KV in memory (docs/formats/kv-page.md).
struct KvLayoutInfo {
  int num_layers = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int page_tokens = 0;
  std::int64_t page_bytes = 0;
  std::string dtype;  // float32 | bfloat16 | float16
};

// One page of a lease: `valid_tokens` rows from token `start` on, at `offset` of the daemon's shared memory. The page's
// content is that of the lease as long as its generation is the one given here.
struct LeasePage {
  std::int64_t offset = 0;
  std::int64_t start = 0;
  int valid_tokens = 0;
  std::uint64_t generation = 0;
};

// Pins stored KV for a while, so that it can be read where it lies. Loads what is in the cold tier first.
struct AcquireRequest {
  Prompt prompt;
  std::string agent;
  std::string session;
  std::chrono::milliseconds ttl{30000};  // the lease ends by itself then; at most 10 minutes
};
struct LeaseInfo {
  std::uint64_t id = 0;
  std::int64_t tokens = 0;  // leading tokens of the prompt; 0: nothing is stored, and there is nothing to release
  std::chrono::milliseconds ttl{0};
  KvLayoutInfo layout;
  std::vector<LeasePage> pages;
};

// Keeps a stored prefix from being evicted until Unpin or `ttl`. At most half of the pool can be pinned.
struct PinRequest {
  Prompt prompt;
  std::chrono::milliseconds ttl{0};  // 0: until Unpin
};
struct PinInfo {
  std::string key;  // names the pin for Unpin; the key of the prefix's last page (Entry::key)
  std::int64_t tokens = 0;
};

struct EvictRequest {
  std::string key;   // this entry and all that continues it; empty: everything
  bool host = true;  // from memory
  bool cold = true;  // from the cold tier
};

// A page of stored KV, as lists show it.
struct Entry {
  std::string key;          // hex digest of the page's context (docs/formats/keys.md)
  std::string parent;       // key of the page before it; empty for the first
  std::string tier;         // host | cold | host+cold
  std::string source;       // the agent whose request stored it
  std::int64_t start = 0;   // position of its first token
  std::int64_t tokens = 0;  // 1..64
  std::int64_t bytes = 0;
  std::int64_t hits = 0;     // requests that used it since it came to its tier
  std::int64_t idle_ms = 0;  // since it was last used
  std::int64_t leases = 0;   // running requests and leases that hold it
  bool pinned = false;
  std::vector<TokenId> ids;  // its tokens; only where one entry was asked for by key
};
struct EntriesRequest {
  std::string key;           // one entry, by its key or a unique beginning of it; empty: the most recently used
  std::int64_t limit = 100;  // at most 10,000
};

// Tokens of approximate answers whose distribution was compared with what exact computation says.
struct AuditTotals {
  std::int64_t audits = 0;
  std::int64_t failures = 0;  // KL(exact || approximate) above 0.05 nats
  double kl_sum = 0;          // nats
};

// Reuse at other places, and how it is watched (docs/design/repair.md).
struct ApproximateStats {
  std::int64_t answers = 0;           // given approximately to their end
  std::int64_t sent_back = 0;         // computed exactly after all, because the guard doubted them
  std::int64_t healed = 0;            // computed exactly when nobody waited
  std::int64_t kept_bytes = 0;        // KV of approximate requests that their sessions may use again
  double guard_margin = 0;            // nats that the likeliest token must be ahead by, mode auto, in one thread;
                                      // 1e6: nothing is trusted, because too much was found far from exact
  double guard_margin_elsewhere = 0;  // the same where other text stood before what is reused
  double moved_row = 0;               // rows of plain prefill that take as long as one over moved chunks, mode auto
  std::vector<AuditTotals> audits;    // first tokens, by depth: over exact KV, over answers of such requests, and so
                                      // on; at most 8
  std::vector<AuditTotals> later_audits;  // the same of one token after the first, drawn from the whole answer
  AuditTotals shadow_audits;              // first tokens of exact answers, computed once more over what is not trusted
};

// What mode kvcomm has learnt, and what of it is on disk (docs/design/anchors-persisted.md).
struct AnchorStats {
  std::int64_t bytes = 0;                      // in memory
  std::int64_t disk_bytes = 0;                 // zero without a cold directory, as all below
  std::int64_t disk_capacity_bytes = 0;        // a part of the cold tier's
  std::int64_t saved = 0;                      // anchors written
  std::int64_t loaded = 0;                     // anchors read back
  std::int64_t dropped = 0;                    // anchors that could not be written
  std::map<std::string, std::int64_t> misses;  // why what was saved was not used -> how often
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
  std::int64_t bytes = 0;             // of its quota, in use, anchors included
  std::int64_t hits = 0;              // pages loaded
  std::int64_t misses = 0;            // pages that were asked for and could not be loaded
  std::int64_t integrity_errors = 0;  // records that were damaged, and dropped
  std::int64_t capacity_bytes = 0;
  std::int64_t stores = 0;
  std::int64_t dropped = 0;  // pages that could not be written in time
  std::int64_t evictions = 0;
  std::int64_t read_bytes = 0;
  std::int64_t written_bytes = 0;
  std::string state;  // "" without a cold tier | ok | why it only reads, or is off
};

// Counts by upper bound, as Prometheus has them: `counts[i]` observations were at most `bounds[i]`, the last bound is
// infinite and left out of `bounds`.
struct Histogram {
  std::vector<double> bounds;
  std::vector<std::int64_t> counts;  // one more than bounds; not cumulative
  double sum = 0;
};
struct Stats {
  ReuseTotals totals;
  PoolStats pool;
  ColdStats cold;
  ApproximateStats approximate;
  AnchorStats anchors;
  std::int64_t requests_running = 0;
  std::int64_t requests_waiting = 0;
  std::int64_t requests_failed = 0;
  std::int64_t pinned_bytes = 0;   // kept by Pin
  std::int64_t client_leases = 0;  // held by Acquire
  double uptime_s = 0;
  Histogram ttft_seconds;
  Histogram queue_seconds;
  Histogram prefill_seconds;
  Histogram inter_token_seconds;                     // one observation per request: the mean of its tokens
  std::map<std::string, std::int64_t> miss_reasons;  // reason -> tokens
  std::map<std::string, ReuseTotals> agents;
};

// What the daemon serves.
struct ServerInfo {
  std::string version;  // kvshare's version
  std::string model;    // the model's name, as its files give it
  std::string space;    // hex digest of everything that makes KV comparable (docs/formats/keys.md)
  std::string dtype;    // float32 | bfloat16 | float16
  std::string isa;      // the kernels in use
  ReuseMode reuse = ReuseMode::kExact;
  std::int64_t max_context_tokens = 0;
  std::int64_t vocab_size = 0;
  std::string device;  // cpu | cuda; empty: a daemon that does not say
};

}  // namespace kvshare

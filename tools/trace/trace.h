// A recorded multi-agent workload in memory, whatever file it came from, after its references were resolved
// (docs/reference/traces.md).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kvshare/types.h"

namespace kvshare::trace {

// Whose clock the timestamps follow.
enum class TimeBase {
  kArrival,  // one clock for the whole trace: open loop
  kSession,  // a clock per session: sessions may be placed freely
  kNone,     // no clock: order and hand-offs only
};

// What a block id names.
enum class HashKind {
  kChained,  // the block and everything before it, so that equal ids stand behind equal beginnings
  kContent,  // the block's own tokens, wherever it stands
  kNone,     // the trace has lengths only
};

// How the lines were written, for those who ask.
enum class TraceFormat { kKtr, kMooncake, kOpenAi };

struct TraceHeader {
  std::string name;
  TraceFormat format = TraceFormat::kKtr;
  TimeBase time_base = TimeBase::kNone;
  HashKind hash_kind = HashKind::kChained;
  std::int64_t block_tokens = 512;    // of hash_ids; Mooncake's size where a file names none
  bool hash_ids_per_session = false;  // the same id in two sessions is not the same block
  std::string tokenizer;              // of segments that are given as token ids
  std::string license;
  std::string origin;
};

// A piece of a prompt. Exactly one of the three says what is in it.
struct TraceSegment {
  enum class Kind {
    kText,      // `text`
    kTokens,    // `tokens`, ids of the header's tokenizer
    kWithheld,  // about `withheld_tokens` tokens, made up from `name` wherever they are needed
  };
  Kind kind = Kind::kText;
  std::string name;  // unique in its trace
  std::string text;
  std::vector<TokenId> tokens;
  std::int64_t withheld_tokens = 0;

  bool operator==(const TraceSegment&) const = default;
};

struct SegmentRef {
  std::uint32_t segment = 0;          // index into Trace::segments
  std::optional<std::size_t> source;  // the earlier request whose output this is: a hand-off
};

// One chat message. Its content is that of its segments, one after the other.
struct TraceMessage {
  std::string role;  // kRawRole: no message at all, but the prompt as it stands
  std::vector<SegmentRef> segments;
};
inline constexpr const char* kRawRole = "raw";

struct TraceRequest {
  std::string id;
  std::string session;
  std::string agent;
  std::string model;  // as recorded: block ids of different models differ
  std::optional<double> timestamp_ms;
  double delay_ms = 0;                  // between the last of `wait_for` and this request: thinking, a tool
  std::optional<double> api_ms;         // recorded time of service
  std::vector<std::size_t> wait_for;    // earlier requests, as indices
  std::vector<TraceMessage> messages;   // empty for hash traces
  std::optional<std::uint32_t> output;  // the recorded reply, a segment
  std::int64_t input_length = 0;        // tokens as recorded; 0 = not recorded
  std::int64_t output_length = 0;       // tokens as recorded; 0 = not recorded
  // Hash traces: the prompt's blocks are the first `keep` of request `base`, then `own_blocks` ids of
  // Trace::block_ids from `first_block` on. Delta coding stays as it was in the file: expanded, some traces are fifty
  // times as large. Trace::Blocks() expands one.
  std::int64_t blocks = 0;
  std::optional<std::size_t> base;
  std::int64_t keep = 0;
  std::size_t first_block = 0;
  std::int64_t own_blocks = 0;
};

struct Trace {
  TraceHeader header;
  std::vector<TraceSegment> segments;
  std::vector<TraceRequest> requests;
  std::vector<std::uint64_t> block_ids;

  // A message of text segments only, as text.
  std::string MessageText(const TraceMessage& message) const;

  // The block ids of a request's prompt, as written in the file.
  std::vector<std::uint64_t> Blocks(std::size_t request) const;

  // What keeps a block id apart from the same number in another model or, where ids are per session, another session.
  std::uint64_t BlockSpace(const TraceRequest& request) const;

  // Requests whose prompt is known by block ids or by its length alone.
  bool HasText(std::size_t request) const { return !requests[request].messages.empty(); }
  std::int64_t Handoffs(const TraceRequest& request) const;
};

// Tokens of a prompt that is known by its blocks: as recorded, otherwise all blocks in full.
std::int64_t PromptTokens(const Trace& trace, const TraceRequest& request);

}  // namespace kvshare::trace

#include "tools/trace/ktr_writer.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "libkvshare/core/check.h"
#include "libkvshare/core/json_text.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::trace {
namespace {

using Json = nlohmann::ordered_json;

std::string Line(const Json& json) { return JsonText(json) + "\n"; }

const char* Name(TimeBase base) {
  switch (base) {
    case TimeBase::kArrival: return "arrival";
    case TimeBase::kSession: return "session";
    case TimeBase::kNone: break;
  }
  return "none";
}

const char* Name(HashKind kind) {
  switch (kind) {
    case HashKind::kChained: break;
    case HashKind::kContent: return "content";
    case HashKind::kNone: return "none";
  }
  return "chained";
}

// Whole milliseconds as whole numbers.
Json Ms(double ms) {
  const auto whole = static_cast<std::int64_t>(ms);
  return static_cast<double>(whole) == ms ? Json(whole) : Json(ms);
}

}  // namespace

KtrWriter::KtrWriter(const Trace* trace, Sink sink) : trace_(trace), sink_(std::move(sink)) {}

Status KtrWriter::Header() {
  const TraceHeader& header = trace_->header;
  Json json = {{"schema", "ktr"}, {"version", 1}, {"name", header.name}, {"time_base", Name(header.time_base)}};
  const bool blocks = std::any_of(trace_->requests.begin(), trace_->requests.end(),
                                  [](const TraceRequest& request) { return request.messages.empty(); });
  if (blocks) {
    json["hash_kind"] = Name(header.hash_kind);
    json["block_size"] = header.block_tokens;
    json["hash_id_scope"] = header.hash_ids_per_session ? "session" : "global";
    json["delta"] = true;
  }
  if (!header.tokenizer.empty()) json["tokenizer"] = header.tokenizer;
  if (!header.license.empty()) json["license"] = header.license;
  if (!header.origin.empty()) json["origin"] = header.origin;
  return sink_(Line(json));
}

Status KtrWriter::Segment(std::uint32_t index) {
  if (written_.size() <= index) written_.resize(trace_->segments.size());
  if (written_[index]) return OkStatus();
  written_[index] = true;
  const TraceSegment& segment = trace_->segments[index];
  Json json = {{"seg", segment.name}};
  switch (segment.kind) {
    case TraceSegment::Kind::kText: json["text"] = segment.text; break;
    case TraceSegment::Kind::kTokens: json["tokens"] = segment.tokens; break;
    case TraceSegment::Kind::kWithheld: json["n_tokens"] = segment.withheld_tokens; break;
  }
  return sink_(Line(json));
}

std::string KtrWriter::Reference(const SegmentRef& ref) const {
  return ref.source ? "@" + trace_->requests[*ref.source].id : trace_->segments[ref.segment].name;
}

Status KtrWriter::Request(std::size_t index) {
  const TraceRequest& request = trace_->requests[index];
  Json segments = Json::array();
  for (const TraceMessage& message : request.messages) {
    bool first = true;
    for (const SegmentRef& ref : message.segments) {
      if (!ref.source) KVS_RETURN_IF_ERROR(Segment(ref.segment));
      segments.push_back({first ? message.role : "+", Reference(ref)});
      first = false;
    }
  }
  if (request.output) KVS_RETURN_IF_ERROR(Segment(*request.output));
  Json json = {{"request_id", request.id}, {"session_id", request.session}};
  if (!request.agent.empty()) json["agent_id"] = request.agent;
  if (!request.model.empty()) json["model"] = request.model;
  if (request.timestamp_ms) json["timestamp"] = Ms(*request.timestamp_ms);
  if (request.delay_ms > 0) json["delay"] = Ms(request.delay_ms);
  if (request.api_ms) json["api_ms"] = Ms(*request.api_ms);
  if (request.input_length > 0) json["input_length"] = request.input_length;
  if (request.output_length > 0) json["output_length"] = request.output_length;
  if (!request.wait_for.empty()) {
    json["wait_for"] = Json::array();
    for (std::size_t w : request.wait_for) json["wait_for"].push_back(trace_->requests[w].id);
  }
  if (!request.messages.empty()) {
    json["segments"] = std::move(segments);
  } else if (request.blocks > 0) {
    if (request.base) {
      json["base"] = trace_->requests[*request.base].id;
      json["keep"] = request.keep;
    }
    const auto first = trace_->block_ids.begin() + static_cast<std::ptrdiff_t>(request.first_block);
    json["hash_ids"] = std::vector<std::uint64_t>(first, first + static_cast<std::ptrdiff_t>(request.own_blocks));
  }
  if (request.output) json["output"] = trace_->segments[*request.output].name;
  return sink_(Line(json));
}

std::string KtrText(const Trace& trace) {
  std::string text;
  KtrWriter writer(&trace, [&](std::string_view line) {
    text += line;
    return OkStatus();
  });
  Status status = writer.Header();
  for (std::size_t r = 0; r < trace.requests.size() && status.ok(); ++r) status = writer.Request(r);
  KVS_CHECK(status.ok());
  return text;
}

}  // namespace kvshare::trace

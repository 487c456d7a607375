#include "tools/trace/ktr_rows.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "libkvshare/core/status_macros.h"
#include "tools/trace/fields.h"

namespace kvshare::trace {
namespace {

using Json = nlohmann::json;

constexpr std::int64_t kMaxBlockTokens = 1 << 16;

// One of several words; `out` keeps its value when the field is absent.
template <typename Enum>
Status Word(const Json& json, const char* name, std::initializer_list<std::pair<const char*, Enum>> words, Enum* out) {
  std::string text;
  KVS_RETURN_IF_ERROR(Fields(json).Text(name, &text));
  if (text.empty()) return OkStatus();
  std::string known;
  for (const auto& [word, value] : words) {
    if (text == word) {
      *out = value;
      return OkStatus();
    }
    known += (known.empty() ? "" : ", ") + std::string(word);
  }
  return Fields::Wrong(name, "is none of " + known);
}

Status ReadTokens(const Json& list, std::vector<TokenId>* tokens) {
  if (!list.is_array() || list.size() > static_cast<std::size_t>(kMaxTokens)) {
    return Fields::Wrong("tokens", "is not a list of at most " + std::to_string(kMaxTokens) + " token ids");
  }
  for (const Json& id : list) {
    const bool whole = id.is_number_integer() || id.is_number_unsigned();
    if (!whole || id.get<double>() < 0 || id.get<double>() > std::numeric_limits<TokenId>::max()) {
      return Fields::Wrong("tokens", "holds something other than token ids");
    }
    tokens->push_back(id.get<TokenId>());
  }
  return OkStatus();
}

Status ReadWaitFor(const Json& json, const TraceBuilder& builder, TraceRequest* request) {
  const auto it = json.find("wait_for");
  if (it == json.end() || it->is_null()) return OkStatus();
  if (!it->is_array()) return Fields::Wrong("wait_for", "is not a list");
  for (const Json& name : *it) {
    const auto found = name.is_string() ? builder.FindRequest(name.get<std::string>()) : std::nullopt;
    if (!found) return Fields::Wrong("wait_for", "names no earlier request: " + name.dump());
    request->wait_for.push_back(*found);
  }
  return OkStatus();
}

Result<SegmentRef> Resolve(const std::string& ref, const TraceBuilder& builder) {
  if (!ref.starts_with('@')) {
    const auto found = builder.FindSegment(ref);
    if (!found) return InvalidArgument("segment " + ref + " was not given before its use");
    return SegmentRef{*found, std::nullopt};
  }
  const auto source = builder.FindRequest(ref.substr(1));
  if (!source) return InvalidArgument(ref + " is no earlier request");
  const auto& output = builder.trace().requests[*source].output;
  if (!output) return InvalidArgument(ref + " has no recorded output");
  return SegmentRef{*output, *source};
}

Status ReadSegments(const Json& list, const TraceBuilder& builder, TraceRequest* request) {
  if (!list.is_array() || list.empty()) return Fields::Wrong("segments", "is not a list with something in it");
  for (const Json& pair : list) {
    if (!pair.is_array() || pair.size() != 2 || !pair[0].is_string() || !pair[1].is_string()) {
      return Fields::Wrong("segments", "holds something other than [role, reference]");
    }
    const std::string role = pair[0].get<std::string>();
    KVS_ASSIGN_OR_RETURN(const SegmentRef ref, Resolve(pair[1].get<std::string>(), builder));
    if (role == "+") {
      if (request->messages.empty()) return InvalidArgument("the first segment continues no message (role \"+\")");
      request->messages.back().segments.push_back(ref);
    } else if (role.empty()) {
      return InvalidArgument("a segment has an empty role");
    } else {
      request->messages.push_back({role, {ref}});
    }
  }
  const bool raw = std::any_of(request->messages.begin(), request->messages.end(),
                               [](const TraceMessage& message) { return message.role == kRawRole; });
  if (raw && request->messages.size() > 1) return InvalidArgument("a prompt of role \"raw\" has other messages too");
  return OkStatus();
}

Status ReadBlocks(const Json& json, TraceBuilder* builder, TraceRequest* request) {
  const Json& hashes = json["hash_ids"];
  if (!hashes.is_array()) return Fields::Wrong("hash_ids", "is not a list");
  if (json.contains("base")) {
    std::string base;
    KVS_RETURN_IF_ERROR(Fields(json).Text("base", &base));
    const auto found = builder->FindRequest(base);
    if (!found) return Fields::Wrong("base", "names no earlier request");
    std::int64_t keep = 0;
    KVS_RETURN_IF_ERROR(Fields(json).Count("keep", builder->trace().requests[*found].blocks, &keep));
    builder->Inherit(*found, keep, request);
  }
  std::vector<std::uint64_t> ids;
  ids.reserve(hashes.size());
  for (const Json& id : hashes) {
    const bool whole = id.is_number_unsigned() || (id.is_number_integer() && id.get<std::int64_t>() >= 0);
    if (!whole) return Fields::Wrong("hash_ids", "holds something other than whole numbers >= 0");
    ids.push_back(id.get<std::uint64_t>());
  }
  return builder->AddBlocks(ids, request);
}

}  // namespace

Status AddKtrHeader(const Json& json, TraceBuilder* builder) {
  Trace& trace = builder->trace();
  if (!trace.requests.empty() || !trace.segments.empty()) return InvalidArgument("a header after other lines");
  const auto version = json.find("version");
  if (json["schema"] != "ktr") return InvalidArgument("\"schema\" is not \"ktr\"");
  if (version == json.end() || *version != 1) {
    return FailedPrecondition("not version 1 of KTR, the only one known here");
  }
  TraceHeader& header = trace.header;
  const Fields fields(json);
  KVS_RETURN_IF_ERROR(fields.Text("name", &header.name));
  KVS_RETURN_IF_ERROR(fields.Text("license", &header.license));
  KVS_RETURN_IF_ERROR(fields.Text("origin", &header.origin));
  KVS_RETURN_IF_ERROR(fields.Text("tokenizer", &header.tokenizer));
  KVS_RETURN_IF_ERROR(fields.Count("block_size", kMaxBlockTokens, &header.block_tokens));
  if (header.block_tokens == 0) return Fields::Wrong("block_size", "is 0");
  KVS_RETURN_IF_ERROR(Word<TimeBase>(
      json, "time_base", {{"arrival", TimeBase::kArrival}, {"session", TimeBase::kSession}, {"none", TimeBase::kNone}},
      &header.time_base));
  // Bailian's ids may be either: then the careful reading is that only equal beginnings are equal.
  KVS_RETURN_IF_ERROR(Word<HashKind>(json, "hash_kind",
                                     {{"chained", HashKind::kChained},
                                      {"content", HashKind::kContent},
                                      {"none", HashKind::kNone},
                                      {"content-or-chained", HashKind::kChained}},
                                     &header.hash_kind));
  return Word<bool>(json, "hash_id_scope", {{"global", false}, {"session", true}}, &header.hash_ids_per_session);
}

Status AddKtrSegment(const Json& json, TraceBuilder* builder) {
  const Fields fields(json);
  std::string name;
  KVS_RETURN_IF_ERROR(fields.Text("seg", &name));
  if (name.empty() || name[0] == '@') return InvalidArgument("\"seg\" is not a segment's name");
  TraceSegment segment;
  if (json.contains("text")) {
    KVS_RETURN_IF_ERROR(fields.Text("text", &segment.text));
  } else if (json.contains("tokens")) {
    segment.kind = TraceSegment::Kind::kTokens;
    KVS_RETURN_IF_ERROR(ReadTokens(json["tokens"], &segment.tokens));
  } else if (json.contains("n_tokens")) {
    segment.kind = TraceSegment::Kind::kWithheld;
    KVS_RETURN_IF_ERROR(fields.Count("n_tokens", kMaxTokens, &segment.withheld_tokens));
  } else {
    return InvalidArgument("segment " + name + " has neither \"text\" nor \"tokens\" nor \"n_tokens\"");
  }
  return builder->AddSegment(name, std::move(segment)).status();
}

Status AddKtrRequest(const Json& json, TraceBuilder* builder) {
  const Fields fields(json);
  TraceRequest request;
  request.id = std::to_string(builder->trace().requests.size());  // Mooncake's rows have no name of their own
  request.session = "0";
  KVS_RETURN_IF_ERROR(fields.Text("request_id", &request.id));
  KVS_RETURN_IF_ERROR(fields.Text("session_id", &request.session));
  KVS_RETURN_IF_ERROR(fields.Text("agent_id", &request.agent));
  KVS_RETURN_IF_ERROR(fields.Text("model", &request.model));
  KVS_ASSIGN_OR_RETURN(request.timestamp_ms, fields.Milliseconds("timestamp"));
  KVS_ASSIGN_OR_RETURN(const std::optional<double> delay, fields.Milliseconds("delay"));
  request.delay_ms = std::max(0.0, delay.value_or(0.0));
  KVS_ASSIGN_OR_RETURN(request.api_ms, fields.Milliseconds("api_ms"));
  KVS_RETURN_IF_ERROR(fields.Count("input_length", kMaxTokens, &request.input_length));
  KVS_RETURN_IF_ERROR(fields.Count("output_length", kMaxTokens, &request.output_length));
  KVS_RETURN_IF_ERROR(ReadWaitFor(json, *builder, &request));
  if (json.contains("segments")) {
    KVS_RETURN_IF_ERROR(ReadSegments(json["segments"], *builder, &request));
  } else if (json.contains("hash_ids")) {
    KVS_RETURN_IF_ERROR(ReadBlocks(json, builder, &request));
  }
  if (request.messages.empty() && request.blocks == 0 && request.input_length == 0) {
    return InvalidArgument("request " + request.id + " has neither \"segments\" nor \"hash_ids\" nor \"input_length\"");
  }
  std::string output;
  KVS_RETURN_IF_ERROR(fields.Text("output", &output));
  if (!output.empty()) {
    request.output = builder->FindSegment(output);
    if (!request.output) return Fields::Wrong("output", "names no earlier segment: " + output);
  }
  return builder->AddRequest(std::move(request));
}

}  // namespace kvshare::trace

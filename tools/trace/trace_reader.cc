#include "tools/trace/trace_reader.h"

#include <zlib.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <unordered_map>
#include <utility>
#include <vector>

#include "libkvshare/core/status_macros.h"

namespace kvshare::trace {
namespace {

using Json = nlohmann::json;

constexpr std::int64_t kMaxTokens = 1 << 24;                   // of one segment or request: beyond any model's window
constexpr std::size_t kMaxSynthetic = std::size_t{256} << 20;  // text made up here: a short line must not fill memory
constexpr double kMaxMs = 1e15;                                // 30,000 years; larger clocks are damage

// Text for a segment whose content was withheld: about one token per word, a function of its id alone.
std::string SynthesiseText(std::string_view id, std::int64_t tokens) {
  static constexpr std::string_view kWords[] = {" time",  " people", " year", " water", " house", " work",
                                                " part",  " day",    " hand", " place", " case",  " week",
                                                " point", " room",   " fact", " light"};
  std::uint64_t x = 0x9e3779b97f4a7c15u;
  for (char c : id) x = (x ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  std::string text;
  for (std::int64_t i = 0; i < tokens; ++i) {
    x = x * 6364136223846793005u + 1442695040888963407u;
    text += kWords[x >> 60];
  }
  return text;
}

// Typed access to the fields of one line. An absent or null optional field leaves its default.
class Fields {
 public:
  explicit Fields(const Json& json) : json_(json) {}

  Status Text(const char* name, std::string* out) const {
    const auto it = json_.find(name);
    if (it == json_.end() || it->is_null()) return OkStatus();
    if (!it->is_string()) return Wrong(name, "is not a string");
    *out = it->get<std::string>();
    return OkStatus();
  }

  Status Count(const char* name, std::int64_t max, std::int64_t* out) const {
    const auto it = json_.find(name);
    if (it == json_.end() || it->is_null()) return OkStatus();
    const bool whole = it->is_number_integer() || it->is_number_unsigned();
    const double value = it->is_number() ? it->get<double>() : -1;
    if (!whole || value < 0 || value > static_cast<double>(max)) {
      return Wrong(name, "is not a whole number from 0 to " + std::to_string(max));
    }
    *out = it->get<std::int64_t>();
    return OkStatus();
  }

  Result<std::optional<double>> Milliseconds(const char* name) const {
    const auto it = json_.find(name);
    if (it == json_.end() || it->is_null()) return std::optional<double>();
    if (!it->is_number() || !(std::abs(it->get<double>()) <= kMaxMs))
      return Wrong(name, "is not a time in milliseconds");
    return std::optional<double>(it->get<double>());
  }

  static Status Wrong(const char* name, const std::string& why) {
    return InvalidArgument("\"" + std::string(name) + "\" " + why);
  }

 private:
  const Json& json_;
};

}  // namespace

struct TraceParser::State {
  Trace trace;
  std::unordered_map<std::string, std::uint32_t> segment_by_id;
  std::unordered_map<std::string, std::size_t> request_by_id;
  std::int64_t line = 0;
  std::size_t text_bytes = 0;
  std::size_t synthetic_bytes = 0;

  Status Dispatch(const Json& json);
  Status Header(const Json& json);
  Status Segment(const Json& json);
  Status Request(const Json& json);
  Status WaitFor(const Json& json, TraceRequest* request) const;
  Status Segments(const Json& list, TraceRequest* request) const;
  Status Hashes(const Json& json, TraceRequest* request) const;
};

Status TraceParser::State::Header(const Json& json) {
  if (!trace.requests.empty() || !trace.segments.empty()) return InvalidArgument("a header after other lines");
  const auto version = json.find("version");
  if (json["schema"] != "ktr") return InvalidArgument("\"schema\" is not \"ktr\"");
  if (version == json.end() || *version != 1)
    return FailedPrecondition("not version 1 of KTR, the only one known here");
  const Fields fields(json);
  std::string base = "none";
  KVS_RETURN_IF_ERROR(fields.Text("name", &trace.header.name));
  KVS_RETURN_IF_ERROR(fields.Text("license", &trace.header.license));
  KVS_RETURN_IF_ERROR(fields.Text("origin", &trace.header.origin));
  KVS_RETURN_IF_ERROR(fields.Text("time_base", &base));
  if (base == "arrival") {
    trace.header.time_base = TimeBase::kArrival;
  } else if (base == "session") {
    trace.header.time_base = TimeBase::kSession;
  } else if (base != "none") {
    return InvalidArgument("\"time_base\" is none of arrival, session, none");
  }
  return OkStatus();
}

Status TraceParser::State::Segment(const Json& json) {
  const Fields fields(json);
  std::string id;
  KVS_RETURN_IF_ERROR(fields.Text("seg", &id));
  if (id.empty() || id[0] == '@') return InvalidArgument("\"seg\" is not a segment's name");
  if (segment_by_id.contains(id)) return InvalidArgument("segment " + id + " appears twice");
  std::string text;
  if (json.contains("text")) {
    KVS_RETURN_IF_ERROR(fields.Text("text", &text));
  } else if (json.contains("n_tokens")) {
    std::int64_t tokens = 0;
    KVS_RETURN_IF_ERROR(fields.Count("n_tokens", kMaxTokens, &tokens));
    synthetic_bytes += static_cast<std::size_t>(tokens) * 8;
    if (synthetic_bytes > kMaxSynthetic) return ResourceExhausted("more withheld text than can be made up (256 MiB)");
    text = SynthesiseText(id, tokens);
  } else if (json.contains("tokens")) {
    return Unimplemented("segment " + id + " holds token ids of one tokenizer; only text segments can be replayed");
  } else {
    return InvalidArgument("segment " + id + " has neither \"text\" nor \"n_tokens\"");
  }
  text_bytes += text.size();
  if (text_bytes > kMaxTextBytes) return ResourceExhausted("more than 4 GiB of text");
  segment_by_id.emplace(id, static_cast<std::uint32_t>(trace.segments.size()));
  trace.segments.push_back(std::move(text));
  return OkStatus();
}

Status TraceParser::State::WaitFor(const Json& json, TraceRequest* request) const {
  const auto it = json.find("wait_for");
  if (it == json.end() || it->is_null()) return OkStatus();
  if (!it->is_array()) return Fields::Wrong("wait_for", "is not a list");
  for (const Json& name : *it) {
    const auto found = name.is_string() ? request_by_id.find(name.get<std::string>()) : request_by_id.end();
    if (found == request_by_id.end()) return Fields::Wrong("wait_for", "names no earlier request: " + name.dump());
    request->wait_for.push_back(found->second);
  }
  return OkStatus();
}

Status TraceParser::State::Segments(const Json& list, TraceRequest* request) const {
  if (!list.is_array() || list.empty()) return Fields::Wrong("segments", "is not a list with something in it");
  for (const Json& pair : list) {
    if (!pair.is_array() || pair.size() != 2 || !pair[0].is_string() || !pair[1].is_string()) {
      return Fields::Wrong("segments", "holds something other than [role, reference]");
    }
    const std::string role = pair[0].get<std::string>();
    const std::string ref = pair[1].get<std::string>();
    std::uint32_t segment = 0;
    if (ref.starts_with('@')) {
      const auto source = request_by_id.find(ref.substr(1));
      if (source == request_by_id.end()) return InvalidArgument(ref + " is no earlier request");
      const auto& output = trace.requests[source->second].output;
      if (!output) return InvalidArgument(ref + " has no recorded output");
      segment = *output;
      ++request->handoffs;
    } else {
      const auto found = segment_by_id.find(ref);
      if (found == segment_by_id.end()) return InvalidArgument("segment " + ref + " was not given before its use");
      segment = found->second;
    }
    if (role == "+") {
      if (request->messages.empty()) return InvalidArgument("the first segment continues no message (role \"+\")");
      request->messages.back().segments.push_back(segment);
    } else if (role.empty()) {
      return InvalidArgument("a segment has an empty role");
    } else {
      request->messages.push_back({role, {segment}});
    }
  }
  return OkStatus();
}

Status TraceParser::State::Hashes(const Json& json, TraceRequest* request) const {
  const Json& hashes = json["hash_ids"];
  if (!hashes.is_array()) return Fields::Wrong("hash_ids", "is not a list");
  request->blocks = static_cast<std::int64_t>(hashes.size());
  if (json.contains("base")) {
    std::string base;
    KVS_RETURN_IF_ERROR(Fields(json).Text("base", &base));
    const auto found = request_by_id.find(base);
    if (found == request_by_id.end()) return Fields::Wrong("base", "names no earlier request");
    std::int64_t keep = 0;
    KVS_RETURN_IF_ERROR(Fields(json).Count("keep", trace.requests[found->second].blocks, &keep));
    request->blocks += keep;
  }
  return OkStatus();
}

Status TraceParser::State::Request(const Json& json) {
  const Fields fields(json);
  TraceRequest request;
  request.id = std::to_string(trace.requests.size());  // Mooncake rows have no name of their own
  request.session = "0";
  KVS_RETURN_IF_ERROR(fields.Text("request_id", &request.id));
  KVS_RETURN_IF_ERROR(fields.Text("session_id", &request.session));
  KVS_RETURN_IF_ERROR(fields.Text("agent_id", &request.agent));
  if (request_by_id.contains(request.id)) return InvalidArgument("request " + request.id + " appears twice");
  KVS_ASSIGN_OR_RETURN(request.timestamp_ms, fields.Milliseconds("timestamp"));
  KVS_ASSIGN_OR_RETURN(const std::optional<double> delay, fields.Milliseconds("delay"));
  request.delay_ms = std::max(0.0, delay.value_or(0.0));
  KVS_RETURN_IF_ERROR(fields.Count("input_length", kMaxTokens, &request.input_length));
  KVS_RETURN_IF_ERROR(fields.Count("output_length", kMaxTokens, &request.output_length));
  KVS_RETURN_IF_ERROR(WaitFor(json, &request));
  if (json.contains("segments")) {
    KVS_RETURN_IF_ERROR(Segments(json["segments"], &request));
  } else if (json.contains("hash_ids")) {
    KVS_RETURN_IF_ERROR(Hashes(json, &request));
  } else if (request.input_length == 0) {
    return InvalidArgument("request " + request.id + " has neither \"segments\" nor \"hash_ids\"");
  }
  std::string output;
  KVS_RETURN_IF_ERROR(fields.Text("output", &output));
  if (!output.empty()) {
    const auto found = segment_by_id.find(output);
    if (found == segment_by_id.end()) return Fields::Wrong("output", "names no earlier segment: " + output);
    request.output = found->second;
  }
  request_by_id.emplace(request.id, trace.requests.size());
  trace.requests.push_back(std::move(request));
  return OkStatus();
}

Status TraceParser::State::Dispatch(const Json& json) {
  if (!json.is_object()) return InvalidArgument("not a JSON object");
  if (json.contains("schema")) return Header(json);
  if (json.contains("seg")) return Segment(json);
  if (json.contains("request_id") || json.contains("hash_ids")) return Request(json);
  return InvalidArgument("neither a header (\"schema\"), a segment (\"seg\") nor a request (\"request_id\")");
}

TraceParser::TraceParser() : state_(std::make_unique<State>()) {}
TraceParser::~TraceParser() = default;

std::size_t TraceParser::requests() const { return state_->trace.requests.size(); }

Status TraceParser::AddLine(std::string_view line) {
  ++state_->line;
  if (line.find_first_not_of(" \t\r") == std::string_view::npos) return OkStatus();
  const auto at = [&](const Status& status) { return status.WithContext("line " + std::to_string(state_->line)); };
  if (line.size() > kMaxLineBytes) return at(ResourceExhausted("longer than 64 MiB"));
  const Json json = Json::parse(line, nullptr, false);
  if (json.is_discarded()) return at(InvalidArgument("not JSON"));
  const Status status = state_->Dispatch(json);
  return status.ok() ? status : at(status);
}

Result<Trace> TraceParser::Finish() {
  if (state_->trace.requests.empty()) return InvalidArgument("the trace holds no request");
  return std::move(state_->trace);
}

Result<Trace> ReadTrace(const std::string& path, std::size_t limit) {
  struct Close {
    void operator()(gzFile file) const { gzclose(file); }
  };
  // zlib reads plain files too.
  const std::unique_ptr<std::remove_pointer_t<gzFile>, Close> file(gzopen(path.c_str(), "rb"));
  if (!file) return NotFound(path + ": cannot be opened");
  TraceParser parser;
  std::string line;
  std::vector<char> block(std::size_t{1} << 16);
  const auto add = [&] {
    const Status status = parser.AddLine(line);
    line.clear();
    return status.ok() ? status : status.WithContext(path);
  };
  while (parser.requests() < limit) {
    const int n = gzread(file.get(), block.data(), static_cast<unsigned>(block.size()));
    int code = Z_OK;
    const char* cause = gzerror(file.get(), &code);
    if (n < 0 || code == Z_BUF_ERROR) {
      return DataLoss(path +
                      ": cannot be read to its end: " + (code == Z_BUF_ERROR ? "the gzip stream is cut short" : cause));
    }
    if (n == 0) break;
    std::string_view rest(block.data(), static_cast<std::size_t>(n));
    for (std::size_t end; parser.requests() < limit && (end = rest.find('\n')) != rest.npos;
         rest.remove_prefix(end + 1)) {
      line.append(rest.substr(0, end));
      KVS_RETURN_IF_ERROR(add());
    }
    if (parser.requests() >= limit) break;
    line.append(rest);
    if (line.size() > TraceParser::kMaxLineBytes) KVS_RETURN_IF_ERROR(add());
  }
  if (parser.requests() < limit && !line.empty()) KVS_RETURN_IF_ERROR(add());
  Result<Trace> trace = parser.Finish();
  if (!trace.ok()) return trace.status().WithContext(path);
  if (trace->header.name.empty()) trace->header.name = path.substr(path.find_last_of('/') + 1);
  return trace;
}

}  // namespace kvshare::trace

#include "tools/trace/trace_reader.h"

#include <zlib.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "libkvshare/core/status_macros.h"
#include "tools/trace/builder.h"
#include "tools/trace/chat_rows.h"
#include "tools/trace/json_line.h"
#include "tools/trace/ktr_rows.h"

namespace kvshare::trace {
namespace {

using Json = nlohmann::json;

// What a file without a header says about the size of its blocks: a prompt of k blocks has more than k-1 of them.
class BlockSizeGuess {
 public:
  void Add(const TraceRequest& request) {
    if (request.blocks == 0 || request.input_length == 0) return;
    least_ = std::max(least_, (request.input_length + request.blocks - 1) / request.blocks);
    if (request.blocks > 1) most_ = std::min(most_, (request.input_length - 1) / (request.blocks - 1));
  }

  // Mooncake's 512 wherever it can be; otherwise the largest power of two that fits; 512 when nothing does.
  std::int64_t Tokens() const {
    if (least_ <= 512 && 512 <= most_) return 512;
    for (std::int64_t size = 1 << 16; size >= 1; size /= 2) {
      if (least_ <= size && size <= most_) return size;
    }
    return 512;
  }

 private:
  std::int64_t least_ = 1;
  std::int64_t most_ = 1 << 16;
};

}  // namespace

struct TraceParser::State {
  TraceBuilder builder;
  std::int64_t line = 0;
  bool has_header = false;
  bool has_ktr_rows = false;
  bool has_chat_rows = false;
  BlockSizeGuess block_size;

  Status Dispatch(const Json& json);
  Status Headerless(const Json& json);
};

Status TraceParser::State::Headerless(const Json& json) {
  if (json.contains("seg") || json.contains("segments") || json.contains("hash_ids") || !IsChatRow(json)) {
    if (has_chat_rows) return InvalidArgument("a line of another kind than the chat requests before it");
    has_ktr_rows = true;
    return json.contains("seg") ? AddKtrSegment(json, &builder) : AddKtrRequest(json, &builder);
  }
  if (has_ktr_rows) return InvalidArgument("a chat request after lines of another kind");
  has_chat_rows = true;
  KVS_ASSIGN_OR_RETURN(const ChatRow row, ParseChatRow(json));
  const Result<std::size_t> added = AddChatRow(row, &builder);
  return added.ok() ? OkStatus() : added.status();
}

Status TraceParser::State::Dispatch(const Json& json) {
  if (!json.is_object()) return InvalidArgument("not a JSON object");
  if (json.contains("schema")) {
    if (has_header || has_ktr_rows || has_chat_rows) return InvalidArgument("a header after other lines");
    has_header = true;
    builder.trace().header.hash_kind = HashKind::kChained;
    return AddKtrHeader(json, &builder);
  }
  const bool request = json.contains("request_id") || json.contains("hash_ids") || json.contains("input_length");
  if (!request && !json.contains("seg") && (has_header || !IsChatRow(json))) {
    return InvalidArgument(
        "neither a header (\"schema\"), a segment (\"seg\"), a request (\"request_id\", \"hash_ids\") nor a chat "
        "request "
        "(\"messages\")");
  }
  if (!has_header) {
    KVS_RETURN_IF_ERROR(Headerless(json));
  } else {
    KVS_RETURN_IF_ERROR(json.contains("seg") ? AddKtrSegment(json, &builder) : AddKtrRequest(json, &builder));
  }
  if (!builder.trace().requests.empty()) block_size.Add(builder.trace().requests.back());
  return OkStatus();
}

TraceParser::TraceParser() : state_(std::make_unique<State>()) {}
TraceParser::~TraceParser() = default;

std::size_t TraceParser::requests() const { return state_->builder.trace().requests.size(); }

Status TraceParser::AddLine(std::string_view line) {
  ++state_->line;
  if (state_->line == 1 && line.starts_with("\xef\xbb\xbf")) line.remove_prefix(3);  // a byte order mark
  if (line.find_first_not_of(" \t\r") == std::string_view::npos) return OkStatus();
  const auto at = [&](const Status& status) { return status.WithContext("line " + std::to_string(state_->line)); };
  const Result<Json> json = ParseJsonLine(line);
  if (!json.ok()) return at(json.status());
  const Status status = state_->Dispatch(*json);
  return status.ok() ? status : at(status);
}

Result<Trace> TraceParser::Finish() {
  Trace& trace = state_->builder.trace();
  if (trace.requests.empty()) return InvalidArgument("the trace holds no request");
  TraceHeader& header = trace.header;
  if (state_->has_chat_rows) {
    header.format = TraceFormat::kOpenAi;
    header.time_base = TimeBase::kSession;
  } else if (!state_->has_header) {
    const bool text = std::any_of(trace.requests.begin(), trace.requests.end(),
                                  [](const TraceRequest& request) { return !request.messages.empty(); });
    const bool clock = std::any_of(trace.requests.begin(), trace.requests.end(),
                                   [](const TraceRequest& request) { return request.timestamp_ms.has_value(); });
    header.format = text ? TraceFormat::kKtr : TraceFormat::kMooncake;
    header.time_base = clock && !text ? TimeBase::kArrival : TimeBase::kNone;
    header.block_tokens = state_->block_size.Tokens();
  }
  return std::move(trace);
}

Result<Trace> ReadTrace(const std::string& path, std::size_t limit) {
  struct Close {
    void operator()(gzFile file) const { gzclose(file); }
  };
  // zlib reads plain files too.
  const std::unique_ptr<std::remove_pointer_t<gzFile>, Close> file(gzopen(path.c_str(), "rb"));
  if (!file) return NotFound(path + ": cannot be opened");
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) return InvalidArgument(path + ": is a directory, not a trace");
  TraceParser parser;
  std::string line;
  std::vector<char> block(std::size_t{1} << 16);
  // How many bytes of the next block there are; 0 at the end.
  const auto read = [&]() -> Result<int> {
    const int n = gzread(file.get(), block.data(), static_cast<unsigned>(block.size()));
    int code = Z_OK;
    const char* cause = gzerror(file.get(), &code);
    if (n >= 0 && code != Z_BUF_ERROR) return n;
    return DataLoss(path +
                    ": cannot be read to its end: " + (code == Z_BUF_ERROR ? "the gzip stream is cut short" : cause));
  };
  const auto add = [&] {
    Status status = parser.AddLine(line);
    line.clear();
    if (status.ok()) return status;
    // What is wrong with a line may be wrong with the file: gzip's checksum stands at its end.
    Result<int> n = 1;
    while (n.ok() && *n > 0) n = read();
    return n.ok() ? status.WithContext(path) : n.status();
  };
  while (parser.requests() < limit) {
    KVS_ASSIGN_OR_RETURN(const int n, read());
    if (n == 0) break;
    std::string_view rest(block.data(), static_cast<std::size_t>(n));
    for (std::size_t end; parser.requests() < limit && (end = rest.find('\n')) != rest.npos;
         rest.remove_prefix(end + 1)) {
      line.append(rest.substr(0, end));
      KVS_RETURN_IF_ERROR(add());
    }
    if (parser.requests() >= limit) break;
    line.append(rest);
    if (line.size() > kMaxLineBytes) KVS_RETURN_IF_ERROR(add());
  }
  if (parser.requests() < limit && !line.empty()) KVS_RETURN_IF_ERROR(add());
  Result<Trace> trace = parser.Finish();
  if (!trace.ok()) return trace.status().WithContext(path);
  if (trace->header.name.empty()) trace->header.name = path.substr(path.find_last_of('/') + 1);
  return trace;
}

}  // namespace kvshare::trace

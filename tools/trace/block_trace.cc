#include "tools/trace/block_trace.h"

#include <zlib.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>
#include <unordered_map>

#include "libkvshare/core/json_text.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::trace {
namespace {

using Json = nlohmann::json;

constexpr int kSessionsAtOnce = 8;
constexpr double kLongestGapSeconds = 60;
constexpr std::int64_t kMaxTokens = std::int64_t{1} << 40;

// Python's random.Random(1).shuffle, so that session traces come in the order of the reference tool.
class PythonShuffle {
 public:
  PythonShuffle() {
    Seed(19650218u);
    std::size_t i = 1;
    for (std::size_t k = 0; k < kN; ++k) {  // init_by_array({1})
      state_[i] = (state_[i] ^ ((state_[i - 1] ^ (state_[i - 1] >> 30)) * 1664525u)) + 1u;
      Step(i);
    }
    for (std::size_t k = 0; k + 1 < kN; ++k) {
      state_[i] = (state_[i] ^ ((state_[i - 1] ^ (state_[i - 1] >> 30)) * 1566083941u)) - static_cast<std::uint32_t>(i);
      Step(i);
    }
    state_[0] = 0x80000000u;
  }

  template <typename T>
  void Shuffle(std::vector<T>& items) {
    for (std::size_t i = items.size(); i-- > 1;) std::swap(items[i], items[Below(static_cast<std::uint32_t>(i + 1))]);
  }

 private:
  static constexpr std::size_t kN = 624, kM = 397;

  void Seed(std::uint32_t seed) {
    state_[0] = seed;
    for (std::size_t i = 1; i < kN; ++i) {
      state_[i] = 1812433253u * (state_[i - 1] ^ (state_[i - 1] >> 30)) + static_cast<std::uint32_t>(i);
    }
  }
  void Step(std::size_t& i) {
    if (++i < kN) return;
    state_[0] = state_[kN - 1];
    i = 1;
  }
  std::uint32_t Next() {
    if (at_ == kN) {
      for (std::size_t k = 0; k < kN; ++k) {
        const std::uint32_t y = (state_[k] & 0x80000000u) | (state_[(k + 1) % kN] & 0x7fffffffu);
        state_[k] = state_[(k + kM) % kN] ^ (y >> 1) ^ ((y & 1u) != 0 ? 0x9908b0dfu : 0u);
      }
      at_ = 0;
    }
    std::uint32_t y = state_[at_++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
  }
  std::uint32_t Below(std::uint32_t n) {
    int bits = 0;
    while (bits < 32 && (n >> bits) != 0) ++bits;
    std::uint32_t draw = Next() >> (32 - bits);
    while (draw >= n) draw = Next() >> (32 - bits);
    return draw;
  }

  std::array<std::uint32_t, kN> state_{};
  std::size_t at_ = kN;
};

struct Row {
  BlockTrace::Request request;
  std::uint32_t session = 0;
  std::optional<double> timestamp_ms;
};

// The order in which `rows` meet the cache, when sessions have clocks of their own.
std::vector<std::size_t> SessionOrder(const std::vector<Row>& rows, std::size_t num_sessions) {
  std::vector<std::vector<std::size_t>> sessions(num_sessions);
  for (std::size_t i = 0; i < rows.size(); ++i) sessions[rows[i].session].push_back(i);
  PythonShuffle().Shuffle(sessions);
  std::array<double, kSessionsAtOnce> free_at{};
  std::vector<std::pair<double, std::size_t>> starts;
  for (const auto& session : sessions) {
    double& now = *std::min_element(free_at.begin(), free_at.end());
    std::optional<double> previous;
    for (std::size_t i : session) {
      const auto& timestamp = rows[i].timestamp_ms;
      const bool clocked = timestamp && previous;
      now += clocked ? std::min(std::max((*timestamp - *previous) / 1000.0, 0.001), kLongestGapSeconds) : 1.0;
      previous = timestamp;
      starts.emplace_back(now, i);
    }
  }
  std::sort(starts.begin(), starts.end());
  std::vector<std::size_t> order;
  for (const auto& [start, i] : starts) order.push_back(i);
  return order;
}

Status Wrong(const char* field, const char* cause) {
  return InvalidArgument(std::string("\"") + field + "\" " + cause);
}

// A non-negative integer field; `out` stays as it is when the field is absent.
Status Count(const Json& json, const char* field, std::int64_t* out) {
  const auto it = json.find(field);
  if (it == json.end() || it->is_null()) return OkStatus();
  if (!it->is_number_integer() || *it < 0 || *it > kMaxTokens) return Wrong(field, "is not a count");
  *out = it->get<std::int64_t>();
  return OkStatus();
}

Status Text(const Json& json, const char* field, std::string* out) {
  const auto it = json.find(field);
  if (it == json.end() || it->is_null()) return OkStatus();
  if (!it->is_string()) return Wrong(field, "is not a string");
  *out = it->get<std::string>();
  return OkStatus();
}

}  // namespace

struct BlockTraceParser::State {
  Status Header(const Json& json);
  Status Request(const Json& json);
  Status Ids(const Json& json, BlockTrace::Request* request);

  BlockTrace trace;
  std::vector<Row> rows;
  std::unordered_map<std::int64_t, std::uint32_t> number_of;       // block id -> number
  std::unordered_map<std::string, BlockTrace::Request> requests;   // by request_id, for `base`
  std::unordered_map<std::string, std::uint32_t> session_numbers;  // session_id -> number
  std::int64_t line = 0;
  bool arrival = true;  // a file without a header is Mooncake's
};

Status BlockTraceParser::State::Header(const Json& json) {
  std::string schema;
  KVS_RETURN_IF_ERROR(Text(json, "schema", &schema));
  if (schema != "ktr") return Wrong("schema", "is not \"ktr\"");
  std::int64_t version = 0;
  KVS_RETURN_IF_ERROR(Count(json, "version", &version));
  if (version != 1) return FailedPrecondition("KTR version " + std::to_string(version) + "; this reader knows 1");
  std::string time_base;
  KVS_RETURN_IF_ERROR(Text(json, "time_base", &time_base));
  arrival = time_base == "arrival";
  KVS_RETURN_IF_ERROR(Count(json, "block_size", &trace.block_tokens));
  return Text(json, "name", &trace.name);
}

Status BlockTraceParser::State::Ids(const Json& json, BlockTrace::Request* request) {
  const Json& ids = json["hash_ids"];
  if (!ids.is_array()) return Wrong("hash_ids", "is not an array");
  std::size_t keep = 0, from = 0;
  std::string base;
  KVS_RETURN_IF_ERROR(Text(json, "base", &base));
  if (!base.empty()) {
    const auto found = requests.find(base);
    if (found == requests.end()) return Wrong("base", "names no earlier request");
    std::int64_t count = -1;
    KVS_RETURN_IF_ERROR(Count(json, "keep", &count));
    if (count < 0) return Wrong("keep", "is missing, and \"base\" needs it");
    from = found->second.first;
    keep = std::min(static_cast<std::size_t>(count), found->second.count);
  }
  request->first = trace.blocks.size();
  request->count = keep + ids.size();
  if (trace.blocks.size() + request->count > kMaxBlocks) {
    return ResourceExhausted("more than " + std::to_string(kMaxBlocks) + " blocks");
  }
  for (std::size_t i = 0; i < keep; ++i) trace.blocks.push_back(trace.blocks[from + i]);
  for (const Json& id : ids) {
    if (!id.is_number_integer()) return Wrong("hash_ids", "holds something that is no integer");
    const auto next = static_cast<std::uint32_t>(number_of.size());
    trace.blocks.push_back(number_of.emplace(id.get<std::int64_t>(), next).first->second);
  }
  return OkStatus();
}

Status BlockTraceParser::State::Request(const Json& json) {
  if (!json.contains("hash_ids")) {
    return Unimplemented("the request has texts and no \"hash_ids\"; only traces of block hashes can be simulated");
  }
  Row row;
  KVS_RETURN_IF_ERROR(Ids(json, &row.request));
  row.request.tokens = -1;
  KVS_RETURN_IF_ERROR(Count(json, "input_length", &row.request.tokens));
  if (row.request.tokens < 0) return Wrong("input_length", "is missing");
  std::string id = std::to_string(rows.size()), session = "0";
  KVS_RETURN_IF_ERROR(Text(json, "request_id", &id));
  KVS_RETURN_IF_ERROR(Text(json, "session_id", &session));
  row.session = session_numbers.emplace(session, static_cast<std::uint32_t>(session_numbers.size())).first->second;
  if (const auto it = json.find("timestamp"); it != json.end() && !it->is_null()) {
    if (!it->is_number()) return Wrong("timestamp", "is not a number");
    row.timestamp_ms = it->get<double>();
  }
  requests[id] = row.request;
  trace.tokens += row.request.tokens;
  rows.push_back(row);
  return OkStatus();
}

BlockTraceParser::BlockTraceParser() : state_(std::make_unique<State>()) {}
BlockTraceParser::~BlockTraceParser() = default;

Status BlockTraceParser::AddLine(std::string_view line) {
  ++state_->line;
  if (line.find_first_not_of(" \t\r") == std::string_view::npos) return OkStatus();
  const auto at = [&](const Status& status) { return status.WithContext("line " + std::to_string(state_->line)); };
  if (line.size() > kMaxLineBytes) return at(ResourceExhausted("longer than 64 MiB"));
  const Result<Json> parsed = ParseJson(line);
  if (!parsed.ok()) return at(parsed.status());
  const Json& json = *parsed;
  if (!json.is_object()) return at(InvalidArgument("not a JSON object"));
  if (json.contains("seg")) return OkStatus();  // a text; whether requests use it shows there
  const Status status = json.contains("schema") ? state_->Header(json) : state_->Request(json);
  return status.ok() ? status : at(status);
}

Result<BlockTrace> BlockTraceParser::Finish() {
  if (state_->rows.empty()) return InvalidArgument("the trace holds no request");
  std::vector<Row>& rows = state_->rows;
  std::vector<std::size_t> order(rows.size());
  if (state_->arrival) {
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return rows[a].timestamp_ms.value_or(0) < rows[b].timestamp_ms.value_or(0);
    });
  } else {
    order = SessionOrder(rows, state_->session_numbers.size());
  }
  BlockTrace trace = std::move(state_->trace);
  trace.unique_blocks = static_cast<std::uint32_t>(state_->number_of.size());
  trace.requests.reserve(rows.size());
  for (std::size_t i : order) trace.requests.push_back(rows[i].request);
  return trace;
}

Result<BlockTrace> ReadBlockTrace(const std::string& path) {
  struct Close {
    void operator()(gzFile file) const { gzclose(file); }
  };
  // zlib reads plain files too.
  const std::unique_ptr<std::remove_pointer_t<gzFile>, Close> file(gzopen(path.c_str(), "rb"));
  if (!file) return NotFound(path + ": cannot be opened");
  BlockTraceParser parser;
  std::string line;
  std::vector<char> block(std::size_t{1} << 16);
  for (bool more = true; more;) {
    const int n = gzread(file.get(), block.data(), static_cast<unsigned>(block.size()));
    int code = Z_OK;
    const char* cause = gzerror(file.get(), &code);
    if (n < 0 || code == Z_BUF_ERROR) {
      return DataLoss(path +
                      ": cannot be read to its end: " + (code == Z_BUF_ERROR ? "the gzip stream is cut short" : cause));
    }
    more = n > 0;
    std::string_view rest(block.data(), static_cast<std::size_t>(n));
    for (std::size_t end; (end = rest.find('\n')) != rest.npos; rest.remove_prefix(end + 1)) {
      line.append(rest.substr(0, end));
      if (const Status status = parser.AddLine(line); !status.ok()) return status.WithContext(path);
      line.clear();
    }
    line.append(rest);
    const bool last = !more && !line.empty();
    if (last || line.size() > BlockTraceParser::kMaxLineBytes) {
      if (const Status status = parser.AddLine(line); !status.ok()) return status.WithContext(path);
    }
  }
  Result<BlockTrace> trace = parser.Finish();
  if (!trace.ok()) return trace.status().WithContext(path);
  if (trace->name.empty()) trace->name = path.substr(path.find_last_of('/') + 1);
  return trace;
}

}  // namespace kvshare::trace

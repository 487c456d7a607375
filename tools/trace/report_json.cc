#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "libkvshare/core/json_text.h"
#include "libkvshare/core/status_macros.h"
#include "tools/trace/report.h"

namespace kvshare::trace {
namespace {

using Json = nlohmann::ordered_json;

double Round(double value) { return std::round(value * 1000) / 1000; }

Json CountsJson(const TokenCounts& tokens) {
  return {{"prompt_tokens", tokens.prompt},
          {"prefix_tokens", tokens.prefix},
          {"moved_tokens", tokens.moved},
          {"recomputed_tokens", tokens.recomputed},
          {"fresh_tokens", tokens.fresh}};
}

Json ModeJson(const ModeReport& mode) {
  Json json = CountsJson(mode.tokens);
  json["hit_rate"] = Round(mode.tokens.hit_rate());
  json["cross_agent_tokens"] = mode.cross_agent_tokens;
  json["generated_tokens"] = mode.generated_tokens;
  json["truncated_requests"] = mode.truncated_requests;
  json["ttft_ms"] = {{"mean", Round(mode.ttft_ms.mean)},
                     {"p50", Round(mode.ttft_ms.p50)},
                     {"p95", Round(mode.ttft_ms.p95)},
                     {"p99", Round(mode.ttft_ms.p99)}};
  json["wall_s"] = Round(mode.wall_s);
  json["outputs_sha256"] = mode.outputs_sha256;
  json["peak_rss_bytes"] = mode.peak_rss_bytes ? Json(*mode.peak_rss_bytes) : Json(nullptr);
  json["miss_reasons"] = mode.miss_reasons;
  json["ttft_ms_quantiles"] = Json::array();
  for (double ms : mode.ttft_ms_quantiles) json["ttft_ms_quantiles"].push_back(Round(ms));
  json["hit_rate_over_time"] = Json::array();
  for (const Window& window : mode.windows) {
    const double tokens = static_cast<double>(std::max<std::int64_t>(window.prompt_tokens, 1));
    json["hit_rate_over_time"].push_back({{"end_s", Round(window.end_s)},
                                          {"requests", window.requests},
                                          {"prompt_tokens", window.prompt_tokens},
                                          {"reused_tokens", window.reused_tokens},
                                          {"hit_rate", Round(static_cast<double>(window.reused_tokens) / tokens)}});
  }
  json["agents"] = Json::object();
  for (const AgentReport& agent : mode.agents) {
    Json own = CountsJson(agent.tokens);
    own["requests"] = agent.requests;
    own["ttft_ms_mean"] = Round(agent.ttft_ms_mean);
    json["agents"][agent.agent] = std::move(own);
  }
  return json;
}

// ---- reading ----

// The first thing wrong with a report, if any: fields are read one after the other, and looked at once at the end.
class Reader {
 public:
  std::int64_t Count(const Json& object, const char* name, bool needed = true) {
    const Json* value = Find(object, name, needed);
    if (value == nullptr) return 0;
    const double number = value->is_number() ? value->get<double>() : -1;
    if (!(number >= 0 && number <= 1e18)) return Wrong(name, "is not a count"), 0;
    return static_cast<std::int64_t>(number);
  }
  double Number(const Json& object, const char* name, bool needed = true) {
    const Json* value = Find(object, name, needed);
    if (value == nullptr) return 0;
    if (!value->is_number() || !std::isfinite(value->get<double>())) return Wrong(name, "is not a number"), 0.0;
    return value->get<double>();
  }
  std::string Text(const Json& object, const char* name, bool needed = true) {
    const Json* value = Find(object, name, needed);
    if (value == nullptr) return "";
    if (!value->is_string()) return Wrong(name, "is not a string"), "";
    return value->get<std::string>();
  }
  // An object or array; null when it is absent.
  const Json* Nested(const Json& object, const char* name, Json::value_t type, bool needed) {
    const Json* value = Find(object, name, needed);
    if (value != nullptr && value->type() != type) return Wrong(name, "has another type"), nullptr;
    return value;
  }
  Status status() const { return status_; }

 private:
  const Json* Find(const Json& object, const char* name, bool needed) {
    const auto it = object.is_object() ? object.find(name) : object.end();
    if (it != object.end() && !it->is_null()) return &*it;
    if (needed) Wrong(name, "is missing");
    return nullptr;
  }
  void Wrong(const char* name, const char* why) {
    if (status_.ok()) status_ = InvalidArgument("not a replay's report: \"" + std::string(name) + "\" " + why);
  }

  Status status_;
};

TokenCounts ReadCounts(const Json& json, bool needed, Reader* reader) {
  return {.prompt = reader->Count(json, "prompt_tokens", needed),
          .prefix = reader->Count(json, "prefix_tokens", needed),
          .moved = reader->Count(json, "moved_tokens", needed),
          .recomputed = reader->Count(json, "recomputed_tokens", needed),
          .fresh = reader->Count(json, "fresh_tokens", needed)};
}

ModeReport ReadMode(const std::string& name, const Json& json, Reader* reader) {
  using Type = Json::value_t;
  ModeReport mode{.mode = name, .tokens = ReadCounts(json, true, reader)};
  mode.cross_agent_tokens = reader->Count(json, "cross_agent_tokens", false);
  mode.generated_tokens = reader->Count(json, "generated_tokens", false);
  mode.truncated_requests = reader->Count(json, "truncated_requests", false);
  mode.wall_s = reader->Number(json, "wall_s");
  mode.outputs_sha256 = reader->Text(json, "outputs_sha256");
  if (json.is_object() && json.contains("peak_rss_bytes") && !json["peak_rss_bytes"].is_null()) {
    mode.peak_rss_bytes = reader->Count(json, "peak_rss_bytes");
  }
  if (const Json* ttft = reader->Nested(json, "ttft_ms", Type::object, true)) {
    mode.ttft_ms = {.mean = reader->Number(*ttft, "mean"),
                    .p50 = reader->Number(*ttft, "p50"),
                    .p95 = reader->Number(*ttft, "p95"),
                    .p99 = reader->Number(*ttft, "p99")};
  }
  if (const Json* quantiles = reader->Nested(json, "ttft_ms_quantiles", Type::array, false)) {
    for (const Json& ms : *quantiles) mode.ttft_ms_quantiles.push_back(ms.is_number() ? ms.get<double>() : 0);
  }
  if (const Json* reasons = reader->Nested(json, "miss_reasons", Type::object, false)) {
    for (const auto& [reason, tokens] : reasons->items()) {
      mode.miss_reasons[reason] = reader->Count(*reasons, reason.c_str());
    }
  }
  if (const Json* windows = reader->Nested(json, "hit_rate_over_time", Type::array, false)) {
    for (const Json& window : *windows) {
      mode.windows.push_back({.end_s = reader->Number(window, "end_s"),
                              .requests = reader->Count(window, "requests"),
                              .prompt_tokens = reader->Count(window, "prompt_tokens"),
                              .reused_tokens = reader->Count(window, "reused_tokens")});
    }
  }
  if (const Json* agents = reader->Nested(json, "agents", Type::object, false)) {
    for (const auto& [agent, own] : agents->items()) {
      mode.agents.push_back({.agent = agent,
                             .requests = reader->Count(own, "requests", false),
                             .tokens = ReadCounts(own, false, reader),
                             .ttft_ms_mean = reader->Number(own, "ttft_ms_mean", false)});
    }
  }
  return mode;
}

}  // namespace

std::string ReportJson(const Report& report) {
  Json json = {{"trace", report.trace}, {"model", report.model},       {"dtype", report.dtype},
               {"isa", report.isa},     {"requests", report.requests}, {"modes", Json::object()}};
  for (const ModeReport& mode : report.modes) json["modes"][mode.mode] = ModeJson(mode);
  if (report.ceilings) {
    const CeilingReport& c = *report.ceilings;
    const auto row = [&](std::int64_t tokens) {
      const double whole = static_cast<double>(std::max<std::int64_t>(c.prompt_tokens, 1));
      return Json{{"prefix_tokens", tokens}, {"hit_rate", Round(static_cast<double>(tokens) / whole)}};
    };
    json["ceilings"] = {{"pool_pages", c.pool_pages},           {"pool_bytes", c.pool_bytes},
                        {"unique_pages", c.unique_pages},       {"prompt_tokens", c.prompt_tokens},
                        {"unlimited", row(c.unlimited_tokens)}, {"lru", row(c.lru_tokens)},
                        {"belady", row(c.belady_tokens)}};
  }
  return JsonText(json);
}

Result<Report> ParseReport(const std::string& text) {
  const Json json = Json::parse(text, nullptr, false);
  if (json.is_discarded() || !json.is_object()) return InvalidArgument("not a replay's report: not a JSON object");
  Reader reader;
  Report report{.trace = reader.Text(json, "trace"),
                .model = reader.Text(json, "model"),
                .dtype = reader.Text(json, "dtype", false),
                .isa = reader.Text(json, "isa", false),
                .requests = reader.Count(json, "requests")};
  if (const Json* modes = reader.Nested(json, "modes", Json::value_t::object, true)) {
    if (modes->empty()) return InvalidArgument("not a replay's report: it has no mode");
    for (const auto& [name, mode] : modes->items()) report.modes.push_back(ReadMode(name, mode, &reader));
  }
  if (const Json* c = reader.Nested(json, "ceilings", Json::value_t::object, false)) {
    const auto row = [&](const char* name) {
      const Json* found = reader.Nested(*c, name, Json::value_t::object, true);
      return found == nullptr ? 0 : reader.Count(*found, "prefix_tokens");
    };
    report.ceilings = CeilingReport{.pool_pages = reader.Count(*c, "pool_pages"),
                                    .pool_bytes = reader.Count(*c, "pool_bytes"),
                                    .unique_pages = reader.Count(*c, "unique_pages"),
                                    .prompt_tokens = reader.Count(*c, "prompt_tokens"),
                                    .unlimited_tokens = row("unlimited"),
                                    .lru_tokens = row("lru"),
                                    .belady_tokens = row("belady")};
  }
  KVS_RETURN_IF_ERROR(reader.status());
  return report;
}

}  // namespace kvshare::trace

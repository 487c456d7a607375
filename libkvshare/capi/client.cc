// The C interface: the client, what it is told about the daemon, and answers as JSON.
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "libkvshare/capi/capi.h"
#include "libkvshare/core/json_text.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::capi {
namespace {

using Json = nlohmann::ordered_json;

// Bytes that are not UTF-8 are replaced: JSON has none.
std::string Dump(const Json& json) { return JsonText(json); }

Json TotalsJson(const ReuseTotals& totals) {
  return {{"requests", totals.requests},
          {"prompt_tokens", totals.prompt_tokens},
          {"prefix_tokens", totals.prefix_tokens},
          {"moved_tokens", totals.moved_tokens},
          {"recomputed_tokens", totals.recomputed_tokens},
          {"fresh_tokens", totals.fresh_tokens},
          {"generated_tokens", totals.generated_tokens}};
}

Json AuditJson(const AuditTotals& audit) {
  return {{"audits", audit.audits}, {"failures", audit.failures}, {"kl_sum", audit.kl_sum}};
}

Json AuditsJson(const std::vector<AuditTotals>& audits) {
  Json json = Json::array();
  for (const AuditTotals& audit : audits) json.push_back(AuditJson(audit));
  return json;
}

// As `kvctl stat --format json` has it.
Json StatsJson(const Stats& stats) {
  Json json = TotalsJson(stats.totals);
  json["pool"] = {{"capacity_bytes", stats.pool.capacity_bytes},
                  {"used_bytes", stats.pool.used_bytes},
                  {"pages", stats.pool.pages},
                  {"leases", stats.pool.leases},
                  {"evictions", stats.pool.evictions},
                  {"pinned_bytes", stats.pinned_bytes},
                  {"client_leases", stats.client_leases}};
  const ColdStats& cold = stats.cold;
  json["cold"] = {{"entries", cold.entries},
                  {"bytes", cold.bytes},
                  {"hits", cold.hits},
                  {"misses", cold.misses},
                  {"integrity_errors", cold.integrity_errors},
                  {"capacity_bytes", cold.capacity_bytes},
                  {"stores", cold.stores},
                  {"dropped", cold.dropped},
                  {"evictions", cold.evictions},
                  {"read_bytes", cold.read_bytes},
                  {"written_bytes", cold.written_bytes},
                  {"state", cold.state}};
  const ApproximateStats& approximate = stats.approximate;
  json["approximate"] = {{"answers", approximate.answers},
                         {"sent_back", approximate.sent_back},
                         {"healed", approximate.healed},
                         {"kept_bytes", approximate.kept_bytes},
                         {"guard_margin", approximate.guard_margin},
                         {"guard_margin_elsewhere", approximate.guard_margin_elsewhere},
                         {"moved_row", approximate.moved_row},
                         {"audits", AuditsJson(approximate.audits)},
                         {"later_audits", AuditsJson(approximate.later_audits)},
                         {"shadow_audits", AuditJson(approximate.shadow_audits)}};
  json["requests_running"] = stats.requests_running;
  json["requests_waiting"] = stats.requests_waiting;
  json["requests_failed"] = stats.requests_failed;
  json["uptime_s"] = stats.uptime_s;
  json["miss_reasons"] = Json::object();
  for (const auto& [reason, tokens] : stats.miss_reasons) json["miss_reasons"][reason] = tokens;
  json["agents"] = Json::object();
  for (const auto& [agent, totals] : stats.agents) json["agents"][agent] = TotalsJson(totals);
  return json;
}

Json ExplanationJson(const Explanation& explanation) {
  Json spans = Json::array();
  for (const ExplainSpan& span : explanation.spans) {
    spans.push_back({{"kind", span.kind},
                     {"start", span.start},
                     {"length", span.length},
                     {"source", span.source},
                     {"tier", span.tier},
                     {"repair", span.repair},
                     {"miss_reason", span.miss_reason}});
  }
  return {{"spans", std::move(spans)}};
}

Status Open(const kvs_options* options, kvs_client** client) {
  if (client == nullptr) return InvalidArgument("client is NULL");
  kvs_options in{};
  KVS_RETURN_IF_ERROR(ReadStruct(options, "options", &in));
  if (in.endpoint == nullptr) return InvalidArgument("options.endpoint is NULL");
  if (in.timeout_ms < 0) return InvalidArgument("options.timeout_ms is negative");
  ClientOptions connect{.endpoint = in.endpoint};
  if (in.timeout_ms > 0) connect.timeout = std::chrono::milliseconds(in.timeout_ms);
  KVS_ASSIGN_OR_RETURN(std::unique_ptr<Client> connected, Connect(connect));
  *client = new kvs_client{.timeout = connect.timeout, .client = std::move(connected)};
  return OkStatus();
}

Status Info(kvs_client* client, kvs_server_info* info) {
  KVS_RETURN_IF_ERROR(CheckClient(client));
  KVS_ASSIGN_OR_RETURN(const ServerInfo from, client->client->Ping(client->timeout));
  kvs_server_info out{};
  out.max_context_tokens = from.max_context_tokens;
  out.vocab_size = from.vocab_size;
  out.reuse = static_cast<int32_t>(from.reuse) + 1;
  CopyName(from.version, out.version);
  CopyName(from.model, out.model);
  CopyName(from.space, out.space);
  CopyName(from.dtype, out.dtype);
  CopyName(from.isa, out.isa);
  return WriteStruct(out, "info", info);
}

Status Tokenize(kvs_client* client, const char* text, size_t text_len, int32_t** ids, size_t* num_ids) {
  KVS_RETURN_IF_ERROR(CheckClient(client));
  if (text == nullptr || ids == nullptr || num_ids == nullptr) return InvalidArgument("text, ids or num_ids is NULL");
  KVS_ASSIGN_OR_RETURN(const std::vector<TokenId> tokens, client->client->Tokenize({text, text_len}));
  return HandOut(tokens, ids, num_ids);
}

Status Render(kvs_client* client, const kvs_prompt* prompt, char** text, size_t* text_len, int32_t** ids,
              size_t* num_ids) {
  KVS_RETURN_IF_ERROR(CheckClient(client));
  if (text == nullptr || text_len == nullptr || ids == nullptr || num_ids == nullptr) {
    return InvalidArgument("text, text_len, ids or num_ids is NULL");
  }
  KVS_ASSIGN_OR_RETURN(const PromptParts parts, ReadPrompt(prompt));
  const ChatPrompt* chat = std::get_if<ChatPrompt>(&parts.prompt);
  if (chat == nullptr) return InvalidArgument("only messages can be rendered");
  KVS_ASSIGN_OR_RETURN(const RenderReply reply, client->client->Render({.chat = *chat}));
  KVS_RETURN_IF_ERROR(HandOut(reply.prompt, text));
  *text_len = reply.prompt.size();
  return HandOut(reply.ids, ids, num_ids);
}

Status ExplainJson(kvs_client* client, const kvs_prompt* prompt, uint64_t request_id, kvs_reuse reuse, char** json) {
  KVS_RETURN_IF_ERROR(CheckClient(client));
  if (json == nullptr) return InvalidArgument("json is NULL");
  ExplainRequest request{.request_id = request_id};
  KVS_ASSIGN_OR_RETURN(request.reuse, ReadReuse(reuse));
  if (request_id == 0 || prompt != nullptr) {
    KVS_ASSIGN_OR_RETURN(PromptParts parts, ReadPrompt(prompt));
    request.prompt = std::move(parts.prompt);
    request.agent = std::move(parts.agent);
    request.session = std::move(parts.session);
  }
  KVS_ASSIGN_OR_RETURN(const Explanation explanation, client->client->Explain(request));
  return HandOut(Dump(ExplanationJson(explanation)), json);
}

Status StatsAsJson(kvs_client* client, char** json) {
  KVS_RETURN_IF_ERROR(CheckClient(client));
  if (json == nullptr) return InvalidArgument("json is NULL");
  KVS_ASSIGN_OR_RETURN(const Stats stats, client->client->GetStats());
  return HandOut(Dump(StatsJson(stats)), json);
}

}  // namespace
}  // namespace kvshare::capi

extern "C" {

kvs_status kvs_open(const kvs_options* options, kvs_client** client) {
  return kvshare::capi::Guarded([&] { return kvshare::capi::Open(options, client); });
}

void kvs_close(kvs_client* client) {
  kvshare::capi::Guarded([&] {
    delete client;
    return kvshare::OkStatus();
  });
}

kvs_status kvs_info(kvs_client* client, kvs_server_info* info) {
  return kvshare::capi::Guarded([&] { return kvshare::capi::Info(client, info); });
}

kvs_status kvs_tokenize(kvs_client* client, const char* text, size_t text_len, int32_t** ids, size_t* num_ids) {
  return kvshare::capi::Guarded([&] { return kvshare::capi::Tokenize(client, text, text_len, ids, num_ids); });
}

kvs_status kvs_render(kvs_client* client, const kvs_prompt* prompt, char** text, size_t* text_len, int32_t** ids,
                      size_t* num_ids) {
  return kvshare::capi::Guarded([&] { return kvshare::capi::Render(client, prompt, text, text_len, ids, num_ids); });
}

kvs_status kvs_explain_json(kvs_client* client, const kvs_prompt* prompt, uint64_t request_id, kvs_reuse reuse,
                            char** json) {
  return kvshare::capi::Guarded([&] { return kvshare::capi::ExplainJson(client, prompt, request_id, reuse, json); });
}

kvs_status kvs_stats_json(kvs_client* client, char** json) {
  return kvshare::capi::Guarded([&] { return kvshare::capi::StatsAsJson(client, json); });
}

}  // extern "C"

// kvctl ping, stat, explain: questions to a running daemon.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "libkvshare/core/status_macros.h"
#include "tools/kvctl/commands.h"
#include "tools/kvctl/files.h"
#include "tools/kvctl/target.h"

namespace kvshare::kvctl {
namespace {

using Json = nlohmann::ordered_json;

void Print(const Json& json) { std::puts(json.dump(-1, ' ', false, Json::error_handler_t::replace).c_str()); }

Json TotalsJson(const ReuseTotals& totals) {
  return {{"requests", totals.requests},
          {"prompt_tokens", totals.prompt_tokens},
          {"prefix_tokens", totals.prefix_tokens},
          {"moved_tokens", totals.moved_tokens},
          {"recomputed_tokens", totals.recomputed_tokens},
          {"fresh_tokens", totals.fresh_tokens},
          {"generated_tokens", totals.generated_tokens}};
}

Json StatJson(const Stats& stats) {
  Json json = TotalsJson(stats.totals);
  json["requests_running"] = stats.requests_running;
  json["requests_waiting"] = stats.requests_waiting;
  json["requests_failed"] = stats.requests_failed;
  json["pool"] = {{"capacity_bytes", stats.pool.capacity_bytes},
                  {"used_bytes", stats.pool.used_bytes},
                  {"pages", stats.pool.pages},
                  {"leases", stats.pool.leases},
                  {"evictions", stats.pool.evictions}};
  json["cold"] = {{"entries", stats.cold.entries},
                  {"bytes", stats.cold.bytes},
                  {"hits", stats.cold.hits},
                  {"misses", stats.cold.misses},
                  {"integrity_errors", stats.cold.integrity_errors}};
  json["miss_reasons"] = Json::object();
  for (const auto& [reason, tokens] : stats.miss_reasons) json["miss_reasons"][reason] = tokens;
  json["agents"] = Json::object();
  for (const auto& [agent, totals] : stats.agents) json["agents"][agent] = TotalsJson(totals);
  return json;
}

double Percent(std::int64_t part, std::int64_t whole) {
  return whole == 0 ? 0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
}

void PrintStatText(const Stats& stats) {
  const ReuseTotals& t = stats.totals;
  std::printf("requests   %lld done, %lld running, %lld waiting, %lld failed\n", static_cast<long long>(t.requests),
              static_cast<long long>(stats.requests_running), static_cast<long long>(stats.requests_waiting),
              static_cast<long long>(stats.requests_failed));
  std::printf("prompt     %lld tokens, %lld reused (%.1f %%)\n", static_cast<long long>(t.prompt_tokens),
              static_cast<long long>(t.prefix_tokens + t.moved_tokens),
              Percent(t.prefix_tokens + t.moved_tokens, t.prompt_tokens));
  std::printf("generated  %lld tokens\n", static_cast<long long>(t.generated_tokens));
  std::printf("pool       %.1f of %.1f MiB, %lld pages, %lld in use, %lld evicted\n",
              static_cast<double>(stats.pool.used_bytes) / (1 << 20),
              static_cast<double>(stats.pool.capacity_bytes) / (1 << 20), static_cast<long long>(stats.pool.pages),
              static_cast<long long>(stats.pool.leases), static_cast<long long>(stats.pool.evictions));
  for (const auto& [reason, tokens] : stats.miss_reasons) {
    std::printf("missed     %lld tokens: %s\n", static_cast<long long>(tokens), reason.c_str());
  }
  for (const auto& [agent, totals] : stats.agents) {
    std::printf("agent      %-24s %6lld requests, %8lld prompt tokens, %5.1f %% reused\n", agent.c_str(),
                static_cast<long long>(totals.requests), static_cast<long long>(totals.prompt_tokens),
                Percent(totals.prefix_tokens + totals.moved_tokens, totals.prompt_tokens));
  }
}

Result<Explanation> Explain(const DaemonOptions& options, Client& client) {
  ExplainRequest request{
      .request_id = options.request_id, .agent = options.agent, .session = options.session, .reuse = options.reuse};
  if (options.request_id == 0) {
    ChatPrompt chat;
    KVS_ASSIGN_OR_RETURN(chat.messages_json, ReadMessages(options.messages_file));
    request.prompt = std::move(chat);
  }
  return client.Explain(request);
}

}  // namespace

int RunPing(const DaemonOptions& options) {
  Failure failure;
  const auto target = Target::Open({.endpoint = options.source.endpoint, .timeout = options.source.timeout}, &failure);
  if (!target) return Fail(failure);
  const ServerInfo& info = target->info();
  if (options.format == OutputFormat::kJson) {
    Print({{"version", info.version},
           {"model", info.model},
           {"space", info.space},
           {"dtype", info.dtype},
           {"isa", info.isa},
           {"reuse", ReuseModeName(info.reuse)},
           {"max_context_tokens", info.max_context_tokens},
           {"vocab_size", info.vocab_size}});
  } else {
    std::printf("%s serves %s (%s, %s, window %lld tokens, reuse %s)\n", options.source.endpoint.c_str(),
                info.model.c_str(), info.dtype.c_str(), info.isa.c_str(),
                static_cast<long long>(info.max_context_tokens), std::string(ReuseModeName(info.reuse)).c_str());
  }
  return kOk;
}

int RunStat(const DaemonOptions& options) {
  Failure failure;
  const auto target = Target::Open({.endpoint = options.source.endpoint, .timeout = options.source.timeout}, &failure);
  if (!target) return Fail(failure);
  const auto stats = target->client().GetStats();
  if (!stats.ok()) return Fail(stats.status());
  if (options.format == OutputFormat::kJson) {
    Print(StatJson(*stats));
  } else {
    PrintStatText(*stats);
  }
  return kOk;
}

int RunExplain(const DaemonOptions& options) {
  Failure failure;
  const auto target = Target::Open({.model = options.source.model,
                                    .endpoint = options.source.endpoint,
                                    .timeout = options.source.timeout,
                                    .dtype = options.source.dtype,
                                    .threads = options.source.threads},
                                   &failure);
  if (!target) return Fail(failure);
  const auto explanation = Explain(options, target->client());
  if (!explanation.ok()) return Fail(explanation.status());
  Json spans = Json::array();
  for (const ExplainSpan& span : explanation->spans) {
    if (options.format == OutputFormat::kText) {
      const std::string why = span.kind == "fresh" ? span.miss_reason : "from " + span.source + " (" + span.tier + ")";
      std::printf("%8lld ..%8lld  %-6s %s\n", static_cast<long long>(span.start),
                  static_cast<long long>(span.start + span.length), span.kind.c_str(), why.c_str());
    }
    spans.push_back({{"kind", span.kind},
                     {"start", span.start},
                     {"length", span.length},
                     {"source", span.source},
                     {"tier", span.tier},
                     {"repair", span.repair},
                     {"miss_reason", span.miss_reason}});
  }
  if (options.format == OutputFormat::kJson) Print({{"spans", std::move(spans)}});
  return kOk;
}

}  // namespace kvshare::kvctl

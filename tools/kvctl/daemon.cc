// kvctl ping, explain, drain: is a daemon there, what would it reuse, and let it end.
#include <cstdio>

#include "libkvshare/core/status_macros.h"
#include "tools/kvctl/commands.h"
#include "tools/kvctl/files.h"
#include "tools/kvctl/stat_json.h"
#include "tools/kvctl/target.h"

namespace kvshare::kvctl {
namespace {

using Json = nlohmann::ordered_json;

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
  const auto target = Target::Open(TargetOf(options.source), &failure);
  if (!target) return Fail(failure);
  const ServerInfo& info = target->info();
  if (options.format == OutputFormat::kJson) {
    PrintJson(ServerJson(info));
  } else {
    std::printf("%s serves %s (%s on %s, %s, window %lld tokens, reuse %s)\n", options.source.endpoint.c_str(),
                info.model.c_str(), info.dtype.c_str(), info.device.empty() ? "cpu" : info.device.c_str(),
                info.isa.c_str(), static_cast<long long>(info.max_context_tokens),
                std::string(ReuseModeName(info.reuse)).c_str());
  }
  return kOk;
}

int RunExplain(const DaemonOptions& options) {
  Failure failure;
  const auto target = Target::Open(TargetOf(options.source), &failure);
  if (!target) return Fail(failure);
  const auto explanation = Explain(options, target->client());
  if (!explanation.ok()) return Fail(explanation.status());
  Json spans = Json::array();
  for (const ExplainSpan& span : explanation->spans) {
    if (options.format == OutputFormat::kText) {
      const std::string why = span.kind == "fresh"
                                  ? span.miss_reason
                                  : "from " + span.source + " (" + span.tier + ")" +
                                        (span.repair.empty() || span.repair == "none" ? "" : ", " + span.repair);
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
  if (options.format == OutputFormat::kJson) PrintJson({{"spans", std::move(spans)}});
  return kOk;
}

int RunDrain(const DaemonOptions& options) {
  Failure failure;
  const auto target = Target::Open(TargetOf(options.source), &failure);
  if (!target) return Fail(failure);
  const Status drained = target->client().Drain();
  // Over tcp it is refused, which is no matter of versions.
  if (drained.code() == StatusCode::kFailedPrecondition) return Fail(kFailed, drained.message());
  if (!drained.ok()) return Fail(drained);
  if (options.format == OutputFormat::kJson) {
    PrintJson({{"draining", true}});
  } else {
    std::printf("%s is draining; it ends when the requests under way have\n", options.source.endpoint.c_str());
  }
  return kOk;
}

}  // namespace kvshare::kvctl

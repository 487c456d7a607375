// kvctl generate: one reply, streamed as text or as one JSON value.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "libkvshare/core/json_text.h"
#include "libkvshare/core/status_macros.h"
#include "tools/kvctl/commands.h"
#include "tools/kvctl/files.h"
#include "tools/kvctl/target.h"

namespace kvshare::kvctl {
namespace {

using Json = nlohmann::ordered_json;

Result<Prompt> MakePrompt(const GenerateOptions& options) {
  if (options.prompt) return Prompt(TextPrompt{*options.prompt});
  if (!options.ids_file.empty()) {
    KVS_ASSIGN_OR_RETURN(auto ids, ReadIds(options.ids_file));
    return Prompt(TokenPrompt{std::move(ids)});
  }
  ChatPrompt chat;
  KVS_ASSIGN_OR_RETURN(chat.messages_json, ReadMessages(options.messages_file));
  KVS_ASSIGN_OR_RETURN(chat.tools_json, ReadTools(options.tools_file));
  return Prompt(std::move(chat));
}

void PrintJson(const GenerateReply& reply) {
  Json misses = Json::array();
  for (const MissReason& miss : reply.reuse.miss_reasons)
    misses.push_back({{"reason", miss.reason}, {"tokens", miss.tokens}});
  const Json json = {
      {"text", reply.text},
      {"ids", reply.ids},
      {"finish_reason", FinishReasonName(reply.finish_reason)},
      {"usage",
       {{"prompt_tokens", reply.prompt_tokens},
        {"completion_tokens", reply.ids.size()},
        {"prompt_tokens_details", {{"cached_tokens", reply.reuse.prefix_tokens + reply.reuse.moved_tokens}}}}},
      {"kvshare",
       {{"request_id", reply.request_id},
        {"prefix_tokens", reply.reuse.prefix_tokens},
        {"moved_tokens", reply.reuse.moved_tokens},
        {"recomputed_tokens", reply.reuse.recomputed_tokens},
        {"fresh_tokens", reply.reuse.fresh_tokens},
        {"approximate", reply.reuse.approximate},
        {"miss_reasons", std::move(misses)}}},
      {"timings",
       {{"queue_ms", reply.timings.queue_ms},
        {"ttft_ms", reply.timings.ttft_ms},
        {"prompt_ms", reply.timings.prompt_ms},
        {"predicted_ms", reply.timings.predicted_ms}}}};
  std::puts(JsonText(json).c_str());
}

void PrintSummary(const GenerateReply& reply) {
  const double decode_s = reply.timings.predicted_ms / 1000;
  std::fprintf(stderr, "\n%lld prompt tokens, %lld reused; first token after %.0f ms; %zu tokens",
               static_cast<long long>(reply.prompt_tokens),
               static_cast<long long>(reply.reuse.prefix_tokens + reply.reuse.moved_tokens), reply.timings.ttft_ms,
               reply.ids.size());
  if (reply.ids.size() > 1 && decode_s > 0) {
    std::fprintf(stderr, " at %.1f tok/s", static_cast<double>(reply.ids.size() - 1) / decode_s);
  }
  std::fputs("\n", stderr);
}

}  // namespace

int RunGenerate(const GenerateOptions& options) {
  if (options.blend_recompute && options.source.model.empty()) {
    return Fail(kUsage, "--blend-recompute goes with --model; a daemon has its own (agentd --blend-recompute)");
  }
  if (!options.blend_filter.empty() && options.source.model.empty()) {
    return Fail(kUsage, "--blend-filter goes with --model; a daemon has its own (agentd --blend-filter)");
  }
  auto prompt = MakePrompt(options);
  if (!prompt.ok()) return Fail(prompt.status());
  Failure failure;
  TargetOptions where = TargetOf(options.source);
  where.reuse = options.reuse.value_or(ReuseMode::kExact);
  where.blend_recompute = options.blend_recompute;
  where.blend_gradual = options.blend_filter == "gradual";
  const auto target = Target::Open(where, &failure);
  if (!target) return Fail(failure);
  GenerateRequest request{.prompt = std::move(*prompt)};
  request.sampling = options.sampling;
  request.max_tokens = options.max_tokens;
  request.stop = options.stop;
  request.ignore_eos = options.ignore_eos;
  request.agent = options.agent;
  request.session = options.session;
  request.reuse = options.reuse;
  request.timeout = options.source.timeout;
  const auto stream = target->client().Generate(request);
  if (!stream.ok()) return Fail(stream.status());
  while (true) {
    if (Interrupted()) {
      (*stream)->Cancel();
      return Fail(kInterrupted, "interrupted");
    }
    const auto chunk = (*stream)->Next();
    if (!chunk.ok()) return Fail(chunk.status());
    if (!chunk->has_value()) break;
    if (options.format == OutputFormat::kText) {
      std::fwrite((*chunk)->text.data(), 1, (*chunk)->text.size(), stdout);
      std::fflush(stdout);
    }
  }
  if (options.format == OutputFormat::kJson) {
    PrintJson((*stream)->reply());
  } else {
    std::puts("");
    PrintSummary((*stream)->reply());
  }
  return kOk;
}

}  // namespace kvshare::kvctl

// kvctl trace info: what a trace holds.
#include <algorithm>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <unordered_set>

#include "libkvshare/core/json_text.h"
#include "tools/kvctl/commands.h"
#include "tools/kvctl/exit_code.h"
#include "tools/trace/mix.h"
#include "tools/trace/trace_reader.h"

namespace kvshare::kvctl {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::size_t kAgentsShown = 20;  // in text; JSON has all

struct Contents {
  std::set<std::string> sessions;
  std::set<std::string> models;
  std::map<std::string, std::int64_t> agents;
  std::int64_t messages = 0;
  std::int64_t handoffs = 0;
  std::int64_t prompt_bytes = 0;
  std::int64_t prompt_tokens = 0;  // as recorded, or as the blocks say; 0 for requests that record none
  std::int64_t output_tokens = 0;
  std::int64_t longest_prompt = 0;
  std::int64_t hash_requests = 0;
  std::int64_t block_refs = 0;
  std::int64_t unique_blocks = 0;
  double known_prefix_tokens = 0;  // of hash traces: blocks that stood at the same place before, from the front
  double span_ms = 0;              // of the longest clock
};

void CountBlocks(const trace::Trace& trace, std::size_t index, std::unordered_set<std::uint64_t>* seen,
                 Contents* contents) {
  const trace::TraceRequest& request = trace.requests[index];
  const std::uint64_t space = trace.BlockSpace(request);
  const std::vector<std::uint64_t> blocks = trace.Blocks(index);
  const double tokens = static_cast<double>(trace::PromptTokens(trace, request));
  std::size_t known = 0;
  bool prefix = true;
  for (const std::uint64_t block : blocks) {
    prefix = !seen->insert(trace::Mix(space, block)).second && prefix;
    known += prefix ? 1 : 0;
  }
  const double covered = std::min(tokens, static_cast<double>(request.blocks * trace.header.block_tokens));
  if (!blocks.empty())
    contents->known_prefix_tokens += covered * static_cast<double>(known) / static_cast<double>(blocks.size());
}

Contents Count(const trace::Trace& trace) {
  Contents contents;
  std::unordered_set<std::uint64_t> seen;
  std::map<std::string, std::pair<double, double>> clocks;
  for (std::size_t r = 0; r < trace.requests.size(); ++r) {
    const trace::TraceRequest& request = trace.requests[r];
    contents.sessions.insert(request.session);
    if (!request.model.empty()) contents.models.insert(request.model);
    ++contents.agents[request.agent];
    contents.messages += static_cast<std::int64_t>(request.messages.size());
    contents.handoffs += trace.Handoffs(request);
    for (const trace::TraceMessage& message : request.messages) {
      for (const trace::SegmentRef& ref : message.segments) {
        contents.prompt_bytes += static_cast<std::int64_t>(trace.segments[ref.segment].text.size());
      }
    }
    const std::int64_t tokens = trace::PromptTokens(trace, request);
    contents.prompt_tokens += tokens;
    contents.output_tokens += request.output_length;
    contents.longest_prompt = std::max(contents.longest_prompt, tokens);
    if (!trace.HasText(r)) {
      ++contents.hash_requests;
      contents.block_refs += request.blocks;
      CountBlocks(trace, r, &seen, &contents);
    }
    if (request.timestamp_ms) {
      const bool shared = trace.header.time_base == trace::TimeBase::kArrival;
      auto [it, added] =
          clocks.try_emplace(shared ? "" : request.session, *request.timestamp_ms, *request.timestamp_ms);
      it->second.first = std::min(it->second.first, *request.timestamp_ms);
      it->second.second = std::max(it->second.second, *request.timestamp_ms);
      contents.span_ms = std::max(contents.span_ms, it->second.second - it->second.first);
    }
  }
  contents.unique_blocks = static_cast<std::int64_t>(seen.size());
  return contents;
}

const char* Name(trace::TraceFormat format) {
  switch (format) {
    case trace::TraceFormat::kKtr: break;
    case trace::TraceFormat::kMooncake: return "mooncake";
    case trace::TraceFormat::kOpenAi: return "openai-chat";
  }
  return "ktr";
}

const char* Name(trace::TimeBase base) {
  switch (base) {
    case trace::TimeBase::kArrival: return "arrival";
    case trace::TimeBase::kSession: return "session";
    case trace::TimeBase::kNone: break;
  }
  return "none";
}

void PrintText(const trace::Trace& trace, const Contents& c) {
  const auto ll = [](auto value) { return static_cast<long long>(value); };
  std::printf("%s (%s): %zu requests in %zu sessions, %zu agents, clock: %s", trace.header.name.c_str(),
              Name(trace.header.format), trace.requests.size(), c.sessions.size(), c.agents.size(),
              Name(trace.header.time_base));
  if (c.span_ms > 0) std::printf(", %.0f s", c.span_ms / 1000);
  std::puts("");
  if (c.messages > 0) {
    std::printf("%lld messages of %zu different texts, %.1f MB of prompts, %lld hand-offs\n", ll(c.messages),
                trace.segments.size(), static_cast<double>(c.prompt_bytes) / 1e6, ll(c.handoffs));
  }
  if (c.prompt_tokens > 0) {
    std::printf("%lld prompt tokens recorded (longest prompt %lld), %lld output tokens\n", ll(c.prompt_tokens),
                ll(c.longest_prompt), ll(c.output_tokens));
  }
  if (c.hash_requests > 0) {
    std::printf(
        "%lld requests known by block ids: %lld blocks of %lld tokens, %lld different ones; %.1f %% of prompt tokens\n"
        "begin like an earlier prompt\n",
        ll(c.hash_requests), ll(c.block_refs), ll(trace.header.block_tokens), ll(c.unique_blocks),
        c.prompt_tokens == 0 ? 0.0 : 100 * c.known_prefix_tokens / static_cast<double>(c.prompt_tokens));
  }
  if (c.models.size() > 1) std::printf("%zu models\n", c.models.size());
  if (!trace.header.license.empty()) std::printf("license: %s\n", trace.header.license.c_str());
  std::vector<std::pair<std::int64_t, std::string>> agents;
  for (const auto& [agent, count] : c.agents) agents.emplace_back(-count, agent.empty() ? "default" : agent);
  std::sort(agents.begin(), agents.end());
  for (std::size_t a = 0; a < std::min(agents.size(), kAgentsShown); ++a) {
    std::printf("  %6lld  %s\n", ll(-agents[a].first), agents[a].second.c_str());
  }
  if (agents.size() > kAgentsShown) std::printf("  ... and %zu more agents\n", agents.size() - kAgentsShown);
}

}  // namespace

int RunTraceInfo(const TraceOptions& options) {
  const auto trace = trace::ReadTrace(options.file);
  if (!trace.ok()) return Fail(trace.status());
  const Contents c = Count(*trace);
  if (options.format != OutputFormat::kJson) {
    PrintText(*trace, c);
    return kOk;
  }
  const Json json = {{"trace", trace->header.name},
                     {"format", Name(trace->header.format)},
                     {"license", trace->header.license},
                     {"origin", trace->header.origin},
                     {"time_base", Name(trace->header.time_base)},
                     {"span_ms", c.span_ms},
                     {"requests", trace->requests.size()},
                     {"sessions", c.sessions.size()},
                     {"agents", c.agents},
                     {"models", c.models},
                     {"messages", c.messages},
                     {"segments", trace->segments.size()},
                     {"handoffs", c.handoffs},
                     {"prompt_bytes", c.prompt_bytes},
                     {"prompt_tokens", c.prompt_tokens},
                     {"output_tokens", c.output_tokens},
                     {"longest_prompt", c.longest_prompt},
                     {"hash_requests", c.hash_requests},
                     {"block_tokens", trace->header.block_tokens},
                     {"block_refs", c.block_refs},
                     {"unique_blocks", c.unique_blocks},
                     {"known_prefix_tokens", static_cast<std::int64_t>(c.known_prefix_tokens)}};
  std::puts(JsonText(json).c_str());
  return kOk;
}

}  // namespace kvshare::kvctl

// kvctl trace info: what a trace holds.
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "tools/kvctl/commands.h"
#include "tools/kvctl/exit_code.h"
#include "tools/trace/trace_reader.h"

namespace kvshare::kvctl {

int RunTraceInfo(const TraceOptions& options) {
  using Json = nlohmann::ordered_json;
  const auto trace = trace::ReadTrace(options.file);
  if (!trace.ok()) return Fail(trace.status());
  std::set<std::string> sessions;
  std::map<std::string, std::int64_t> agents;
  std::int64_t messages = 0, handoffs = 0, characters = 0, hash_requests = 0;
  for (const trace::TraceRequest& request : trace->requests) {
    sessions.insert(request.session);
    ++agents[request.agent];
    messages += static_cast<std::int64_t>(request.messages.size());
    handoffs += request.handoffs;
    hash_requests += request.messages.empty() ? 1 : 0;
    for (const trace::TraceMessage& message : request.messages) {
      for (std::uint32_t s : message.segments) characters += static_cast<std::int64_t>(trace->segments[s].size());
    }
  }
  const char* clock = trace->header.time_base == trace::TimeBase::kArrival   ? "arrival"
                      : trace->header.time_base == trace::TimeBase::kSession ? "session"
                                                                             : "none";
  if (options.format == OutputFormat::kJson) {
    const Json json = {{"trace", trace->header.name},
                       {"license", trace->header.license},
                       {"origin", trace->header.origin},
                       {"time_base", clock},
                       {"requests", trace->requests.size()},
                       {"sessions", sessions.size()},
                       {"agents", agents},
                       {"messages", messages},
                       {"segments", trace->segments.size()},
                       {"handoffs", handoffs},
                       {"prompt_bytes", characters},
                       {"hash_requests", hash_requests}};
    std::puts(json.dump(-1, ' ', false, Json::error_handler_t::replace).c_str());
    return kOk;
  }
  std::printf("%s: %zu requests in %zu sessions, %zu agents, clock: %s\n", trace->header.name.c_str(),
              trace->requests.size(), sessions.size(), agents.size(), clock);
  std::printf("%lld messages of %zu different texts, %.1f MB of prompts, %lld hand-offs\n",
              static_cast<long long>(messages), trace->segments.size(), static_cast<double>(characters) / 1e6,
              static_cast<long long>(handoffs));
  if (hash_requests > 0)
    std::printf("%lld requests carry block hashes and no text\n", static_cast<long long>(hash_requests));
  for (const auto& [agent, count] : agents) {
    std::printf("  %6lld  %s\n", static_cast<long long>(count), agent.empty() ? "default" : agent.c_str());
  }
  return kOk;
}

}  // namespace kvshare::kvctl

// kvctl trace simulate: what pools of several sizes and policies would have hit on a trace; no model.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "libkvshare/core/json_text.h"
#include "tools/kvctl/commands.h"
#include "tools/kvctl/exit_code.h"
#include "tools/trace/simulate.h"

namespace kvshare::kvctl {

int RunTraceSimulate(const SimulateOptions& options) {
  using Json = nlohmann::ordered_json;
  for (const std::string& policy : options.policies) {
    if (policy == "belady") continue;
    const auto known = agentd::NewEvictionPolicy(policy, 1);
    if (!known.ok()) return Fail(kUsage, "--policy: " + known.status().message() + ", belady");
  }
  const auto trace = trace::ReadBlockTrace(options.file);
  if (!trace.ok()) return Fail(trace.status());
  Json results = Json::array();
  if (options.format == OutputFormat::kText) {
    std::printf("%s: %zu requests, %lld tokens, %u unique blocks\n", trace->name.c_str(), trace->requests.size(),
                static_cast<long long>(trace->tokens), trace->unique_blocks);
    std::printf("%-10s %10s %12s %16s %10s\n", "policy", "pool", "blocks", "hit tokens", "hit ratio");
  }
  for (const std::string& policy : options.policies) {
    for (const double fraction : options.pool_fractions) {
      const auto result = trace::Simulate(*trace, policy, fraction);
      if (!result.ok()) return Fail(kUsage, result.status().message());
      if (options.format == OutputFormat::kJson) {
        results.push_back({{"policy", policy},
                           {"pool_fraction", fraction},
                           {"pool_blocks", result->capacity_blocks},
                           {"hit_tokens", result->hit_tokens},
                           {"hit_ratio", result->hit_ratio}});
      } else {
        std::printf("%-10s %9.4g%% %12lld %16lld %9.2f%%\n", policy.c_str(), 100 * fraction,
                    static_cast<long long>(result->capacity_blocks), static_cast<long long>(result->hit_tokens),
                    100 * result->hit_ratio);
        std::fflush(stdout);
      }
      if (Interrupted()) return kInterrupted;
    }
  }
  if (options.format == OutputFormat::kJson) {
    const Json json = {{"trace", trace->name},
                       {"requests", trace->requests.size()},
                       {"tokens", trace->tokens},
                       {"unique_blocks", trace->unique_blocks},
                       {"results", results}};
    std::puts(JsonText(json).c_str());
  }
  return kOk;
}

}  // namespace kvshare::kvctl

#include "tools/trace/report.h"

#include <algorithm>
#include <numeric>
#include <span>
#include <unordered_map>
#include <utility>

#include "libkvshare/core/hash.h"
#include "tools/trace/ceilings.h"
#include "tools/trace/prefix_tree.h"

namespace kvshare::trace {
namespace {

constexpr int kQuantiles = 100;

void Add(const RequestResult& result, std::size_t prompt_tokens, TokenCounts* counts) {
  counts->prompt += static_cast<std::int64_t>(prompt_tokens);
  counts->prefix += result.reuse.prefix_tokens;
  counts->moved += result.reuse.moved_tokens;
  counts->recomputed += result.reuse.recomputed_tokens;
  counts->fresh += result.reuse.fresh_tokens;
}

// Requests by a time of theirs; those of the same moment in the file's order.
std::vector<std::size_t> OrderBy(const ModeResult& mode, double RequestResult::*when) {
  std::vector<std::size_t> order(mode.requests.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return mode.requests[a].*when < mode.requests[b].*when; });
  return order;
}

const TraceRequest& Recorded(const Replay& replay, std::size_t r) {
  return replay.trace.requests[replay.prompts[r].request];
}

std::int64_t CrossAgentTokens(const Replay& replay, const ModeResult& mode) {
  const bool any = std::any_of(mode.requests.begin(), mode.requests.end(),
                               [](const RequestResult& result) { return result.reuse.prefix_tokens > 0; });
  if (!any) return 0;
  PrefixTree tree;
  std::unordered_map<std::string, int> agents;
  std::int64_t cross = 0;
  for (const std::size_t r : OrderBy(mode, &RequestResult::start_ms)) {
    const int own = agents.try_emplace(Recorded(replay, r).agent, static_cast<int>(agents.size())).first->second;
    const std::vector<TokenId>& ids = replay.prompts[r].ids;
    std::int64_t left = mode.requests[r].reuse.prefix_tokens;
    for (const PrefixTree::Run& run : tree.Match(ids)) {
      const std::int64_t used = std::min(run.tokens, left);
      if (run.owner != own) cross += used;
      left -= used;
    }
    std::vector<TokenId> kept = ids;
    const std::vector<TokenId>& output = mode.requests[r].output_ids;
    if (!output.empty()) kept.insert(kept.end(), output.begin(), output.end() - 1);
    tree.Insert(std::move(kept), own);
  }
  return cross;
}

std::vector<Window> Windows(const Replay& replay, const ModeResult& mode) {
  const std::vector<std::size_t> order = OrderBy(mode, &RequestResult::end_ms);
  const std::size_t count = std::min(kWindows, order.size());
  std::vector<Window> windows(count);
  for (std::size_t i = 0; i < order.size(); ++i) {
    Window& window = windows[i * count / order.size()];
    const RequestResult& result = mode.requests[order[i]];
    window.end_s = result.end_ms / 1000;
    ++window.requests;
    window.prompt_tokens += static_cast<std::int64_t>(replay.prompts[order[i]].ids.size());
    window.reused_tokens += result.reuse.prefix_tokens + result.reuse.moved_tokens;
  }
  return windows;
}

std::vector<AgentReport> Agents(const Replay& replay, const ModeResult& mode) {
  std::vector<AgentReport> agents;
  std::unordered_map<std::string, std::size_t> index;
  for (std::size_t r = 0; r < mode.requests.size(); ++r) {
    const std::string& name = Recorded(replay, r).agent;
    const auto [it, added] = index.try_emplace(name, agents.size());
    if (added) agents.push_back({.agent = name.empty() ? "default" : name});
    AgentReport& agent = agents[it->second];
    ++agent.requests;
    Add(mode.requests[r], replay.prompts[r].ids.size(), &agent.tokens);
    agent.ttft_ms_mean += mode.requests[r].ttft_ms;
  }
  for (AgentReport& agent : agents) agent.ttft_ms_mean /= static_cast<double>(agent.requests);
  return agents;
}

ModeReport MakeMode(const Replay& replay, const ModeResult& mode) {
  ModeReport report{.mode = std::string(ReuseModeName(mode.mode))};
  std::vector<double> ttft;
  std::vector<TokenId> outputs;
  for (std::size_t r = 0; r < mode.requests.size(); ++r) {
    const RequestResult& result = mode.requests[r];
    Add(result, replay.prompts[r].ids.size(), &report.tokens);
    report.truncated_requests += replay.prompts[r].truncated ? 1 : 0;
    for (const MissReason& miss : result.reuse.miss_reasons) report.miss_reasons[miss.reason] += miss.tokens;
    ttft.push_back(result.ttft_ms);
    outputs.insert(outputs.end(), result.output_ids.begin(), result.output_ids.end());
  }
  report.generated_tokens = static_cast<std::int64_t>(outputs.size());
  report.outputs_sha256 = PlainSha256(std::as_bytes(std::span(outputs))).Hex();
  report.ttft_ms = Summarise(ttft);
  std::sort(ttft.begin(), ttft.end());
  for (int q = 0; q <= kQuantiles; ++q) {
    report.ttft_ms_quantiles.push_back(Percentile(ttft, static_cast<double>(q) / kQuantiles));
  }
  report.cross_agent_tokens = CrossAgentTokens(replay, mode);
  report.wall_s = mode.wall_s;
  report.peak_rss_bytes = mode.peak_rss_bytes;
  report.windows = Windows(replay, mode);
  report.agents = Agents(replay, mode);
  return report;
}

// Of the first mode that reuses anything, in the order in which its requests were sent.
std::optional<CeilingReport> MakeCeilings(const Replay& replay) {
  const auto mode = std::find_if(replay.modes.begin(), replay.modes.end(),
                                 [](const ModeResult& m) { return m.mode != ReuseMode::kOff && m.pool_pages > 0; });
  if (mode == replay.modes.end()) return std::nullopt;
  std::vector<CeilingRequest> requests;
  for (const std::size_t r : OrderBy(*mode, &RequestResult::start_ms)) {
    requests.push_back({replay.prompts[r].ids, mode->requests[r].output_ids});
  }
  const Ceilings ceilings = ComputeCeilings(requests, mode->pool_pages);
  return CeilingReport{.pool_pages = mode->pool_pages,
                       .pool_bytes = mode->pool_bytes,
                       .unique_pages = ceilings.unique_pages,
                       .prompt_tokens = ceilings.prompt_tokens,
                       .unlimited_tokens = ceilings.unlimited_tokens,
                       .lru_tokens = ceilings.lru_tokens,
                       .belady_tokens = ceilings.belady_tokens};
}

}  // namespace

const ModeReport* Report::Find(std::string_view mode) const {
  const auto found = std::find_if(modes.begin(), modes.end(), [&](const ModeReport& m) { return m.mode == mode; });
  return found == modes.end() ? nullptr : &*found;
}

Report MakeReport(const Replay& replay) {
  Report report{.trace = replay.trace_name,
                .model = replay.model,
                .dtype = replay.dtype,
                .isa = replay.isa,
                .requests = static_cast<std::int64_t>(replay.prompts.size())};
  for (const ModeResult& mode : replay.modes) report.modes.push_back(MakeMode(replay, mode));
  report.ceilings = MakeCeilings(replay);
  return report;
}

}  // namespace kvshare::trace

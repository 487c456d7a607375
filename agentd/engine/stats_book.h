// StatsBook: what the daemon has done since it started, in total, per agent and per miss reason.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kvshare/types.h"

namespace kvshare::agentd {

// An agent's number: small, so that every stored page can say who stored it.
using AgentId = std::uint32_t;

// Names come from outside, so their number is bounded: agents beyond it are counted together.
inline constexpr std::size_t kMaxAgents = 1024;
inline constexpr std::string_view kOtherAgents = "(other)";

// What is going on at this moment.
struct Load {
  std::int64_t running = 0;
  std::int64_t waiting = 0;
  PoolStats pool;
  std::int64_t pinned_bytes = 0;
  std::int64_t client_leases = 0;
  std::int64_t kept_bytes = 0;
  double guard_margin = 0;
  double guard_margin_elsewhere = 0;
  double moved_row = 0;
};

// Thread-safe. The lock is held for the time of a few additions, never during a forward step, so readers do not wait
// for the engine.
class StatsBook {
 public:
  StatsBook();

  // "" is "default".
  AgentId Intern(std::string_view agent);
  std::string AgentName(AgentId agent) const;

  // A request that ended well.
  void Completed(AgentId agent, const GenerateReply& reply);
  void Failed();
  // The guard had a prompt computed after all.
  void SentBack();
  // An approximate answer was computed exactly afterwards.
  void Healed();
  // And its first token, or one of the later ones, was `kl` nats from it; it stood on `depth` >= 1 approximate
  // requests, itself included.
  void Audited(int depth, bool later, double kl);
  // An exact answer's first token would have been `kl` nats away over chunks that are not trusted.
  void ShadowAudited(double kl);
  void SetLoad(const Load& load);

  // All but the cold tier's counts.
  Stats Snapshot() const;

 private:
  static void Add(ReuseTotals& totals, const GenerateReply& reply);

  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  mutable std::mutex mutex_;
  std::vector<std::string> names_;         // guarded by mutex_, as all below
  std::vector<ReuseTotals> agent_totals_;  // by AgentId
  std::unordered_map<std::string, AgentId> ids_;
  Stats stats_;  // all but `agents`
};

}  // namespace kvshare::agentd

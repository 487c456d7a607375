// SessionRecall: after a restart the cold tier still has what sessions computed. It tells what that was, session by
// session.
#pragma once

#include <cstddef>
#include <string>
#include <unordered_map>
#include <vector>

#include "agentd/engine/stats_book.h"
#include "agentd/tiers/cold_tier.h"
#include "kvshare/types.h"
#include "libkvshare/core/hash.h"

namespace kvshare::agentd {

// One thread; tier and names must outlive it.
class SessionRecall {
 public:
  // Looks through all that the tier knows, without I/O. `cold` may be null.
  SessionRecall(const ColdTier* cold, StatsBook* names);

  // A prompt and answer, from position 0.
  struct Run {
    std::vector<TokenId> tokens;
    AgentId source = 0;
  };
  // The session's last runs, at most `most`, oldest first, as far as the tier still has them. Once: then there is
  // nothing.
  std::vector<Run> Take(const std::string& session, std::size_t most);

  void Clear() { ends_.clear(); }

 private:
  const ColdTier* const cold_;
  StatsBook* const names_;
  std::unordered_map<std::string, std::vector<Digest>> ends_;  // last pages of runs, most recently used first
};

}  // namespace kvshare::agentd

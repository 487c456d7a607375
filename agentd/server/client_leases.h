// ClientLeases: which client holds which leases, so that they end with it, and nobody ends another's.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "agentd/server/mailbox.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

// Thread-safe. Clients go by the name that ZeroMQ gave their connection. A lease whose time is up has been ended by the
// service itself: it is forgotten when its client is next looked at.
class ClientLeases {
 public:
  using Clock = std::chrono::steady_clock;

  Status MayLease(const std::string& peer);  // ResourceExhausted: it holds as many as it may
  void Add(const std::string& peer, const GivenLease& lease);
  bool Remove(const std::string& peer, std::uint64_t lease);  // false: not this client's
  bool HoldsAny(const std::string& peer);
  // All that it holds, to be released by the caller; counted as dropped.
  std::vector<std::uint64_t> TakeAll(const std::string& peer);
  std::vector<std::string> Peers() const;
  std::int64_t held() const;  // by all clients
  std::int64_t dropped() const;

 private:
  using Leases = std::map<std::uint64_t, Clock::time_point>;  // by id, until when

  // Requires: mu_ held. Null: it holds none.
  Leases* Find(const std::string& peer);

  mutable std::mutex mu_;
  std::map<std::string, Leases> peers_;  // none empty, except for those whose time is up
  std::int64_t dropped_ = 0;
};

}  // namespace kvshare::agentd

// LinkRequests: Lookup, Acquire and Release of clients that have mapped the pool, answered on the memory link's own
// socket. One thread is woken for each, not four as by way of ZeroMQ.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "agentd/server/client_leases.h"
#include "agentd/server/client_workers.h"
#include "agentd/server/memory_link.h"
#include "agentd/service.h"

namespace kvshare::agentd {

// Thread-safe. Outlives the peers it makes, and what it is given outlives both.
class LinkRequests {
 public:
  LinkRequests(Service* service, ClientLeases* leases, ClientWorkers* workers, const std::atomic<bool>* draining)
      : service_(service), leases_(leases), workers_(workers), draining_(draining) {}

  // Answers in the name of the client that ZeroMQ calls `peer`; its destruction gives all of its leases back.
  std::unique_ptr<LinkPeer> NewPeer(std::string peer);

  std::int64_t frames() const { return frames_; }
  std::int64_t malformed() const { return malformed_; }

 private:
  class ClientPeer;

  Service* const service_;
  ClientLeases* const leases_;
  ClientWorkers* const workers_;
  const std::atomic<bool>* const draining_;
  std::atomic<std::int64_t> frames_ = 0;
  std::atomic<std::int64_t> malformed_ = 0;
};

}  // namespace kvshare::agentd

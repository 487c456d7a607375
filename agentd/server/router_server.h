// RouterServer: the daemon's ZeroMQ socket. One io thread owns it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "agentd/service.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

struct RouterServerOptions {
  std::string endpoint;  // ipc://PATH or tcp://HOST:PORT
  // Called once a client of this machine has asked the daemon to drain, on the io thread: must not block, and must not
  // call the server. It leads to DrainAndStop from elsewhere. Unset: such requests are refused.
  std::function<void()> on_drain;
};

// Totals since the start.
struct RouterServerCounters {
  std::int64_t frames = 0;            // received, of any kind
  std::int64_t malformed_frames = 0;  // refused before anything was asked of the service
  std::int64_t replies_dropped = 0;   // their client was gone, or did not read
  std::int64_t clients_lost = 0;      // clients that went, or stopped reading, while requests of theirs ran
  std::int64_t client_leases = 0;     // held by clients now
  std::int64_t leases_dropped = 0;    // given back for clients that had gone
  std::int64_t memory_granted = 0;    // clients that mapped the pool
  std::int64_t memory_refused = 0;    // claims of its memory that were refused
};

class RouterServer {
 public:
  virtual ~RouterServer() = default;  // stops
  // No new requests; ends when the replies in flight are sent, then stops.
  virtual void DrainAndStop() = 0;
  // Where it listens (a tcp port of 0 or * is resolved).
  virtual std::string endpoint() const = 0;
  // Where clients get the pool's memory; empty where they cannot, and memory_error() says why.
  virtual std::string memory_socket() const = 0;
  virtual Status memory_error() const = 0;
  // Thread-safe.
  virtual RouterServerCounters counters() const = 0;
};

// Binds and starts serving. `service` must outlive the server. InvalidArgument for an endpoint that cannot be one,
// Unavailable when it is taken (naming what to do).
Result<std::unique_ptr<RouterServer>> StartRouterServer(Service* service, const RouterServerOptions& options);

}  // namespace kvshare::agentd

// RouterServer: the daemon's ZeroMQ socket. One io thread owns it.
#pragma once

#include <memory>
#include <string>

#include "agentd/service.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

struct RouterServerOptions {
  std::string endpoint;  // ipc://PATH or tcp://HOST:PORT
};

class RouterServer {
 public:
  virtual ~RouterServer() = default;  // stops
  // No new requests; ends when the replies in flight are sent, then stops.
  virtual void DrainAndStop() = 0;
  // Where it listens (a tcp port of 0 or * is resolved).
  virtual std::string endpoint() const = 0;
};

// Binds and starts serving. `service` must outlive the server. InvalidArgument for an endpoint that cannot be one,
// Unavailable when it is taken (naming what to do).
Result<std::unique_ptr<RouterServer>> StartRouterServer(Service* service, const RouterServerOptions& options);

}  // namespace kvshare::agentd

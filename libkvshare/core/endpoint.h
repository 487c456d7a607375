// Endpoints: where a daemon listens, as users write it. ipc://PATH or tcp://HOST:PORT.
#pragma once

#include <string>
#include <string_view>

#include "kvshare/status.h"

namespace kvshare {

enum class Transport { kIpc, kTcp };

struct Endpoint {
  Transport transport = Transport::kIpc;
  std::string path;  // ipc
  std::string host;  // tcp; an IPv6 address stands in brackets
  int port = 0;      // tcp; 0: any free port (only where kListen allows it)
};

enum class EndpointUse {
  kConnect,
  kListen,  // also tcp://*:PORT (all interfaces), and port 0 or * (any free one)
};

// Returns: InvalidArgument naming what is wrong and the forms that are right.
Result<Endpoint> ParseEndpoint(std::string_view text, EndpointUse use);

}  // namespace kvshare

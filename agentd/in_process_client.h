// The Client interface without a daemon: calls go straight to a Service of this process.
#pragma once

#include <memory>

#include "agentd/service.h"
#include "kvshare/client.h"

namespace kvshare::agentd {

// `service` must outlive the client, and the leases it gave.
std::unique_ptr<Client> NewInProcessClient(Service* service);

}  // namespace kvshare::agentd

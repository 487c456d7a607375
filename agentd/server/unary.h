// What the service answers to requests with one reply, and what all who answer them say.
#pragma once

#include <cstdint>
#include <optional>

#include "agentd/server/mailbox.h"
#include "agentd/service.h"
#include "libkvshare/codec/codec.h"

namespace kvshare::agentd {

struct UnaryAnswer {
  codec::Frame frame;
  std::optional<GivenLease> lease;
};

// Asks the service and encodes its answer, or its error. Requires: a request with one reply that is not the server's
// own to answer (Hello, Drain). Catches everything.
UnaryAnswer AnswerUnary(Service& service, std::uint64_t correlation, const codec::Request& request);

// In whichever way a client asks.
Status DrainingStatus();
Status NotHeldStatus(std::uint64_t lease);

}  // namespace kvshare::agentd

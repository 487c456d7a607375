// MemoryLink: the unix socket beside an ipc endpoint where clients get the daemon's KV memory, and whose connections
// own their leases: the kernel closes them with their process, so a killed client holds nothing for long.
//
// ZeroMQ carries no descriptors and tells of no disconnect; this socket does both, and nothing else. A client is told
// in HelloAck where it is, with a ticket that ties it to the ZeroMQ connection that asked
// (docs/formats/shared-memory.md).
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "agentd/service.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

struct MemoryLinkCounters {
  std::int64_t granted = 0;
  std::int64_t refused = 0;  // other users, false tickets, datagrams that are no claims
};

// One thread, except Open. Never blocks.
class MemoryLink {
 public:
  using Clock = std::chrono::steady_clock;

  // Listens beside the ipc socket at `ipc_path`, to hand out `pages`. `on_gone` is called, from Handle, with the ZeroMQ
  // name of a connection whose process has gone or has closed its link. Unavailable when the socket cannot be had,
  // naming why; InvalidArgument when `pages` are not to be shared.
  static Result<std::unique_ptr<MemoryLink>> Open(const std::string& ipc_path, const SharedPages& pages,
                                                  std::function<void(const std::string& peer)> on_gone);
  virtual ~MemoryLink() = default;

  virtual const std::string& path() const = 0;
  // Proves that its bearer is `peer`. Nothing is kept for it: it can be made for everyone who greets.
  virtual std::vector<std::uint8_t> TicketFor(const std::string& peer) const = 0;

  virtual int poll_fd() const = 0;  // readable when Handle has something to do
  virtual void Handle() = 0;
  // Ends connections that did not claim in time. Returns when to call it again, or max() when nobody is waited for.
  virtual Clock::time_point CloseIdle(Clock::time_point now) = 0;
  virtual MemoryLinkCounters counters() const = 0;
};

}  // namespace kvshare::agentd

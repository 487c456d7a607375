// MemoryLink: the unix socket beside an ipc endpoint where clients get the daemon's KV memory, and whose connections
// own their leases: the kernel closes them with their process, so a killed client holds nothing for long.
//
// ZeroMQ carries no descriptors and tells of no disconnect; this socket does both. It also carries requests that are
// asked often and answered in microseconds, since one thread reads, answers and writes. A client is told in HelloAck
// where it is, with a ticket that ties it to the ZeroMQ connection that asked (docs/formats/shared-memory.md).
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
#include "libkvshare/codec/codec.h"

namespace kvshare::agentd {

struct MemoryLinkCounters {
  std::int64_t granted = 0;
  std::int64_t refused = 0;  // other users, false tickets, datagrams that are no claims
};

// What a client that has claimed says, until it has gone: destroyed then. One call at a time.
class LinkPeer {
 public:
  virtual ~LinkPeer() = default;
  // A datagram, of at most kMaxLinkFrameBytes. *answer is sent, unless it is empty. False: the connection ends. May
  // wait for the engine: the connection's next datagram waits too, and no other's.
  virtual bool OnFrame(std::span<const std::uint8_t> bytes, codec::Frame* answer) = 0;
};

// Thread-safe.
class MemoryLink {
 public:
  using Clock = std::chrono::steady_clock;
  // Makes the peer that ZeroMQ calls so. Never null.
  using PeerFactory = std::function<std::unique_ptr<LinkPeer>(const std::string& peer)>;

  // Listens beside the ipc socket at `ipc_path`, to hand out `pages`. Unavailable when the socket cannot be had, naming
  // why; InvalidArgument when `pages` are not to be shared.
  static Result<std::unique_ptr<MemoryLink>> Open(const std::string& ipc_path, const SharedPages& pages,
                                                  PeerFactory new_peer);
  virtual ~MemoryLink() = default;  // stops

  virtual const std::string& path() const = 0;
  // Proves that its bearer is `peer`. Nothing is kept for it: it can be made for everyone who greets.
  virtual std::vector<std::uint8_t> TicketFor(const std::string& peer) const = 0;

  // Serves on threads of its own. Once.
  virtual void Start() = 0;
  // Ends the threads, the connections and the socket.
  virtual void Stop() = 0;
  // What such a thread does: waits for one event, at most so long (-1 ms: for ever), and handles it. False: none came.
  virtual bool HandleOne(std::chrono::milliseconds timeout) = 0;
  // Ends connections that had not claimed when it was time to.
  virtual void CloseIdle(Clock::time_point now) = 0;
  virtual MemoryLinkCounters counters() const = 0;
};

}  // namespace kvshare::agentd

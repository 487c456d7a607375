// Connection: one DEALER socket, the thread that owns it, and the calls that wait on it.
//
//   caller --Start--> outbox_ --io thread--> daemon --io thread--> Call::inbox --Next--> caller
//
// A connection greets first (Hello, HelloAck) and sends nothing else before the daemon has answered in the same
// protocol version. ZeroMQ reconnects by itself; calls whose request was sent before the link broke end with
// Unavailable, calls whose request still waits here keep waiting, each until its own deadline.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "kvshare/status.h"
#include "libkvshare/codec/codec.h"
#include "libkvshare/core/endpoint.h"

namespace kvshare::client_internal {

using Clock = std::chrono::steady_clock;

enum class CallKind {
  kUnary,   // one reply
  kStream,  // Accepted, chunks, Done; the daemon gives signs of life meanwhile
};

// One request and its replies. Guarded by the Connection's mutex; callers hold it as an opaque handle.
struct Call {
  std::uint64_t correlation = 0;
  CallKind kind = CallKind::kUnary;
  std::uint64_t link = 0;     // which link the last reply came by; see Greeting
  std::uint64_t only = 0;     // not 0: the one link that it may be sent by
  std::size_t inbox_max = 0;  // more is a daemon that ignores credit
  Clock::time_point started = Clock::now();
  bool sent = false;
  std::deque<codec::Reply> inbox;
  Status end;  // not OK: nothing more comes, and why
  std::condition_variable changed;
};

// How a daemon greeted. Links are numbered from 1: each is one daemon's, and ends when that daemon goes.
struct Greeting {
  std::uint64_t link = 0;
  codec::HelloAck ack;
};

// Thread-safe.
class Connection {
 public:
  // Starts connecting to `endpoint` and returns at once. Unavailable when this machine refuses a socket or thread.
  static Result<std::unique_ptr<Connection>> Open(const std::string& endpoint);
  virtual ~Connection() = default;  // ends all calls with Cancelled

  // Queues a request. InvalidArgument when it exceeds the wire's limits. `only`: for the daemon of that link alone;
  // Unavailable when it has gone, and the call's end when it goes (0: whichever is there).
  virtual Result<std::shared_ptr<Call>> Start(const codec::Request& request, CallKind kind, std::size_t inbox_max,
                                              std::uint64_t only = 0) = 0;
  // The call's next reply; an Error of the daemon's is returned as its Status. When `deadline` passes first:
  // DeadlineExceeded, or Unavailable when the request could not even be sent.
  virtual Result<codec::Reply> Next(Call& call, Clock::time_point deadline) = 0;
  // Waits until the request is on its way (true), the call has ended, or `deadline` has passed.
  virtual bool WaitSent(Call& call, Clock::time_point deadline) = 0;
  // Nothing more of this call is wanted; a request that still waits is not sent.
  virtual void Forget(Call& call) = 0;
  // A request without an answer, for this connection only: dropped when the link is down, or not the one that is meant
  // (0: whichever is up).
  virtual void Post(const codec::Request& request, std::uint64_t link = 0) = 0;
  // Waits until a daemon has greeted. Unavailable when none did in time.
  virtual Result<Greeting> WaitGreeting(Clock::time_point deadline) = 0;
  virtual std::uint64_t link() const = 0;  // the number of the link that is up, or was last
};

}  // namespace kvshare::client_internal

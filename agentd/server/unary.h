// Requests with one reply: what the service answers, and the thread for those that may take a while.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

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

// Answers requests away from the io thread, into the mailbox. A few at a time, since some wait for the disk.
// Thread-safe.
class UnaryWorker {
 public:
  UnaryWorker(Service* service, std::shared_ptr<Mailbox> mailbox);
  ~UnaryWorker();  // finishes the requests it is at and gives leases back; drops the others
  UnaryWorker(const UnaryWorker&) = delete;
  UnaryWorker& operator=(const UnaryWorker&) = delete;

  // False when too many wait already.
  bool Submit(std::string peer, std::uint64_t correlation, codec::Request request);
  // Gives a lease back, in the name of a connection that has gone (correlation 0), or that asks and waits for an
  // answer. Never refused: there are no more of these than there were leases.
  void Release(std::string peer, std::uint64_t correlation, std::uint64_t lease);
  // Whether nothing waits, runs, or is still to be posted. From the first call on, the mailbox is woken when that
  // comes.
  bool IdleOrWake();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvshare::agentd

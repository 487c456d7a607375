// Requests with one reply: what the service answers, and the thread for those that may take a while.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "agentd/server/mailbox.h"
#include "agentd/service.h"
#include "libkvshare/codec/codec.h"

namespace kvshare::agentd {

// Asks the service and encodes its answer, or its error. Requires: not Generate, Cancel or Credit. Catches everything.
codec::Frame AnswerUnary(Service& service, std::uint64_t correlation, const codec::Request& request);

// Answers requests one after the other, away from the io thread, into the mailbox. Thread-safe.
class UnaryWorker {
 public:
  UnaryWorker(Service* service, std::shared_ptr<Mailbox> mailbox);
  ~UnaryWorker();  // finishes the request it is at, drops the others
  UnaryWorker(const UnaryWorker&) = delete;
  UnaryWorker& operator=(const UnaryWorker&) = delete;

  // False when too many wait already.
  bool Submit(std::string peer, std::uint64_t correlation, codec::Request request);
  bool idle() const;  // nothing waits, runs, or is still to be posted

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvshare::agentd

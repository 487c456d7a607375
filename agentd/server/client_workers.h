// ClientWorkers: threads for what clients ask that may take a while, each client's requests in their turn.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "kvshare/status.h"

namespace kvshare::agentd {

// A client that asks for much waits for itself: the threads take one job of each client that has any, then the next of
// each. Thread-safe.
class ClientWorkers {
 public:
  using Job = std::function<void()>;  // must not throw

  // `on_idle`: see IdleOrWake.
  ClientWorkers(int threads, std::function<void()> on_idle);
  ~ClientWorkers();  // finishes the jobs it is at and those of SubmitFirst, drops the others
  ClientWorkers(const ClientWorkers&) = delete;
  ClientWorkers& operator=(const ClientWorkers&) = delete;

  // `bytes`: what the request holds while it waits. ResourceExhausted where this client, or all of them, would have
  // more waiting than they may.
  Status Submit(const std::string& client, std::size_t bytes, Job job);
  // Before all others, in nobody's name, and never refused: for what makes room, such as the end of a lease.
  void SubmitFirst(Job job);
  // Of a client that has gone: what it waits for is not done any more.
  void Drop(const std::string& client);
  // Whether nothing waits or runs. From the first call on, on_idle is called when that comes.
  bool IdleOrWake();

  static constexpr std::size_t kClientBytesMax = std::size_t{32} << 20;
  static constexpr std::size_t kBytesMax = std::size_t{128} << 20;
  static constexpr std::size_t kJobBytes = 1 << 10;  // that a job weighs beside its own bytes

 private:
  struct State;
  const std::unique_ptr<State> state_;
};

}  // namespace kvshare::agentd

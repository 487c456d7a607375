// RouterSocket: the ROUTER socket itself, its endpoint and its options; what travels is the server's business.
#pragma once

#include <chrono>
#include <optional>
#include <string>
#include <zmq.hpp>

#include "agentd/server/listener.h"
#include "kvshare/status.h"
#include "libkvshare/codec/codec.h"
#include "libkvshare/core/endpoint.h"

namespace kvshare::agentd {

enum class SendOutcome {
  kSent,
  kFull,  // the client reads too slowly: later
  kGone,  // no such client any more
};

// One thread; any of these may throw zmq::error_t.
class RouterSocket {
 public:
  // `text` is what `endpoint` was parsed from. InvalidArgument for an address that is not this machine's, Unavailable
  // when it is taken.
  Status Bind(const Endpoint& endpoint, const std::string& text);
  const std::string& endpoint() const { return endpoint_; }  // a tcp port of 0 or * is resolved
  void* handle() { return socket_.handle(); }

  struct Message {
    std::string peer;  // ZeroMQ's name of the connection
    zmq::message_t frame;
    bool whole = false;  // of exactly one part, as all of ours are
  };
  // False when nothing is there.
  bool Receive(Message& message);
  // Takes all of `frame` or nothing.
  SendOutcome TrySend(const std::string& peer, const codec::Frame& frame);
  // Gives what was sent so much time to leave; then the socket's file goes.
  void Close(std::chrono::milliseconds linger);

 private:
  Status BindTcp(const Endpoint& endpoint, const std::string& text);

  std::string endpoint_;
  std::optional<UnixListener> listener_;
  zmq::context_t context_;
  zmq::socket_t socket_;
};

}  // namespace kvshare::agentd

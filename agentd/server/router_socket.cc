#include "agentd/server/router_socket.h"

#include <cerrno>
#include <utility>

#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {
namespace {

// Messages per client that ZeroMQ may hold. Few: one may be 16 MiB.
constexpr int kHighWaterMark = 64;
constexpr int kHeartbeatMs = 2000;
constexpr int kHeartbeatTimeoutMs = 10000;

}  // namespace

Status RouterSocket::Bind(const Endpoint& endpoint, const std::string& text) {
  socket_ = zmq::socket_t(context_, zmq::socket_type::router);
  socket_.set(zmq::sockopt::linger, 0);
  socket_.set(zmq::sockopt::sndhwm, kHighWaterMark);
  socket_.set(zmq::sockopt::rcvhwm, kHighWaterMark);
  socket_.set(zmq::sockopt::maxmsgsize, static_cast<std::int64_t>(wire::kMaxFrameBytes));
  socket_.set(zmq::sockopt::router_mandatory, true);
  if (endpoint.transport == Transport::kTcp) return BindTcp(endpoint, text);
  KVS_ASSIGN_OR_RETURN(UnixListener listener, UnixListener::Listen(endpoint.path));
  listener_.emplace(std::move(listener));
  socket_.set(zmq::sockopt::use_fd, listener_->ReleaseFd());
  socket_.bind(text);
  endpoint_ = text;
  return OkStatus();
}

Status RouterSocket::BindTcp(const Endpoint& endpoint, const std::string& text) {
  // ZeroMQ binds to addresses, not names.
  const std::string host = endpoint.host == "localhost" ? "127.0.0.1" : endpoint.host;
  const std::string port = endpoint.port == 0 ? "*" : std::to_string(endpoint.port);
  socket_.set(zmq::sockopt::ipv6, host.front() == '[');
  socket_.set(zmq::sockopt::heartbeat_ivl, kHeartbeatMs);
  socket_.set(zmq::sockopt::heartbeat_timeout, kHeartbeatTimeoutMs);
  try {
    socket_.bind("tcp://" + host + ":" + port);
  } catch (const zmq::error_t& error) {
    if (error.num() == EADDRINUSE || error.num() == EACCES) {
      return Unavailable("cannot listen on " + text + ": " + error.what() +
                         "; stop the process that has the port, or choose another one");
    }
    return InvalidArgument("cannot listen on " + text + ": " + error.what() +
                           "; the host must be an address of this machine");
  }
  endpoint_ = socket_.get(zmq::sockopt::last_endpoint);
  return OkStatus();
}

bool RouterSocket::Receive(Message& message) {
  zmq::message_t identity;
  if (!socket_.recv(identity, zmq::recv_flags::dontwait)) return false;
  int parts = 0;
  for (bool more = identity.more(); more;) {
    zmq::message_t part;
    if (!socket_.recv(part, zmq::recv_flags::dontwait)) break;
    more = part.more();
    if (++parts == 1) message.frame = std::move(part);
  }
  message.peer = identity.to_string();
  message.whole = parts == 1;
  return true;
}

SendOutcome RouterSocket::TrySend(const std::string& peer, const codec::Frame& frame) {
  try {
    if (!socket_.send(zmq::buffer(peer), zmq::send_flags::sndmore | zmq::send_flags::dontwait)) {
      return SendOutcome::kFull;
    }
    // Once the name is taken, the rest is.
    return socket_.send(zmq::buffer(frame), zmq::send_flags::dontwait) ? SendOutcome::kSent : SendOutcome::kGone;
  } catch (const zmq::error_t& error) {
    if (error.num() == EHOSTUNREACH) return SendOutcome::kGone;
    throw;
  }
}

void RouterSocket::Close(std::chrono::milliseconds linger) {
  socket_.set(zmq::sockopt::linger, static_cast<int>(linger.count()));
  socket_.close();
  context_.close();  // within the linger time
  listener_.reset();
}

}  // namespace kvshare::agentd

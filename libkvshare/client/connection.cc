#include "libkvshare/client/connection.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <exception>
#include <optional>
#include <utility>
#include <variant>
#include <zmq.hpp>

#include "libkvshare/core/status_macros.h"

namespace kvshare::client_internal {
namespace {

using std::chrono::milliseconds;

// The process's signals are the agent's to handle, on threads of its own: one of ours they would interrupt in a
// socket's call, which ends the connection.
class AllSignalsBlocked {
 public:
  AllSignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~AllSignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  AllSignalsBlocked(const AllSignalsBlocked&) = delete;
  AllSignalsBlocked& operator=(const AllSignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

// A daemon with open streams of ours gives a sign of life every second; this much silence means it is stuck.
constexpr milliseconds kSilenceMax{15000};
constexpr milliseconds kSilenceCheck{1000};
constexpr int kReconnectMs = 20;
constexpr int kReconnectMaxMs = 500;
// Of the connection itself, on tcp: notices a peer whose machine is gone.
constexpr int kHeartbeatMs = 2000;
constexpr int kHeartbeatTimeoutMs = 10000;
// Messages, not bytes. Streams are bounded by credit; more waiting requests stay in outbox_.
constexpr int kHighWaterMark = 1000;
// That a connection takes, and more: libzmq ends the process where it finds none left.
constexpr int kDescriptors = 16;
// A Cancel sent just before the end should leave this machine.
constexpr int kLingerMs = 100;
constexpr char kClientName[] = "libkvshare 0.1.0";
constexpr char kMonitorAddress[] = "inproc://monitor";

struct Outgoing {
  codec::Frame frame;
  std::shared_ptr<Call> call;  // null for Post
};

Status CheckDescriptors() {
  std::array<int, kDescriptors> fds;
  fds.fill(-1);
  for (int& fd : fds) fd = ::eventfd(0, EFD_CLOEXEC);
  const Status status = fds.back() >= 0 ? OkStatus()
                                        : Unavailable(std::string("too few descriptors are left for a connection: ") +
                                                      std::strerror(errno) + "; close some, or raise ulimit -n");
  for (const int fd : fds) {
    if (fd >= 0) ::close(fd);
  }
  return status;
}

class ZmqConnection final : public Connection {
 public:
  explicit ZmqConnection(std::string endpoint) : endpoint_(std::move(endpoint)) {}

  ~ZmqConnection() override {
    if (io_thread_.joinable()) {
      {
        const std::lock_guard lock(mu_);
        stopping_ = true;
      }
      Wake();
      io_thread_.join();
    }
    if (wake_fd_ >= 0) ::close(wake_fd_);
  }

  // May throw zmq::error_t and std::system_error; Open catches.
  Status Init() {
    KVS_ASSIGN_OR_RETURN(const Endpoint endpoint, ParseEndpoint(endpoint_, EndpointUse::kConnect));
    wake_fd_ = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (wake_fd_ < 0) return Unavailable(std::string("no event descriptor: ") + std::strerror(errno));
    socket_ = zmq::socket_t(context_, zmq::socket_type::dealer);
    socket_.set(zmq::sockopt::linger, kLingerMs);
    socket_.set(zmq::sockopt::sndhwm, kHighWaterMark);
    socket_.set(zmq::sockopt::rcvhwm, kHighWaterMark);
    socket_.set(zmq::sockopt::maxmsgsize, static_cast<std::int64_t>(wire::kMaxFrameBytes));
    socket_.set(zmq::sockopt::reconnect_ivl, kReconnectMs);
    socket_.set(zmq::sockopt::reconnect_ivl_max, kReconnectMaxMs);
    // Not ZMQ_IMMEDIATE: when a link breaks, libzmq drops with it what has arrived and was not read yet. The price: a
    // request that ZeroMQ had not written when the link broke goes to the next daemon (see Deliver).
    if (endpoint.transport == Transport::kTcp) {
      socket_.set(zmq::sockopt::ipv6, endpoint.host.front() == '[');
      socket_.set(zmq::sockopt::heartbeat_ivl, kHeartbeatMs);
      socket_.set(zmq::sockopt::heartbeat_timeout, kHeartbeatTimeoutMs);
    }
    if (zmq_socket_monitor(socket_.handle(), kMonitorAddress, ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED) !=
        0) {
      throw zmq::error_t();
    }
    monitor_ = zmq::socket_t(context_, zmq::socket_type::pair);
    monitor_.set(zmq::sockopt::linger, 0);
    monitor_.connect(kMonitorAddress);
    socket_.connect(endpoint_);
    const AllSignalsBlocked blocked;  // the thread inherits it
    io_thread_ = std::thread([this] { IoThread(); });
    return OkStatus();
  }

  Result<std::shared_ptr<Call>> Start(const codec::Request& request, CallKind kind, std::size_t inbox_max,
                                      std::uint64_t only) override {
    auto call = std::make_shared<Call>();
    call->kind = kind;
    call->inbox_max = inbox_max;
    call->only = only;
    {
      const std::lock_guard lock(mu_);
      call->correlation = ++last_correlation_;
    }
    KVS_ASSIGN_OR_RETURN(codec::Frame frame, codec::EncodeRequest(call->correlation, request));
    {
      const std::lock_guard lock(mu_);
      if (!refused_.ok()) return refused_;
      if (only != 0 && (!ready_ || only != link_)) return GoneStatus();
      calls_[call->correlation] = call;
      outbox_.push_back({std::move(frame), call});
    }
    Wake();
    return call;
  }

  Result<codec::Reply> Next(Call& call, Clock::time_point deadline) override {
    std::unique_lock lock(mu_);
    const bool ready = call.changed.wait_until(lock, deadline, [&] { return !call.inbox.empty() || !call.end.ok(); });
    if (!call.inbox.empty()) {
      codec::Reply reply = std::move(call.inbox.front());
      call.inbox.pop_front();
      if (const Status* error = std::get_if<Status>(&reply)) return *error;
      return reply;
    }
    if (ready) return call.end;
    const auto waited = std::chrono::duration_cast<milliseconds>(Clock::now() - call.started);
    const std::string within = " within " + std::to_string(waited.count()) + " ms";
    if (call.sent) return DeadlineExceeded("the daemon at " + endpoint_ + " did not answer" + within);
    return Unavailable("no daemon answers at " + endpoint_ + within + "; start one with: agentd --listen " + endpoint_);
  }

  bool WaitSent(Call& call, Clock::time_point deadline) override {
    std::unique_lock lock(mu_);
    call.changed.wait_until(lock, deadline, [&] { return call.sent || !call.end.ok(); });
    return call.sent;
  }

  void Forget(Call& call) override {
    const std::lock_guard lock(mu_);
    if (call.end.ok()) call.end = Cancelled("the call was given up");
    call.inbox.clear();
    calls_.erase(call.correlation);
    if (call.sent) return;
    outbox_.erase(std::remove_if(outbox_.begin(), outbox_.end(),
                                 [&call](const Outgoing& outgoing) { return outgoing.call.get() == &call; }),
                  outbox_.end());
  }

  void Post(const codec::Request& request, std::uint64_t link) override {
    Result<codec::Frame> frame = codec::EncodeRequest(0, request);
    if (!frame.ok()) return;
    {
      const std::lock_guard lock(mu_);
      if (!ready_ || (link != 0 && link != link_)) return;
      outbox_.push_back({*std::move(frame), nullptr});
    }
    Wake();
  }

  Result<Greeting> WaitGreeting(Clock::time_point deadline) override {
    std::unique_lock lock(mu_);
    greeted_.wait_until(lock, deadline, [&] { return ready_ || !refused_.ok(); });
    if (!refused_.ok()) return refused_;
    if (!ready_)
      return Unavailable("no daemon answers at " + endpoint_ + "; start one with: agentd --listen " + endpoint_);
    return Greeting{.link = link_, .ack = ack_};
  }

  std::uint64_t link() const override {
    const std::lock_guard lock(mu_);
    return link_;
  }

 private:
  Status GoneStatus() const { return Unavailable("the daemon at " + endpoint_ + " went away"); }

  void Wake() {
    const std::uint64_t one = 1;
    // Fails only when the counter is full, and then the thread is awake anyway.
    [[maybe_unused]] const ssize_t written = ::write(wake_fd_, &one, sizeof one);
  }

  // ---- below: io thread only, except as noted ----

  void IoThread() {
    try {
      while (Step()) {
      }
      EndAll(Cancelled("the client is being destroyed"), /*sent_only=*/false);
      FlushOutbox();
    } catch (const std::exception& error) {
      const std::lock_guard lock(mu_);
      refused_ = Internal(std::string("the client's socket failed: ") + error.what());
      EndAllLocked(refused_, /*sent_only=*/false);
    }
    try {
      zmq_socket_monitor(socket_.handle(), nullptr, 0);
      monitor_.close();
      socket_.close();
    } catch (const std::exception&) {
      // Closing an open socket cannot fail; a closed one needs nothing.
    }
  }

  bool Step() {
    bool want_out = greeting_due_;
    bool streams = false;
    {
      const std::lock_guard lock(mu_);
      if (stopping_) return false;
      want_out = want_out || (ready_ && !outbox_.empty());
      streams = streams_open_ > 0;
    }
    std::array<zmq::pollitem_t, 3> items{{
        {socket_.handle(), 0, static_cast<short>(ZMQ_POLLIN | (want_out ? ZMQ_POLLOUT : 0)), 0},
        {monitor_.handle(), 0, ZMQ_POLLIN, 0},
        {nullptr, wake_fd_, ZMQ_POLLIN, 0},
    }};
    zmq::poll(items.data(), items.size(), streams ? kSilenceCheck : milliseconds(-1));
    if (items[2].revents != 0) {
      std::uint64_t ignored = 0;
      [[maybe_unused]] const ssize_t got = ::read(wake_fd_, &ignored, sizeof ignored);
    }
    ReceiveAll();
    while (ReceiveMonitorEvent()) {
    }
    if (greeting_due_) Greet();
    FlushOutbox();
    CheckSilence();
    return true;
  }

  bool ReceiveMonitorEvent() {
    zmq::message_t event;
    if (!monitor_.recv(event, zmq::recv_flags::dontwait)) return false;
    zmq::message_t address;
    if (event.more() && !monitor_.recv(address, zmq::recv_flags::dontwait)) return false;
    std::uint16_t number = 0;
    if (event.size() < sizeof number) return true;
    std::memcpy(&number, event.data(), sizeof number);
    if (number == ZMQ_EVENT_HANDSHAKE_SUCCEEDED) {
      greeting_due_ = true;
    } else if (number == ZMQ_EVENT_DISCONNECTED) {
      // What the daemon said before it went still counts.
      ReceiveAll();
      OnDisconnected();
    }
    return true;
  }

  void OnDisconnected() {
    greeting_due_ = false;
    const std::lock_guard lock(mu_);
    ready_ = false;
    refused_ = OkStatus();
    const auto meant_for_it = [](const Outgoing& outgoing) {
      return outgoing.call == nullptr || outgoing.call->only != 0;
    };
    outbox_.erase(std::remove_if(outbox_.begin(), outbox_.end(), meant_for_it), outbox_.end());
    EndAllLocked(GoneStatus(), /*sent_only=*/true);
  }

  void Greet() {
    if (greeting_.empty()) {
      {
        const std::lock_guard lock(mu_);
        greeting_correlation_ = ++last_correlation_;
      }
      Result<codec::Frame> frame = codec::EncodeRequest(greeting_correlation_, codec::Hello{.client = kClientName});
      if (!frame.ok()) return;
      greeting_ = *std::move(frame);
    }
    if (!SendFrame(greeting_)) return;
    greeting_due_ = false;
    greeting_.clear();
  }

  // False when the link takes nothing now.
  bool SendFrame(const codec::Frame& frame) {
    return socket_.send(zmq::buffer(frame), zmq::send_flags::dontwait).has_value();
  }

  void FlushOutbox() {
    std::unique_lock lock(mu_);
    while (ready_ && !outbox_.empty()) {
      // ZeroMQ copies and queues; nothing blocks under the lock.
      if (!SendFrame(outbox_.front().frame)) return;
      if (const std::shared_ptr<Call> call = std::move(outbox_.front().call)) {
        call->sent = true;
        if (call->kind == CallKind::kStream && call->end.ok()) last_heard_ = Clock::now();
        call->changed.notify_all();
      }
      outbox_.pop_front();
    }
  }

  void ReceiveAll() {
    zmq::message_t message;
    while (socket_.recv(message, zmq::recv_flags::dontwait)) {
      const bool parts = message.more();
      if (!parts && !in_parts_) OnFrame({message.data<std::uint8_t>(), message.size()});
      in_parts_ = parts;  // frames are single-part; anything else is dropped whole
    }
  }

  void OnFrame(std::span<const std::uint8_t> bytes) {
    last_heard_ = Clock::now();
    const wire::FrameFault fault = received_.Load(bytes, wire::FrameKind::kReply);
    const wire::FrameHeader& header = received_.header();
    if (fault != wire::FrameFault::kNone) {
      if (!wire::CorrelationReadable(fault)) return;
      Status status = codec::FaultStatus(fault, header, "daemon");
      if (status.code() != StatusCode::kFailedPrecondition) {
        status = Internal("the daemon sent a bad reply: " + status.message());
      }
      if (header.correlation == greeting_correlation_) return Refuse(status);
      return Deliver(header.correlation, codec::Reply(status));
    }
    Result<codec::Reply> reply = codec::DecodeReply(*received_.reply());
    if (!reply.ok()) {
      reply = codec::Reply(Internal("the daemon sent a bad reply: " + reply.status().message()));
    }
    if (header.correlation == greeting_correlation_) {
      if (const Status* error = std::get_if<Status>(&*reply)) return Refuse(*error);
      const std::lock_guard lock(mu_);
      if (codec::HelloAck* ack = std::get_if<codec::HelloAck>(&*reply)) {
        ready_ = true;
        ++link_;
        ack_ = std::move(*ack);
        greeted_.notify_all();
      }
      return;
    }
    Deliver(header.correlation, *std::move(reply));
  }

  // The daemon does not want this client; nothing can be sent until another daemon listens there.
  void Refuse(const Status& status) {
    const std::lock_guard lock(mu_);
    refused_ = status;
    greeted_.notify_all();
    EndAllLocked(status, /*sent_only=*/false);
  }

  void Deliver(std::uint64_t correlation, codec::Reply reply) {
    const std::lock_guard lock(mu_);
    const Status* error = std::get_if<Status>(&reply);
    if (correlation == 0 && error != nullptr) return EndAllLocked(*error, /*sent_only=*/true);
    const auto found = calls_.find(correlation);
    if (found == calls_.end()) {  // given up meanwhile, or a sign of life
      // A generation that nobody waits for must not run on.
      if (std::holds_alternative<codec::Accepted>(reply)) CancelLocked(correlation);
      return;
    }
    Call& call = *found->second;
    if (call.inbox.size() >= call.inbox_max) {
      reply = Internal("the daemon sends more than it was granted");
    }
    const bool last = call.kind == CallKind::kUnary || std::holds_alternative<Status>(reply) ||
                      std::holds_alternative<GenerateReply>(reply);
    call.link = link_;
    call.inbox.push_back(std::move(reply));
    call.changed.notify_all();
    if (last) {
      call.end = Internal("the call has ended");
      calls_.erase(found);
    }
  }

  void CancelLocked(std::uint64_t correlation) {
    Result<codec::Frame> frame = codec::EncodeRequest(0, codec::Cancel{.target = correlation});
    if (frame.ok()) outbox_.push_back({*std::move(frame), nullptr});
  }

  void CheckSilence() {
    const std::lock_guard lock(mu_);
    streams_open_ = 0;
    for (const auto& [correlation, call] : calls_) {
      if (call->kind == CallKind::kStream && call->sent) ++streams_open_;
    }
    if (streams_open_ == 0 || Clock::now() - last_heard_ < kSilenceMax) return;
    // It may only be slow: then nobody waits for what it computes.
    for (const auto& [correlation, call] : calls_) {
      if (call->kind == CallKind::kStream && call->sent) CancelLocked(correlation);
    }
    const std::string silence = std::to_string(kSilenceMax.count() / 1000);
    EndAllLocked(Unavailable("the daemon at " + endpoint_ + " has been silent for " + silence + " s"),
                 /*sent_only=*/true);
  }

  void EndAll(const Status& status, bool sent_only) {
    const std::lock_guard lock(mu_);
    EndAllLocked(status, sent_only);
  }

  void EndAllLocked(const Status& status, bool sent_only) {
    for (auto it = calls_.begin(); it != calls_.end();) {
      if (sent_only && !it->second->sent && it->second->only == 0) {
        ++it;
        continue;
      }
      it->second->end = status;
      it->second->changed.notify_all();
      it = calls_.erase(it);
    }
    if (sent_only) return;
    outbox_.erase(std::remove_if(outbox_.begin(), outbox_.end(),
                                 [](const Outgoing& outgoing) { return outgoing.call != nullptr; }),
                  outbox_.end());
  }

  const std::string endpoint_;
  int wake_fd_ = -1;
  zmq::context_t context_;
  zmq::socket_t socket_;   // io thread
  zmq::socket_t monitor_;  // io thread

  // Io thread.
  wire::ReceivedFrame received_;
  bool in_parts_ = false;
  bool greeting_due_ = false;
  std::uint64_t greeting_correlation_ = 0;
  codec::Frame greeting_;
  Clock::time_point last_heard_ = Clock::now();

  mutable std::mutex mu_;  // guards what follows, and every Call
  bool stopping_ = false;
  bool ready_ = false;  // the daemon has answered the greeting on the present link
  Status refused_;      // not OK: why no call can succeed on the present link
  std::uint64_t link_ = 0;
  codec::HelloAck ack_;  // of link_
  std::condition_variable greeted_;
  std::uint64_t last_correlation_ = 0;
  std::size_t streams_open_ = 0;
  std::map<std::uint64_t, std::shared_ptr<Call>> calls_;
  std::deque<Outgoing> outbox_;

  std::thread io_thread_;
};

}  // namespace

Result<std::unique_ptr<Connection>> Connection::Open(const std::string& endpoint) {
  KVS_RETURN_IF_ERROR(CheckDescriptors());
  try {
    auto connection = std::make_unique<ZmqConnection>(endpoint);
    KVS_RETURN_IF_ERROR(connection->Init());
    return std::unique_ptr<Connection>(std::move(connection));
  } catch (const std::exception& error) {
    return Unavailable("cannot open a socket for " + endpoint + ": " + error.what());
  }
}

}  // namespace kvshare::client_internal

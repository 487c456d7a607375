#include "agentd/server/router_server.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <deque>
#include <exception>
#include <map>
#include <optional>
#include <thread>
#include <utility>
#include <variant>
#include <zmq.hpp>

#include "agentd/server/listener.h"
#include "agentd/server/mailbox.h"
#include "agentd/server/unary.h"
#include "libkvshare/codec/codec.h"
#include "libkvshare/core/endpoint.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// Messages per client that ZeroMQ may hold. Few: one may be 16 MiB.
constexpr int kHighWaterMark = 64;
// What a client that does not read may make us hold besides.
constexpr std::size_t kPendingBytesMax = std::size_t{32} << 20;
constexpr std::size_t kStreamsPerClientMax = 1024;
// Frames taken before the outcomes get their turn.
constexpr int kFramesPerStep = 128;
// Below this the io thread answers by itself: some 0.3 ms of tokenising, against two wake-ups.
constexpr std::size_t kInlineRequestBytes = 32 << 10;
constexpr milliseconds kTick{1000};           // signs of life, deadlines
constexpr milliseconds kRetry{5};             // of clients whose pipe is full
constexpr milliseconds kDeadlineGrace{5000};  // the client's own deadline comes first
constexpr milliseconds kDrainStuckMax{5000};
constexpr int kDrainLingerMs = 2000;
constexpr int kHeartbeatMs = 2000;
constexpr int kHeartbeatTimeoutMs = 10000;

struct Stream {
  std::shared_ptr<StreamSink> sink;
  std::uint64_t request_id = 0;
  std::uint32_t credit = 0;
  Clock::time_point deadline;
};

// A client we owe something.
struct Peer {
  std::map<std::uint64_t, Stream> streams;  // by correlation id
  std::deque<codec::Frame> pending;         // its pipe was full
  std::size_t pending_bytes = 0;
  Clock::time_point last_sent = Clock::now();
};

enum class SendOutcome { kSent, kFull, kGone };

class ZmqRouterServer final : public RouterServer {
 public:
  explicit ZmqRouterServer(Service* service) : service_(service), mailbox_(std::make_shared<Mailbox>()) {}

  ~ZmqRouterServer() override {
    stopping_ = true;
    Join();
  }

  // May throw zmq::error_t and std::system_error; StartRouterServer catches.
  Status Init(const std::string& text) {
    KVS_ASSIGN_OR_RETURN(const Endpoint endpoint, ParseEndpoint(text, EndpointUse::kListen));
    if (!mailbox_->ok()) return Unavailable("this process has no descriptor left");
    socket_ = zmq::socket_t(context_, zmq::socket_type::router);
    socket_.set(zmq::sockopt::linger, 0);
    socket_.set(zmq::sockopt::sndhwm, kHighWaterMark);
    socket_.set(zmq::sockopt::rcvhwm, kHighWaterMark);
    socket_.set(zmq::sockopt::maxmsgsize, static_cast<std::int64_t>(wire::kMaxFrameBytes));
    socket_.set(zmq::sockopt::router_mandatory, true);
    if (endpoint.transport == Transport::kIpc) {
      KVS_ASSIGN_OR_RETURN(UnixListener listener, UnixListener::Listen(endpoint.path));
      listener_.emplace(std::move(listener));
      socket_.set(zmq::sockopt::use_fd, listener_->ReleaseFd());
      socket_.bind(text);
      endpoint_ = text;
    } else {
      KVS_RETURN_IF_ERROR(BindTcp(endpoint, text));
    }
    worker_ = std::make_unique<UnaryWorker>(service_, mailbox_);
    io_thread_ = std::thread([this] { IoThread(); });
    return OkStatus();
  }

  void DrainAndStop() override {
    draining_ = true;
    Join();
  }

  std::string endpoint() const override { return endpoint_; }

  RouterServerCounters counters() const override {
    return {.frames = frames_, .malformed_frames = malformed_, .replies_dropped = dropped_, .clients_lost = lost_};
  }

 private:
  Status BindTcp(const Endpoint& endpoint, const std::string& text) {
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

  void Join() {
    if (!io_thread_.joinable()) return;
    mailbox_->Wake();
    io_thread_.join();
    worker_.reset();
    listener_.reset();
  }

  // ---- below: io thread only ----

  void IoThread() {
    try {
      while (Step()) {
      }
    } catch (const std::exception& error) {
      std::fprintf(stderr, "agentd: the server's socket failed: %s; restart the daemon\n", error.what());
    }
    for (auto& [id, peer] : peers_) EndStreams(peer);
    try {
      if (draining_ && !stopping_) socket_.set(zmq::sockopt::linger, kDrainLingerMs);
      socket_.close();
      context_.close();  // within the linger time
    } catch (const std::exception&) {
      // Closing an open socket cannot fail; a closed one needs nothing.
    }
  }

  bool Step() {
    std::array<zmq::pollitem_t, 2> items{{
        {socket_.handle(), 0, ZMQ_POLLIN, 0},
        {nullptr, mailbox_->wake_fd(), ZMQ_POLLIN, 0},
    }};
    zmq::poll(items.data(), items.size(), PollTimeout());
    bool more = true;
    for (int i = 0; i < kFramesPerStep && more; ++i) more = ReceiveOne();
    const Mailbox::Contents contents = mailbox_->TakeAll();
    for (const Answer& answer : contents.answers) Send(answer.peer, answer.frame);
    for (const std::shared_ptr<StreamSink>& sink : contents.ready) FlushSink(*sink);
    if (pending_peers_ > 0) RetryPending();
    if (!peers_.empty() && Clock::now() >= next_tick_) Tick();
    // After TakeAll, which may have taken the wake-up that came with it.
    const bool drained = draining_ && Drained();
    return !stopping_ && !drained;
  }

  milliseconds PollTimeout() const {
    if (pending_peers_ > 0) return kRetry;
    if (peers_.empty()) return milliseconds(-1);
    const auto until_tick = std::chrono::duration_cast<milliseconds>(next_tick_ - Clock::now()) + milliseconds(1);
    return std::clamp(until_tick, milliseconds(0), kTick);
  }

  // The last answers of the worker are posted before it calls itself idle.
  bool Drained() {
    if (!drain_flushed_) {
      // Streams that wait for credit get their rest at once now.
      drain_flushed_ = true;
      std::vector<std::shared_ptr<StreamSink>> sinks;
      for (const auto& [id, peer] : peers_) {
        for (const auto& [correlation, stream] : peer.streams) sinks.push_back(stream.sink);
      }
      for (const auto& sink : sinks) FlushSink(*sink);
    }
    if (!peers_.empty() || !worker_->idle()) return false;
    for (const Answer& answer : mailbox_->TakeAll().answers) Send(answer.peer, answer.frame);
    return peers_.empty();
  }

  // ---- receiving ----

  // False when nothing is there.
  bool ReceiveOne() {
    zmq::message_t identity;
    if (!socket_.recv(identity, zmq::recv_flags::dontwait)) return false;
    zmq::message_t frame;
    int parts = 0;
    for (bool more = identity.more(); more;) {
      zmq::message_t part;
      if (!socket_.recv(part, zmq::recv_flags::dontwait)) break;
      more = part.more();
      if (++parts == 1) frame = std::move(part);
    }
    ++frames_;
    if (parts != 1) {
      ++malformed_;
      return true;
    }
    OnFrame(identity.to_string(), {frame.data<std::uint8_t>(), frame.size()});
    return true;
  }

  void OnFrame(const std::string& peer, std::span<const std::uint8_t> bytes) {
    const wire::FrameFault fault = received_.Load(bytes, wire::FrameKind::kRequest);
    const std::uint64_t correlation = received_.header().correlation;
    if (fault != wire::FrameFault::kNone) {
      ++malformed_;
      if (!wire::CorrelationReadable(fault)) return;
      return SendError(peer, correlation, codec::FaultStatus(fault, received_.header(), "client"));
    }
    Result<codec::Request> request = codec::DecodeRequest(*received_.request());
    if (!request.ok()) {
      ++malformed_;
      return SendError(peer, correlation, request.status());
    }
    if (auto* generate = std::get_if<codec::Generate>(&*request)) return OnGenerate(peer, correlation, *generate);
    if (const auto* cancel = std::get_if<codec::Cancel>(&*request)) return OnCancel(peer, cancel->target);
    if (const auto* credit = std::get_if<codec::Credit>(&*request)) return OnCredit(peer, *credit);
    OnUnary(peer, correlation, *std::move(request), bytes.size());
  }

  void OnUnary(const std::string& peer, std::uint64_t correlation, codec::Request request, std::size_t bytes) {
    const bool greeting = std::holds_alternative<codec::Hello>(request) || std::holds_alternative<codec::Ping>(request);
    if (draining_ && !greeting) return SendError(peer, correlation, DrainingStatus());
    // These two may wait for the engine's step.
    const bool may_wait =
        std::holds_alternative<ExplainRequest>(request) || std::holds_alternative<codec::GetStats>(request);
    if (!may_wait && bytes <= kInlineRequestBytes) {
      return Send(peer, AnswerUnary(*service_, correlation, request));
    }
    if (!worker_->Submit(peer, correlation, std::move(request))) {
      SendError(peer, correlation, ResourceExhausted("too many requests wait for an answer; ask again later"));
    }
  }

  static Status DrainingStatus() { return Unavailable("the daemon is draining and takes no new requests"); }

  void OnGenerate(const std::string& id, std::uint64_t correlation, const codec::Generate& generate) {
    if (draining_) return SendError(id, correlation, DrainingStatus());
    if (const auto found = peers_.find(id); found != peers_.end()) {
      if (found->second.streams.count(correlation) != 0) {
        return SendError(id, correlation, InvalidArgument("a request with this correlation id is still running"));
      }
      if (found->second.streams.size() >= kStreamsPerClientMax) {
        return SendError(id, correlation,
                         ResourceExhausted("this client runs " + std::to_string(kStreamsPerClientMax) +
                                           " requests already, the most a client may; wait for one to end"));
      }
    }
    auto sink = std::make_shared<StreamSink>(mailbox_, id, correlation);
    Result<std::uint64_t> request_id = service_->Generate(generate.request, sink);
    if (!request_id.ok()) return SendError(id, correlation, request_id.status());
    // The sink may have called already; its report is read after this.
    Peer& peer = OwedPeer(id);
    peer.streams[correlation] = {.sink = std::move(sink),
                                 .request_id = *request_id,
                                 .credit = generate.credit,
                                 .deadline = Clock::now() + generate.request.timeout + kDeadlineGrace};
    SendReply(id, correlation, codec::Accepted{.request_id = *request_id});
  }

  void OnCancel(const std::string& id, std::uint64_t target) {
    if (const Stream* stream = FindStream(id, target)) service_->Cancel(stream->request_id);
  }

  void OnCredit(const std::string& id, const codec::Credit& credit) {
    Stream* stream = FindStream(id, credit.target);
    if (stream == nullptr) return;
    stream->credit = std::min(stream->credit + credit.chunks, wire::kMaxCredit);
    FlushSink(*std::shared_ptr<StreamSink>(stream->sink));
  }

  Stream* FindStream(const std::string& id, std::uint64_t correlation) {
    const auto peer = peers_.find(id);
    if (peer == peers_.end()) return nullptr;
    const auto stream = peer->second.streams.find(correlation);
    return stream == peer->second.streams.end() ? nullptr : &stream->second;
  }

  Peer& OwedPeer(const std::string& id) {
    if (peers_.empty()) next_tick_ = Clock::now() + kTick;
    return peers_[id];
  }

  // ---- sending ----

  // Sends what the sink has and the client's credit allows.
  void FlushSink(StreamSink& sink) {
    Stream* stream = FindStream(sink.peer(), sink.correlation());
    if (stream == nullptr || stream->sink.get() != &sink) return;
    StreamSink::Taken taken = sink.Take(stream->credit > 0, draining_);
    if (taken.chunk.has_value()) {
      if (stream->credit > 0) --stream->credit;
      SendReply(sink.peer(), sink.correlation(), *std::move(taken.chunk));
      stream = FindStream(sink.peer(), sink.correlation());  // the client may turn out to be gone
    }
    if (!taken.end.has_value() || stream == nullptr) return;
    const std::shared_ptr<StreamSink> keep = stream->sink;
    peers_[keep->peer()].streams.erase(keep->correlation());
    if (GenerateReply* done = std::get_if<GenerateReply>(&*taken.end)) {
      SendReply(keep->peer(), keep->correlation(), std::move(*done));
    } else {
      SendError(keep->peer(), keep->correlation(), std::get<Status>(*taken.end));
    }
    ForgetIfSettled(keep->peer());
  }

  void SendReply(const std::string& id, std::uint64_t correlation, const codec::Reply& reply) {
    const Result<codec::Frame> frame = codec::EncodeReply(correlation, reply);
    if (frame.ok()) return Send(id, *frame);
    if (Stream* stream = FindStream(id, correlation)) {
      service_->Cancel(stream->request_id);
      stream->sink->Abandon();
      peers_[id].streams.erase(correlation);
    }
    SendError(id, correlation, frame.status());
    ForgetIfSettled(id);
  }

  void SendError(const std::string& id, std::uint64_t correlation, const Status& status) {
    Send(id, codec::EncodeError(correlation, status));
  }

  void Send(const std::string& id, const codec::Frame& frame) {
    const auto found = peers_.find(id);
    if (found != peers_.end() && !found->second.pending.empty()) return Hold(id, frame);
    switch (TrySend(id, frame)) {
      case SendOutcome::kSent:
        if (found != peers_.end()) found->second.last_sent = Clock::now();
        return;
      case SendOutcome::kFull: return Hold(id, frame);
      case SendOutcome::kGone:
        ++dropped_;
        if (found != peers_.end()) LosePeer(id);
        return;
    }
  }

  SendOutcome TrySend(const std::string& id, const codec::Frame& frame) {
    try {
      if (!socket_.send(zmq::buffer(id), zmq::send_flags::sndmore | zmq::send_flags::dontwait)) {
        return SendOutcome::kFull;
      }
      // Once the name is taken, the rest is.
      return socket_.send(zmq::buffer(frame), zmq::send_flags::dontwait) ? SendOutcome::kSent : SendOutcome::kGone;
    } catch (const zmq::error_t& error) {
      if (error.num() == EHOSTUNREACH) return SendOutcome::kGone;
      throw;
    }
  }

  void Hold(const std::string& id, const codec::Frame& frame) {
    Peer& peer = OwedPeer(id);
    if (peer.pending_bytes + frame.size() > kPendingBytesMax) {
      ++dropped_;
      return LosePeer(id);
    }
    if (peer.pending.empty()) ++pending_peers_;
    peer.pending_bytes += frame.size();
    peer.pending.push_back(frame);
  }

  void RetryPending() {
    std::vector<std::string> ids;
    for (const auto& [id, peer] : peers_) {
      if (!peer.pending.empty()) ids.push_back(id);
    }
    for (const std::string& id : ids) {
      Peer& peer = peers_[id];
      SendOutcome outcome = SendOutcome::kSent;
      while (!peer.pending.empty() && (outcome = TrySend(id, peer.pending.front())) == SendOutcome::kSent) {
        peer.pending_bytes -= peer.pending.front().size();
        peer.pending.pop_front();
        peer.last_sent = Clock::now();
      }
      if (outcome == SendOutcome::kGone) {
        LosePeer(id);
        continue;
      }
      if (!peer.pending.empty()) continue;
      --pending_peers_;
      ForgetIfSettled(id);
    }
  }

  // ---- clients that go ----

  void EndStreams(Peer& peer) {
    for (auto& [correlation, stream] : peer.streams) {
      stream.sink->Abandon();
      service_->Cancel(stream.request_id);
    }
    peer.streams.clear();
  }

  void LosePeer(const std::string& id) {
    const auto found = peers_.find(id);
    if (found == peers_.end()) return;
    ++lost_;
    dropped_ += static_cast<std::int64_t>(found->second.pending.size());
    if (!found->second.pending.empty()) --pending_peers_;
    EndStreams(found->second);
    peers_.erase(found);
  }

  void ForgetIfSettled(const std::string& id) {
    const auto found = peers_.find(id);
    if (found != peers_.end() && found->second.streams.empty() && found->second.pending.empty()) peers_.erase(found);
  }

  // Signs of life, which also find clients that are gone; and requests that outlived their timeout.
  void Tick() {
    const Clock::time_point now = Clock::now();
    next_tick_ = now + kTick;
    std::vector<std::string> ids;
    for (const auto& [id, peer] : peers_) ids.push_back(id);
    for (const std::string& id : ids) {
      Peer& peer = peers_[id];
      for (auto it = peer.streams.begin(); it != peer.streams.end();) {
        if (now < it->second.deadline) {
          ++it;
          continue;
        }
        it->second.sink->Abandon();
        service_->Cancel(it->second.request_id);
        it = peer.streams.erase(it);
      }
      if (draining_ && !peer.pending.empty() && now - peer.last_sent > kDrainStuckMax) {
        LosePeer(id);
      } else if (!peer.streams.empty() && peer.pending.empty() && now - peer.last_sent >= kTick) {
        SendReply(id, 0, codec::Pong{});
      } else {
        ForgetIfSettled(id);
      }
    }
  }

  Service* const service_;
  const std::shared_ptr<Mailbox> mailbox_;
  std::string endpoint_;
  std::atomic<bool> stopping_ = false;
  std::atomic<bool> draining_ = false;
  std::atomic<std::int64_t> frames_ = 0;
  std::atomic<std::int64_t> malformed_ = 0;
  std::atomic<std::int64_t> dropped_ = 0;
  std::atomic<std::int64_t> lost_ = 0;
  std::optional<UnixListener> listener_;  // after the socket: its file goes last
  zmq::context_t context_;

  // Io thread.
  zmq::socket_t socket_;
  wire::ReceivedFrame received_;
  std::map<std::string, Peer> peers_;
  std::size_t pending_peers_ = 0;
  Clock::time_point next_tick_;
  bool drain_flushed_ = false;

  std::unique_ptr<UnaryWorker> worker_;
  std::thread io_thread_;
};

}  // namespace

Result<std::unique_ptr<RouterServer>> StartRouterServer(Service* service, const RouterServerOptions& options) {
  try {
    auto server = std::make_unique<ZmqRouterServer>(service);
    KVS_RETURN_IF_ERROR(server->Init(options.endpoint));
    return std::unique_ptr<RouterServer>(std::move(server));
  } catch (const std::exception& error) {
    return Unavailable("cannot listen on " + options.endpoint + ": " + error.what());
  }
}

}  // namespace kvshare::agentd

#include "agentd/server/router_server.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <optional>
#include <thread>
#include <utility>
#include <variant>
#include <zmq.hpp>

#include "agentd/server/client_leases.h"
#include "agentd/server/client_workers.h"
#include "agentd/server/fault_limiter.h"
#include "agentd/server/link_requests.h"
#include "agentd/server/mailbox.h"
#include "agentd/server/memory_link.h"
#include "agentd/server/router_socket.h"
#include "agentd/server/unary.h"
#include "libkvshare/codec/codec.h"
#include "libkvshare/core/endpoint.h"
#include "libkvshare/core/hash.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// What a client that does not read may make us hold besides.
constexpr std::size_t kPendingBytesMax = std::size_t{32} << 20;
constexpr std::size_t kStreamsPerClientMax = 1024;
// For frames, before the outcomes get their turn.
constexpr milliseconds kFramesTime{5};
// Texts up to here the io thread tokenises and renders by itself, for the price of two wake-ups: most take less than a
// millisecond, the worst eleven.
constexpr std::size_t kInlineRequestBytes = 32 << 10;
// Some of their jobs wait for the engine's step, or the disk.
constexpr int kAskingThreads = 4;
// Long texts take no more than one core from the engine.
constexpr int kReadingThreads = 1;
constexpr milliseconds kTick{1000};           // signs of life, deadlines
constexpr milliseconds kRetry{5};             // of clients whose pipe is full; longer while it stays so
constexpr milliseconds kDeadlineGrace{5000};  // the client's own deadline comes first
constexpr milliseconds kDrainStuckMax{5000};
constexpr milliseconds kDrainLinger{2000};

struct Stream {
  std::shared_ptr<StreamSink> sink;
  std::uint64_t request_id = 0;
  std::uint32_t credit = 0;
  bool accepted = false;   // by the service; until then it has no request_id
  bool cancelled = false;  // what has been made already is sent without credit
  Clock::time_point deadline;
};

// A client we owe something, or who has a lease by this way.
struct Peer {
  std::map<std::uint64_t, Stream> streams;  // by correlation id
  std::int64_t answers_due = 0;             // of requests with one reply that were handed on
  std::deque<codec::Frame> pending;         // its pipe was full
  std::size_t pending_bytes = 0;
  Clock::time_point last_sent = Clock::now();
};

// Service::Generate; what throws, such as a prompt there is no memory for, is Internal and ends that request alone.
Result<std::uint64_t> SubmitTo(Service& service, const GenerateRequest& request,
                               const std::shared_ptr<StreamSink>& sink) {
  try {
    return service.Generate(request, sink);
  } catch (const std::exception& error) {
    return Internal(std::string("the request failed: ") + error.what());
  }
}

class ZmqRouterServer final : public RouterServer {
 public:
  ZmqRouterServer(Service* service, std::function<void()> on_drain)
      : service_(service), on_drain_(std::move(on_drain)), mailbox_(std::make_shared<Mailbox>()) {}

  ~ZmqRouterServer() override {
    stopping_ = true;
    Join();
  }

  // May throw zmq::error_t and std::system_error; StartRouterServer catches.
  Status Init(const std::string& text) {
    KVS_ASSIGN_OR_RETURN(const Endpoint endpoint, ParseEndpoint(text, EndpointUse::kListen));
    if (!mailbox_->ok()) return Unavailable("this process has no descriptor left");
    KVS_RETURN_IF_ERROR(socket_.Bind(endpoint, text));
    const auto wake = [this] { mailbox_->Wake(); };
    asking_ = std::make_unique<ClientWorkers>(kAskingThreads, wake);
    reading_ = std::make_unique<ClientWorkers>(kReadingThreads, wake);
    link_requests_ = std::make_unique<LinkRequests>(service_, &leases_, asking_.get(), &draining_);
    if (endpoint.transport == Transport::kIpc) {
      local_ = true;
      OpenMemoryLink(endpoint.path);
    } else {
      memory_error_ = FailedPrecondition("KV memory is shared with clients of an ipc endpoint only");
    }
    io_thread_ = std::thread([this] { IoThread(); });
    return OkStatus();
  }

  void DrainAndStop() override {
    draining_ = true;
    Join();
  }

  std::string endpoint() const override { return socket_.endpoint(); }

  std::string memory_socket() const override { return memory_socket_; }
  Status memory_error() const override { return memory_error_; }

  RouterServerCounters counters() const override {
    const MemoryLinkCounters memory = link_ == nullptr ? MemoryLinkCounters{} : link_->counters();
    return {.frames = frames_ + link_requests_->frames(),
            .malformed_frames = malformed_ + link_requests_->malformed(),
            .replies_dropped = dropped_,
            .clients_lost = lost_,
            .client_leases = leases_.held(),
            .leases_dropped = leases_.dropped(),
            .memory_granted = memory.granted,
            .memory_refused = memory.refused};
  }

 private:
  // Without it the daemon serves all the same: leases then are metadata.
  void OpenMemoryLink(const std::string& ipc_path) {
    shared_ = service_->Shared();
    Result<std::unique_ptr<MemoryLink>> link =
        MemoryLink::Open(ipc_path, shared_, [this](const std::string& peer) { return link_requests_->NewPeer(peer); });
    if (!link.ok()) {
      memory_error_ = link.status();
      return;
    }
    link_ = *std::move(link);
    memory_socket_ = link_->path();
    link_->Start();
  }

  void Join() {
    if (!io_thread_.joinable()) return;
    mailbox_->Wake();
    io_thread_.join();
    if (link_ != nullptr) link_->Stop();
    asking_.reset();
    reading_.reset();
    // Given away meanwhile, to nobody.
    const Mailbox::Contents left = mailbox_->TakeAll();
    for (const Answer& answer : left.answers) {
      if (answer.lease.has_value()) (void)service_->Release(answer.lease->id);
    }
    for (const Submitted& submitted : left.submitted) {
      if (submitted.request_id.ok()) service_->Cancel(*submitted.request_id);
    }
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
    for (const std::string& id : leases_.Peers()) ReleaseAll(id);
    try {
      socket_.Close(draining_ && !stopping_ ? kDrainLinger : milliseconds(0));
    } catch (const std::exception&) {
      // Closing an open socket cannot fail; a closed one needs nothing.
    }
  }

  bool Step() {
    std::array<zmq::pollitem_t, 2> items{
        {{socket_.handle(), 0, ZMQ_POLLIN, 0}, {nullptr, mailbox_->wake_fd(), ZMQ_POLLIN, 0}}};
    if (const std::chrono::nanoseconds pause = brake_.HoldsFor(Clock::now()); pause.count() > 0) {
      const auto rounded = std::chrono::ceil<milliseconds>(pause);
      const milliseconds timeout = PollTimeout();
      zmq::poll(&items[1], 1, timeout < milliseconds(0) ? rounded : std::min(timeout, rounded));
    } else {
      zmq::poll(items.data(), items.size(), PollTimeout());
      const Clock::time_point until = Clock::now() + kFramesTime;
      bool more = true;
      while (more && !brake_.holds() && Clock::now() < until) more = ReceiveOne();
    }
    const Mailbox::Contents contents = mailbox_->TakeAll();
    for (const Answer& answer : contents.answers) SendAnswer(answer);
    for (const Submitted& submitted : contents.submitted) OnSubmitted(submitted);
    for (const std::shared_ptr<StreamSink>& sink : contents.ready) FlushSink(*sink);
    if (pending_peers_ > 0 && Clock::now() >= next_retry_) RetryPending();
    if (!peers_.empty() && Clock::now() >= next_tick_) Tick();
    // After TakeAll, which may have taken the wake-up that came with it.
    const bool drained = draining_ && Drained();
    return !stopping_ && !drained;
  }

  milliseconds PollTimeout() const {
    if (peers_.empty()) return milliseconds(-1);
    const Clock::time_point next = pending_peers_ > 0 ? std::min(next_tick_, next_retry_) : next_tick_;
    const auto left = std::chrono::duration_cast<milliseconds>(next - Clock::now()) + milliseconds(1);
    return std::clamp(left, milliseconds(0), kTick);
  }

  // The last answers of the workers are posted before they call themselves idle.
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
    // Leases end with the daemon; a client finds so at its next call.
    for (const std::string& id : leases_.Peers()) ReleaseAll(id);
    std::vector<std::string> ids;
    for (const auto& [id, peer] : peers_) ids.push_back(id);
    for (const std::string& id : ids) ForgetIfSettled(id);
    const bool asking_idle = asking_->IdleOrWake();
    const bool reading_idle = reading_->IdleOrWake();
    if (!peers_.empty() || !asking_idle || !reading_idle) return false;
    const Mailbox::Contents last = mailbox_->TakeAll();
    for (const Answer& answer : last.answers) SendAnswer(answer);
    for (const Submitted& submitted : last.submitted) OnSubmitted(submitted);
    return peers_.empty();
  }

  // ---- receiving ----

  // False when nothing is there.
  bool ReceiveOne() {
    RouterSocket::Message message;
    if (!socket_.Receive(message)) return false;
    ++frames_;
    if (!message.whole) {
      CountMalformed();
    } else {
      OnFrame(message.peer, {message.frame.data<std::uint8_t>(), message.frame.size()});
    }
    return true;
  }

  void OnFrame(const std::string& peer, std::span<const std::uint8_t> bytes) {
    const wire::FrameFault fault = received_.Load(bytes, wire::FrameKind::kRequest);
    const std::uint64_t correlation = received_.header().correlation;
    if (fault != wire::FrameFault::kNone) {
      CountMalformed();
      if (!wire::CorrelationReadable(fault) || !faults_.MayAnswer(peer, Clock::now())) return;
      return SendError(peer, correlation, codec::FaultStatus(fault, received_.header(), "client"));
    }
    Result<codec::Request> request = codec::DecodeRequest(*received_.request());
    if (!request.ok()) {
      CountMalformed();
      if (!faults_.MayAnswer(peer, Clock::now())) return;
      return SendError(peer, correlation, request.status());
    }
    if (auto* generate = std::get_if<codec::Generate>(&*request))
      return OnGenerate(peer, correlation, std::move(*generate), bytes.size());
    if (const auto* cancel = std::get_if<codec::Cancel>(&*request)) return OnCancel(peer, cancel->target);
    if (const auto* credit = std::get_if<codec::Credit>(&*request)) return OnCredit(peer, *credit);
    if (std::holds_alternative<codec::Hello>(*request)) return OnHello(peer, correlation);
    if (std::holds_alternative<codec::Drain>(*request)) return OnDrain(peer, correlation);
    if (const auto* release = std::get_if<codec::Release>(&*request)) return OnRelease(peer, correlation, *release);
    OnUnary(peer, correlation, *std::move(request), bytes.size());
  }

  void CountMalformed() {
    ++malformed_;
    brake_.OnMalformed(Clock::now());
  }

  void OnHello(const std::string& peer, std::uint64_t correlation) {
    codec::HelloAck ack{.info = service_->Info(),
                        .max_frame_bytes = wire::kMaxFrameBytes,
                        .limits = {.text_bytes = wire::kMaxTextBytes,
                                   .tokens = wire::kMaxTokens,
                                   .name_bytes = wire::kMaxNameBytes,
                                   .streams = kStreamsPerClientMax},
                        .protocol_version = wire::kProtocolVersion,
                        .hash_version = kHashVersion,
                        .layout = service_->Shared().layout};
    if (link_ != nullptr) {
      ack.memory_socket = link_->path();
      ack.memory_ticket = link_->TicketFor(peer);
    }
    SendReply(peer, correlation, ack);
  }

  void OnDrain(const std::string& peer, std::uint64_t correlation) {
    if (!local_) {
      return SendError(peer, correlation,
                       FailedPrecondition("a daemon is drained over its ipc endpoint, or by SIGTERM"));
    }
    if (on_drain_ == nullptr) {
      return SendError(peer, correlation, FailedPrecondition("this server is not drained by its clients"));
    }
    SendReply(peer, correlation, codec::Ack{});
    if (!std::exchange(drain_asked_, true)) on_drain_();
  }

  void OnUnary(const std::string& peer, std::uint64_t correlation, codec::Request request, std::size_t bytes) {
    const bool greeting = std::holds_alternative<codec::Hello>(request) || std::holds_alternative<codec::Ping>(request);
    if (draining_ && !greeting) return SendError(peer, correlation, DrainingStatus());
    // All others may wait for the engine's step, or the disk.
    const bool at_once = greeting || std::holds_alternative<codec::Tokenize>(request) ||
                         std::holds_alternative<codec::Detokenize>(request) ||
                         std::holds_alternative<RenderRequest>(request);
    if (at_once && bytes <= kInlineRequestBytes) {
      return Send(peer, AnswerUnary(*service_, correlation, request).frame);
    }
    if (std::holds_alternative<AcquireRequest>(request)) {
      const Status may = leases_.MayLease(peer);
      if (!may.ok()) return SendError(peer, correlation, may);
    }
    const auto held = std::make_shared<codec::Request>(std::move(request));
    ClientWorkers& workers = at_once ? *reading_ : *asking_;
    const Status submitted = workers.Submit(peer, bytes, [this, peer, correlation, held] {
      UnaryAnswer answer = AnswerUnary(*service_, correlation, *held);
      if (correlation != 0) {
        mailbox_->PostAnswer({peer, std::move(answer.frame), answer.lease});
      } else if (answer.lease.has_value()) {
        (void)service_->Release(answer.lease->id);  // asked for without a way to hear of it
      }
    });
    if (!submitted.ok()) return SendError(peer, correlation, submitted);
    if (correlation != 0) ++OwedPeer(peer).answers_due;
  }

  void OnGenerate(const std::string& id, std::uint64_t correlation, codec::Generate generate, std::size_t bytes) {
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
    Stream& stream = OwedPeer(id).streams[correlation];
    stream = {
        .sink = sink, .credit = generate.credit, .deadline = Clock::now() + generate.request.timeout + kDeadlineGrace};
    if (bytes <= kInlineRequestBytes) return OnSubmitted({sink, SubmitTo(*service_, generate.request, sink)});
    const auto held = std::make_shared<GenerateRequest>(std::move(generate.request));
    const Status submitted = reading_->Submit(id, bytes, [this, sink, held] {
      mailbox_->PostSubmitted({sink, SubmitTo(*service_, *held, sink)});
    });
    if (!submitted.ok()) OnSubmitted({sink, submitted});
  }

  void OnSubmitted(const Submitted& submitted) {
    const std::string id = submitted.sink->peer();
    const std::uint64_t correlation = submitted.sink->correlation();
    Stream* stream = FindStream(id, correlation);
    if (stream == nullptr || stream->sink != submitted.sink) {
      // Its client has gone meanwhile, or its deadline has passed.
      if (submitted.request_id.ok()) service_->Cancel(*submitted.request_id);
      return;
    }
    if (!submitted.request_id.ok()) {
      peers_[id].streams.erase(correlation);
      SendError(id, correlation, submitted.request_id.status());
      return ForgetIfSettled(id);
    }
    stream->accepted = true;
    stream->request_id = *submitted.request_id;
    if (stream->cancelled) service_->Cancel(stream->request_id);
    SendReply(id, correlation, codec::Accepted{.request_id = stream->request_id});
    FlushSink(*submitted.sink);  // which may have called already
  }

  void OnCancel(const std::string& id, std::uint64_t target) {
    Stream* stream = FindStream(id, target);
    if (stream == nullptr) return;
    stream->cancelled = true;
    if (!stream->accepted) return;  // as soon as it is
    service_->Cancel(stream->request_id);
    // The service may have ended it already, and only credit was missing.
    FlushSink(*std::shared_ptr<StreamSink>(stream->sink));
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
    // So that the next tick comes in time where none was due.
    if (peers_.empty()) next_tick_ = Clock::now() + kTick;
    return peers_[id];
  }

  // ---- leases: each is the connection's that asked for it ----

  void SendAnswer(const Answer& answer) {
    if (const auto peer = peers_.find(answer.peer); peer != peers_.end() && peer->second.answers_due > 0) {
      --peer->second.answers_due;
    }
    if (answer.lease.has_value()) {
      OwedPeer(answer.peer);
      leases_.Add(answer.peer, *answer.lease);
    }
    Send(answer.peer, answer.frame);  // which finds out when the peer has gone, and then releases
    ForgetIfSettled(answer.peer);
  }

  void OnRelease(const std::string& id, std::uint64_t correlation, const codec::Release& release) {
    if (!leases_.Remove(id, release.lease)) {
      if (correlation != 0) SendError(id, correlation, NotHeldStatus(release.lease));
      return;
    }
    asking_->SubmitFirst([this, id, correlation, release] {
      UnaryAnswer answer = AnswerUnary(*service_, correlation, release);
      if (correlation != 0) mailbox_->PostAnswer({id, std::move(answer.frame), std::nullopt});
    });
    if (correlation != 0) ++OwedPeer(id).answers_due;
    ForgetIfSettled(id);
  }

  void ReleaseAll(const std::string& id) {
    for (const std::uint64_t lease : leases_.TakeAll(id)) {
      asking_->SubmitFirst([this, lease] { (void)service_->Release(lease); });
    }
  }

  // ---- sending ----

  // Sends what the sink has and the client's credit allows.
  void FlushSink(StreamSink& sink) {
    Stream* stream = FindStream(sink.peer(), sink.correlation());
    if (stream == nullptr || stream->sink.get() != &sink || !stream->accepted) return;
    StreamSink::Taken taken = sink.Take(stream->credit > 0, draining_ || stream->cancelled);
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
    switch (socket_.TrySend(id, frame)) {
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

  void Hold(const std::string& id, const codec::Frame& frame) {
    Peer& peer = OwedPeer(id);
    if (peer.pending_bytes + frame.size() > kPendingBytesMax) {
      ++dropped_;
      LosePeer(id);
      // When it reads again it must know that nothing more comes of all it has asked.
      return Hold(id, codec::EncodeError(0, Unavailable("the client did not read its answers, of which " +
                                                        std::to_string(kPendingBytesMax >> 20) +
                                                        " MiB waited; all of its requests have ended, ask again")));
    }
    if (peer.pending.empty()) {
      ++pending_peers_;
      SetRetry(kRetry);  // also where another has been stuck for long
    }
    peer.pending_bytes += frame.size();
    peer.pending.push_back(frame);
  }

  void SetRetry(milliseconds pause) {
    retry_ = std::min(pause, kTick);
    next_retry_ = Clock::now() + retry_;
  }

  void RetryPending() {
    bool sent = false;
    std::vector<std::string> ids;
    for (const auto& [id, peer] : peers_) {
      if (!peer.pending.empty()) ids.push_back(id);
    }
    for (const std::string& id : ids) {
      Peer& peer = peers_[id];
      SendOutcome outcome = SendOutcome::kSent;
      while (!peer.pending.empty() && (outcome = socket_.TrySend(id, peer.pending.front())) == SendOutcome::kSent) {
        peer.pending_bytes -= peer.pending.front().size();
        peer.pending.pop_front();
        peer.last_sent = Clock::now();
        sent = true;
      }
      if (outcome == SendOutcome::kGone) {
        LosePeer(id);
        continue;
      }
      if (!peer.pending.empty()) continue;
      --pending_peers_;
      ForgetIfSettled(id);
    }
    SetRetry(sent ? kRetry : 2 * retry_);
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
    ReleaseAll(id);
    asking_->Drop(id);
    reading_->Drop(id);
    peers_.erase(found);
  }

  void ForgetIfSettled(const std::string& id) {
    const auto found = peers_.find(id);
    if (found == peers_.end()) return;
    const Peer& peer = found->second;
    if (peer.streams.empty() && peer.answers_due == 0 && peer.pending.empty() && !leases_.HoldsAny(id)) {
      peers_.erase(found);
    }
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
      } else if (peer.pending.empty() && now - peer.last_sent >= kTick &&
                 (!peer.streams.empty() || peer.answers_due > 0 || leases_.HoldsAny(id))) {
        SendReply(id, 0, codec::Pong{});
      } else {
        ForgetIfSettled(id);
      }
    }
  }

  Service* const service_;
  const std::function<void()> on_drain_;
  const std::shared_ptr<Mailbox> mailbox_;
  bool local_ = false;  // on an ipc endpoint
  SharedPages shared_;
  std::string memory_socket_;
  Status memory_error_;
  std::atomic<bool> stopping_ = false;
  std::atomic<bool> draining_ = false;
  std::atomic<std::int64_t> frames_ = 0;
  std::atomic<std::int64_t> malformed_ = 0;
  std::atomic<std::int64_t> dropped_ = 0;
  std::atomic<std::int64_t> lost_ = 0;

  // Io thread.
  RouterSocket socket_;
  wire::ReceivedFrame received_;
  std::map<std::string, Peer> peers_;
  std::size_t pending_peers_ = 0;
  milliseconds retry_ = kRetry;
  Clock::time_point next_retry_;
  Clock::time_point next_tick_;
  bool drain_flushed_ = false;
  bool drain_asked_ = false;
  FaultLimiter faults_;
  FloodBrake brake_;

  ClientLeases leases_;
  std::unique_ptr<ClientWorkers> asking_;   // the service for something
  std::unique_ptr<ClientWorkers> reading_;  // long texts
  std::unique_ptr<LinkRequests> link_requests_;
  std::unique_ptr<MemoryLink> link_;
  std::thread io_thread_;
};

}  // namespace

Result<std::unique_ptr<RouterServer>> StartRouterServer(Service* service, const RouterServerOptions& options) {
  try {
    auto server = std::make_unique<ZmqRouterServer>(service, options.on_drain);
    KVS_RETURN_IF_ERROR(server->Init(options.endpoint));
    return std::unique_ptr<RouterServer>(std::move(server));
  } catch (const std::exception& error) {
    return Unavailable("cannot listen on " + options.endpoint + ": " + error.what());
  }
}

}  // namespace kvshare::agentd

// The Client that talks to a daemon.
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <variant>

#include "kvshare/client.h"
#include "libkvshare/client/connection.h"
#include "libkvshare/client/mapped_pages.h"
#include "libkvshare/client/remote_lease.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare {
namespace {

using client_internal::Call;
using client_internal::CallKind;
using client_internal::Clock;
using client_internal::Connection;
using client_internal::MappedPages;
using std::chrono::milliseconds;

// Chunks that may be on their way or waiting to be read. A reader that keeps up never exhausts it (it grants the next
// half after each half); one that does not makes the daemon put the tokens that follow into one larger chunk.
constexpr std::uint32_t kCreditWindow = 64;
// Accepted, the chunks, the rest that a draining daemon sends without credit, and Done.
constexpr std::size_t kStreamInboxMax = kCreditWindow + 3;
// A daemon that could not hand over its memory in time is asked again after this.
constexpr milliseconds kClaimAgain{1000};

milliseconds ClampTimeout(milliseconds timeout) { return std::min(timeout, milliseconds(wire::kMaxTimeoutMs)); }

Status UnexpectedReply() { return Internal("the daemon answered with another kind of message than was asked for"); }

class ZmqTokenStream final : public TokenStream {
 public:
  ZmqTokenStream(Connection* connection, std::shared_ptr<Call> call, Clock::time_point deadline)
      : connection_(connection), call_(std::move(call)), deadline_(deadline) {}

  ~ZmqTokenStream() override {
    // A child of fork() has a copy of the object, and the parent's request goes on.
    if (!done_ && end_.ok() && owner_ == ::getpid()) Cancel();
  }

  Result<std::optional<TokenChunk>> Next() override {
    if (done_) return std::optional<TokenChunk>();
    if (!end_.ok()) return end_;
    Result<codec::Reply> reply = connection_->Next(*call_, deadline_);
    if (!reply.ok()) {
      // The daemon has ended it already, unless it is the deadline.
      if (reply.status().code() == StatusCode::kDeadlineExceeded) {
        Cancel();
        end_ = DeadlineExceeded("the request's timeout has passed; it was cancelled");
      } else {
        end_ = reply.status();
        connection_->Forget(*call_);
      }
      return end_;
    }
    if (TokenChunk* chunk = std::get_if<TokenChunk>(&*reply)) {
      if (++consumed_ == kCreditWindow / 2) {
        connection_->Post(codec::Credit{.target = call_->correlation, .chunks = consumed_});
        consumed_ = 0;
      }
      return std::optional<TokenChunk>(std::move(*chunk));
    }
    if (GenerateReply* done = std::get_if<GenerateReply>(&*reply)) {
      reply_ = std::move(*done);
      done_ = true;
      return std::optional<TokenChunk>();
    }
    Cancel();
    end_ = UnexpectedReply();
    return end_;
  }

  void Cancel() override {
    if (done_ || !end_.ok()) return;
    end_ = Cancelled("the request was cancelled by its caller");
    connection_->Post(codec::Cancel{.target = call_->correlation});
    connection_->Forget(*call_);
  }

  const GenerateReply& reply() const override {
    KVS_CHECK(done_);
    return reply_;
  }

 private:
  Connection* const connection_;
  const std::shared_ptr<Call> call_;
  const Clock::time_point deadline_;
  const pid_t owner_ = ::getpid();
  std::uint32_t consumed_ = 0;
  bool done_ = false;
  Status end_;
  GenerateReply reply_;
};

class ZmqClient final : public Client {
 public:
  ZmqClient(std::string endpoint, std::shared_ptr<Connection> connection, milliseconds timeout)
      : endpoint_(std::move(endpoint)), timeout_(timeout), connection_(std::move(connection)) {}

  ~ZmqClient() override {
    if (owner_ != ::getpid()) {
      Leak();
    } else if (mapped_.pages != nullptr) {
      // Leases that outlive the client have ended: their memory stays, the daemon's pages need not.
      mapped_.pages->CloseLink();
    }
  }

  Result<ServerInfo> Ping(milliseconds timeout) override {
    const Clock::time_point deadline = Clock::now() + ClampTimeout(timeout);
    while (true) {
      Result<codec::Pong> pong = Ask<codec::Pong>(codec::Ping{}, deadline);
      if (pong.ok()) {
        if (!pong->info.has_value()) return UnexpectedReply();
        return *std::move(pong->info);
      }
      const StatusCode code = pong.status().code();
      if (code == StatusCode::kDeadlineExceeded) return Unavailable(pong.status().message());
      // The daemon went while it was asked: the next one there may answer.
      if (code != StatusCode::kUnavailable || Clock::now() >= deadline) return pong.status();
    }
  }

  Result<std::vector<TokenId>> Tokenize(std::string_view text) override {
    KVS_ASSIGN_OR_RETURN(codec::Tokens reply, Ask<codec::Tokens>(codec::Tokenize{.text = std::string(text)}));
    return std::move(reply.ids);
  }

  Result<std::string> Detokenize(std::span<const TokenId> ids) override {
    KVS_ASSIGN_OR_RETURN(codec::Text reply, Ask<codec::Text>(codec::Detokenize{.ids = {ids.begin(), ids.end()}}));
    return std::move(reply.text);
  }

  Result<RenderReply> Render(const RenderRequest& request) override { return Ask<RenderReply>(request); }
  Result<Match> Lookup(const LookupRequest& request) override {
    const Clock::time_point deadline = Clock::now() + timeout_;
    KVS_ASSIGN_OR_RETURN(const std::shared_ptr<Connection> connection, Link());
    KVS_ASSIGN_OR_RETURN(const Mapped mapped, MappedFor(*connection, deadline));
    return AskBoth<Match>(*connection, mapped, request, deadline, nullptr);
  }
  Result<PinInfo> Pin(const PinRequest& request) override { return Ask<PinInfo>(request); }
  Status Unpin(const std::string& key) override { return Ask<codec::Ack>(codec::Unpin{.key = key}).status(); }
  Status Drain() override { return Ask<codec::Ack>(codec::Drain{}).status(); }

  Result<std::int64_t> Prefetch(const LookupRequest& request) override {
    KVS_ASSIGN_OR_RETURN(const codec::Count reply, Ask<codec::Count>(codec::Prefetch{.lookup = request}));
    return reply.count;
  }

  Result<std::int64_t> Evict(const EvictRequest& request) override {
    KVS_ASSIGN_OR_RETURN(const codec::Count reply, Ask<codec::Count>(request));
    return reply.count;
  }

  Result<std::vector<Entry>> Entries(const EntriesRequest& request) override {
    KVS_ASSIGN_OR_RETURN(codec::EntryList reply, Ask<codec::EntryList>(request));
    return std::move(reply.entries);
  }

  Result<Lease> Acquire(const AcquireRequest& request) override {
    const Clock::time_point deadline = Clock::now() + timeout_;
    while (true) {
      // Before the lease is: then it is this process's from its first moment, and ends with it.
      KVS_ASSIGN_OR_RETURN(const std::shared_ptr<Connection> connection, Link());
      KVS_ASSIGN_OR_RETURN(const Mapped mapped, MappedFor(*connection, deadline));
      std::uint64_t link = mapped.link;
      KVS_ASSIGN_OR_RETURN(LeaseInfo info, AskBoth<LeaseInfo>(*connection, mapped, request, deadline, &link));
      if (info.tokens <= 0) return Lease();
      if (link == mapped.link) {
        return Lease(client_internal::NewRemoteLease({.info = std::move(info),
                                                      .connection = connection,
                                                      .link = link,
                                                      .pages = mapped.pages,
                                                      .not_mapped = mapped.error,
                                                      .timeout = timeout_}));
      }
      // Another daemon gave this lease than the one whose memory is mapped.
      connection->Post(codec::Release{.lease = info.id}, link);
      if (Clock::now() >= deadline) return Unavailable("the daemon at " + endpoint_ + " was replaced meanwhile");
    }
  }

  Result<Explanation> Explain(const ExplainRequest& request) override { return Ask<Explanation>(request); }
  Result<Stats> GetStats() override { return Ask<Stats>(codec::GetStats{}); }

  Result<std::unique_ptr<TokenStream>> Generate(const GenerateRequest& request) override {
    codec::Generate message{.request = request, .credit = kCreditWindow};
    message.request.timeout = ClampTimeout(request.timeout);
    KVS_ASSIGN_OR_RETURN(const std::shared_ptr<Connection> connection, Link());
    const Clock::time_point start = Clock::now();
    const Clock::time_point deadline = start + message.request.timeout;
    KVS_ASSIGN_OR_RETURN(std::shared_ptr<Call> call,
                         connection->Start(codec::Request(std::move(message)), CallKind::kStream, kStreamInboxMax));
    // A generation may take long; finding the daemon may not.
    const bool sent = connection->WaitSent(*call, std::min(deadline, start + timeout_));
    Result<codec::Reply> reply = connection->Next(*call, sent ? deadline : Clock::now());
    if (reply.ok() && std::holds_alternative<codec::Accepted>(*reply)) {
      return std::unique_ptr<TokenStream>(new ZmqTokenStream(connection.get(), std::move(call), deadline));
    }
    if (reply.ok() || reply.status().code() == StatusCode::kDeadlineExceeded) {
      connection->Post(codec::Cancel{.target = call->correlation});
    }
    connection->Forget(*call);
    return reply.ok() ? UnexpectedReply() : reply.status();
  }

 private:
  template <typename T>
  Result<T> Ask(const codec::Request& request) {
    return Ask<T>(request, Clock::now() + timeout_);
  }

  template <typename T>
  Result<T> Ask(const codec::Request& request, Clock::time_point deadline) {
    KVS_ASSIGN_OR_RETURN(const std::shared_ptr<Connection> connection, Link());
    return AskOn<T>(*connection, request, deadline);
  }

  // *link: which link the answer came by.
  template <typename T>
  static Result<T> AskOn(Connection& connection, const codec::Request& request, Clock::time_point deadline,
                         std::uint64_t* link = nullptr) {
    KVS_ASSIGN_OR_RETURN(const std::shared_ptr<Call> call,
                         connection.Start(request, CallKind::kUnary, /*inbox_max=*/1));
    Result<codec::Reply> reply = connection.Next(*call, deadline);
    connection.Forget(*call);
    if (link != nullptr) *link = call->link;
    return AnswerOf<T>(std::move(reply));
  }

  template <typename T>
  static Result<T> AnswerOf(Result<codec::Reply> reply) {
    if (!reply.ok()) return reply.status();
    if (const Status* error = std::get_if<Status>(&*reply)) return *error;
    T* answer = std::get_if<T>(&*reply);
    if (answer == nullptr) return UnexpectedReply();
    return std::move(*answer);
  }

  struct Mapped {
    std::uint64_t link = 0;
    std::shared_ptr<MappedPages> pages;  // null: see error
    Status error;
    Clock::time_point claim_again = Clock::time_point::max();
  };

  // Requires: mu_ held.
  bool IsMapped(std::uint64_t link) const {
    return link != 0 && mapped_.link == link && Clock::now() < mapped_.claim_again;
  }

  // On the mapped memory's own socket where that is free, else by ZeroMQ.
  template <typename T>
  static Result<T> AskBoth(Connection& connection, const Mapped& mapped, const codec::Request& request,
                           Clock::time_point deadline, std::uint64_t* link) {
    if (mapped.pages != nullptr) {
      if (std::optional<Result<codec::Reply>> reply = mapped.pages->Ask(request, deadline)) {
        return AnswerOf<T>(*std::move(reply));
      }
    }
    return AskOn<T>(connection, request, deadline, link);
  }

  // After fork() the parent's connection is of no use here, not even to be closed: its thread is not in this process.
  // The child leaves it where it is and connects anew.
  Result<std::shared_ptr<Connection>> Link() {
    const std::lock_guard lock(mu_);
    if (owner_ == ::getpid()) return connection_;
    KVS_ASSIGN_OR_RETURN(std::unique_ptr<Connection> connection, Connection::Open(endpoint_));
    Leak();
    connection_ = std::move(connection);
    owner_ = ::getpid();
    return connection_;
  }

  void Leak() {
    static_cast<void>(new std::shared_ptr<Connection>(std::move(connection_)));
    mapped_ = {};  // only memory and a descriptor, and both are this process's own
  }

  // The memory of the daemon that is there now; claimed once for each link, or again where it was not there in time.
  Result<Mapped> MappedFor(Connection& connection, Clock::time_point deadline) {
    {
      const std::lock_guard lock(mu_);
      if (IsMapped(connection.link())) return mapped_;
    }
    KVS_ASSIGN_OR_RETURN(const client_internal::Greeting greeting, connection.WaitGreeting(deadline));
    const std::lock_guard claiming(claim_mu_);  // one claim for each link, and no other call waits for it
    {
      const std::lock_guard lock(mu_);
      if (IsMapped(greeting.link)) return mapped_;
    }
    Mapped mapped{.link = greeting.link};
    if (greeting.ack.memory_socket.empty()) {
      mapped.error = FailedPrecondition("the daemon at " + endpoint_ +
                                        " shares no memory: leases are read over an ipc endpoint, from CPU memory");
    } else {
      Result<std::shared_ptr<MappedPages>> pages =
          MappedPages::Claim(greeting.ack.memory_socket, greeting.ack.memory_ticket, deadline);
      if (pages.ok()) {
        mapped.pages = *std::move(pages);
      } else {
        mapped.error = pages.status();
        if (pages.status().code() == StatusCode::kUnavailable) mapped.claim_again = Clock::now() + kClaimAgain;
      }
    }
    const std::lock_guard lock(mu_);
    mapped_ = mapped;
    return mapped;
  }

  const std::string endpoint_;
  const milliseconds timeout_;
  std::mutex claim_mu_;
  std::mutex mu_;                           // guards what follows; held for moments
  std::shared_ptr<Connection> connection_;  // shared with leases, which tell it of their end if it is still there
  pid_t owner_ = ::getpid();
  Mapped mapped_;
};

}  // namespace

Result<std::unique_ptr<Client>> Connect(const ClientOptions& options) {
  KVS_RETURN_IF_ERROR(ValidateEndpoint(options.endpoint));
  KVS_ASSIGN_OR_RETURN(std::unique_ptr<Connection> connection, Connection::Open(options.endpoint));
  return std::unique_ptr<Client>(new ZmqClient(options.endpoint, std::move(connection), ClampTimeout(options.timeout)));
}

}  // namespace kvshare

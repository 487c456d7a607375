// The Client that talks to a daemon.
#include <algorithm>
#include <string>
#include <utility>
#include <variant>

#include "kvshare/client.h"
#include "libkvshare/client/connection.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare {
namespace {

using client_internal::Call;
using client_internal::CallKind;
using client_internal::Clock;
using client_internal::Connection;
using std::chrono::milliseconds;

// Chunks that may be on their way or waiting to be read. A reader that keeps up never exhausts it (it grants the next
// half after each half); one that does not makes the daemon put the tokens that follow into one larger chunk.
constexpr std::uint32_t kCreditWindow = 64;
// Accepted, the chunks, and Done.
constexpr std::size_t kStreamInboxMax = kCreditWindow + 2;

milliseconds ClampTimeout(milliseconds timeout) { return std::min(timeout, milliseconds(wire::kMaxTimeoutMs)); }

Status UnexpectedReply() { return Internal("the daemon answered with another kind of message than was asked for"); }

class ZmqTokenStream final : public TokenStream {
 public:
  ZmqTokenStream(Connection* connection, std::shared_ptr<Call> call, Clock::time_point deadline)
      : connection_(connection), call_(std::move(call)), deadline_(deadline) {}

  ~ZmqTokenStream() override {
    if (!done_ && end_.ok()) Cancel();
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
  std::uint32_t consumed_ = 0;
  bool done_ = false;
  Status end_;
  GenerateReply reply_;
};

class ZmqClient final : public Client {
 public:
  ZmqClient(std::unique_ptr<Connection> connection, milliseconds timeout)
      : connection_(std::move(connection)), timeout_(timeout) {}

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
  Result<Explanation> Explain(const ExplainRequest& request) override { return Ask<Explanation>(request); }
  Result<Stats> GetStats() override { return Ask<Stats>(codec::GetStats{}); }

  Result<std::unique_ptr<TokenStream>> Generate(const GenerateRequest& request) override {
    codec::Generate message{.request = request, .credit = kCreditWindow};
    message.request.timeout = ClampTimeout(request.timeout);
    const Clock::time_point start = Clock::now();
    const Clock::time_point deadline = start + message.request.timeout;
    KVS_ASSIGN_OR_RETURN(std::shared_ptr<Call> call,
                         connection_->Start(codec::Request(std::move(message)), CallKind::kStream, kStreamInboxMax));
    // A generation may take long; finding the daemon may not.
    const bool sent = connection_->WaitSent(*call, std::min(deadline, start + timeout_));
    Result<codec::Reply> reply = connection_->Next(*call, sent ? deadline : Clock::now());
    if (reply.ok() && std::holds_alternative<codec::Accepted>(*reply)) {
      return std::unique_ptr<TokenStream>(new ZmqTokenStream(connection_.get(), std::move(call), deadline));
    }
    if (reply.ok() || reply.status().code() == StatusCode::kDeadlineExceeded) {
      connection_->Post(codec::Cancel{.target = call->correlation});
    }
    connection_->Forget(*call);
    return reply.ok() ? UnexpectedReply() : reply.status();
  }

 private:
  template <typename T>
  Result<T> Ask(const codec::Request& request) {
    return Ask<T>(request, Clock::now() + timeout_);
  }

  template <typename T>
  Result<T> Ask(const codec::Request& request, Clock::time_point deadline) {
    KVS_ASSIGN_OR_RETURN(const std::shared_ptr<Call> call,
                         connection_->Start(request, CallKind::kUnary, /*inbox_max=*/1));
    Result<codec::Reply> reply = connection_->Next(*call, deadline);
    connection_->Forget(*call);
    if (!reply.ok()) return reply.status();
    T* answer = std::get_if<T>(&*reply);
    if (answer == nullptr) return UnexpectedReply();
    return std::move(*answer);
  }

  const std::unique_ptr<Connection> connection_;
  const milliseconds timeout_;
};

}  // namespace

Result<std::unique_ptr<Client>> Connect(const ClientOptions& options) {
  KVS_RETURN_IF_ERROR(ValidateEndpoint(options.endpoint));
  KVS_ASSIGN_OR_RETURN(std::unique_ptr<Connection> connection, Connection::Open(options.endpoint));
  return std::unique_ptr<Client>(new ZmqClient(std::move(connection), ClampTimeout(options.timeout)));
}

}  // namespace kvshare

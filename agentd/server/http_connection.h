// One HTTP connection's socket, and the answer written to it.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

#include "agentd/server/http_request.h"
#include "agentd/server/http_server.h"

namespace kvshare::agentd {

// A connected, non-blocking socket and the request that is being read from it. One thread at a time.
class HttpConnection {
 public:
  using Clock = std::chrono::steady_clock;

  HttpConnection(int fd, const HttpLimits& limits) : fd_(fd), limits_(limits), parser_(limits) {}
  HttpConnection(const HttpConnection&) = delete;
  HttpConnection& operator=(const HttpConnection&) = delete;
  ~HttpConnection();

  enum class Outcome { kWaiting, kRequest, kRefused, kGone };
  // Reads what has come, at most one request.
  Outcome Read();
  // Requires kRequest. Reading then goes on with the next request.
  HttpRequest TakeRequest();
  const HttpParser& parser() const { return parser_; }
  bool begun() const { return parser_.begun(); }

  // Sends without waiting; for short answers that may get lost.
  void TrySend(std::string_view data);
  // Sends all; false when the client is gone, or takes nothing for `timeout`.
  bool SendAll(std::string_view data, std::chrono::milliseconds timeout);
  bool PeerGone() const;
  // After an answer to a request that was not read to its end: the rest is thrown away for a while, because closing at
  // once could take the answer with it.
  void StartLingering();
  bool lingering() const { return lingering_; }

  int fd() const { return fd_; }
  Clock::time_point waiting_since = Clock::now();  // the server's: since when it waits for this request
  bool answered = false;                           // the server's: it had an answer before

 private:
  Outcome Parse(std::string_view data);

  const int fd_;
  const HttpLimits limits_;
  HttpParser parser_;
  std::string unread_;  // bytes behind the last request
  bool lingering_ = false;
};

// Writes one answer to a connection.
class ConnectionReply final : public HttpReply {
 public:
  ConnectionReply(HttpConnection* connection, const HttpRequest& request, std::chrono::milliseconds write_timeout)
      : connection_(connection),
        head_only_(request.method == "HEAD"),
        chunked_(request.http_1_1),
        keep_alive_(request.keep_alive),
        timeout_(write_timeout) {}

  void Send(int status, std::string_view content_type, std::string_view body, const Headers& headers) override;
  bool Begin(int status, std::string_view content_type, const Headers& headers) override;
  bool Write(std::string_view data) override;
  bool Alive() override { return ok_ && !connection_->PeerGone(); }

  bool begun() const { return begun_; }
  // Completes the answer. True when the connection can take another request.
  bool Finish();
  // The answer cannot be completed: the connection must be closed so that the client sees that.
  void Abandon() { ok_ = false; }

 private:
  HttpConnection* const connection_;
  const bool head_only_;
  const bool chunked_;
  bool keep_alive_;
  const std::chrono::milliseconds timeout_;
  bool begun_ = false;
  bool streaming_ = false;
  bool ok_ = true;
};

// The status line and headers of an answer; `length` < 0: no Content-Length.
std::string HttpHead(int status, std::string_view content_type, std::int64_t length, bool keep_alive,
                     const HttpReply::Headers& headers);

}  // namespace kvshare::agentd

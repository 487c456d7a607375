// One HTTP connection's socket: the request that comes in, and the answer that goes out as the client takes it.
#pragma once

#include <chrono>
#include <string>
#include <string_view>

#include "agentd/server/http_request.h"
#include "agentd/server/http_server.h"

namespace kvshare::agentd {

// A connected, non-blocking socket. Nothing here waits. One thread at a time.
class HttpConnection {
 public:
  using Clock = std::chrono::steady_clock;

  HttpConnection(int fd, const HttpLimits& limits) : fd_(fd), limits_(limits), parser_(limits) {}
  HttpConnection(const HttpConnection&) = delete;
  HttpConnection& operator=(const HttpConnection&) = delete;
  ~HttpConnection();

  enum class Outcome { kWaiting, kRequest, kRefused, kGone };
  // Reads what has come, at most one request. Requires !writing().
  Outcome Read();
  // Requires kRequest. Reading then goes on with the next request.
  HttpRequest TakeRequest();
  const HttpParser& parser() const { return parser_; }
  bool begun() const { return parser_.begun(); }

  // What becomes of the connection behind an answer.
  enum class Then {
    kRead,    // the next request
    kClose,   // nothing more is to come
    kLinger,  // the request was not read to its end: the rest is thrown away for a while, because closing at once could
              // take the answer with it
  };
  void SetAnswer(std::string answer, Then then);
  // Whether some of the answer is still here.
  bool writing() const { return !answer_.empty(); }
  // Sends what the client takes now. False when the connection is at its end.
  bool Write();
  bool lingering() const { return lingering_; }

  int fd() const { return fd_; }
  Clock::time_point waiting_since = Clock::now();  // the server's: for this request, or for this answer to be taken
  bool answered = false;                           // the server's: it had an answer before

 private:
  Outcome Parse(std::string_view data);

  const int fd_;
  const HttpLimits limits_;
  HttpParser parser_;
  std::string unread_;  // bytes behind the last request
  std::string answer_;  // what is left to send
  Then then_ = Then::kRead;
  bool lingering_ = false;
};

// The bytes of an answer; its body is left out where only the head was asked for.
std::string HttpBytes(const HttpAnswer& answer, bool head_only, bool keep_alive);

}  // namespace kvshare::agentd

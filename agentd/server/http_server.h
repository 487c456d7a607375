// HttpServer: HTTP/1.1 for people, probes and agent frameworks. It knows nothing of what is asked: handlers do.
//
// One thread waits on all connections and reads requests; only whole ones reach the few threads that answer. So a
// client that sends a byte a second costs a slot in a table, not a thread. docs/design/http.md says why this is not a
// library.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "agentd/server/http_request.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

// The answer to one request. One thread.
class HttpReply {
 public:
  using Headers = std::vector<std::pair<std::string, std::string>>;

  virtual ~HttpReply() = default;

  // A whole answer. Either this, once, or Begin, Write any number of times, and returning.
  virtual void Send(int status, std::string_view content_type, std::string_view body, const Headers& headers = {}) = 0;

  // An answer of unknown length, sent as it is written. False when the client is gone, or too slow: then stop.
  virtual bool Begin(int status, std::string_view content_type, const Headers& headers = {}) = 0;
  virtual bool Write(std::string_view data) = 0;
  // Whether the client is still there, as far as can be seen without writing.
  virtual bool Alive() = 0;
};

using HttpHandler = std::function<void(const HttpRequest&, HttpReply&)>;

struct HttpServerOptions {
  std::string host = "127.0.0.1";                    // an address or localhost; "*": all interfaces
  int port = 0;                                      // 0: any free one
  int threads = 4;                                   // answers at a time, streams included
  std::size_t max_connections = 512;                 // beyond it the one that keeps us waiting longest goes
  std::chrono::milliseconds request_timeout{15000};  // from a request's first byte to its last
  std::chrono::milliseconds idle_timeout{60000};     // between requests
  std::chrono::milliseconds write_timeout{15000};    // without any progress
  HttpLimits limits;
};

// Totals since the start.
struct HttpCounters {
  std::int64_t connections = 0;
  std::int64_t requests = 0;  // answered by the handler
  std::int64_t refused = 0;   // malformed, too large, too slow, or too many
};

class HttpServer {
 public:
  // Stops: answers under way are finished, or given up where their client does not read.
  virtual ~HttpServer() = default;
  virtual int port() const = 0;
  // Thread-safe.
  virtual HttpCounters counters() const = 0;
};

// Binds and starts serving. InvalidArgument for a host that is no address of this machine, Unavailable when the port is
// taken. The handler is called on several threads; an answer it does not give is a 500.
Result<std::unique_ptr<HttpServer>> StartHttpServer(const HttpServerOptions& options, HttpHandler handler);

// {"error":{"message":...,"type":...,"code":...}}, as OpenAI's clients expect it.
std::string HttpErrorJson(int status, std::string_view message);

}  // namespace kvshare::agentd

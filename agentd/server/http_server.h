// HttpServer: HTTP/1.1 for people, probes and agent frameworks. It knows nothing of what is asked: handlers do.
//
// One thread waits on all connections, reads requests and writes answers; only whole requests reach the few threads
// that make the answers. So a client that sends a byte a second, or reads none, costs a slot in a table, not a thread.
// docs/design/http.md says why this is not a library.
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

struct HttpAnswer {
  int status = 200;
  std::string content_type;
  std::string body;
  std::vector<std::pair<std::string, std::string>> headers;
};

using HttpHandler = std::function<HttpAnswer(const HttpRequest&)>;

struct HttpServerOptions {
  std::string host = "127.0.0.1";                    // an address or localhost; "*": all interfaces
  int port = 0;                                      // 0: any free one
  int threads = 4;                                   // answers that are made at a time
  std::size_t max_connections = 512;                 // beyond it the one that keeps us waiting longest goes
  std::chrono::milliseconds request_timeout{15000};  // from a request's first byte to its last
  std::chrono::milliseconds idle_timeout{60000};     // between requests
  std::chrono::milliseconds write_timeout{15000};    // for an answer to be taken
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
  // Stops: answers that are being made are finished, and sent as far as their clients take them at once.
  virtual ~HttpServer() = default;
  virtual int port() const = 0;
  // Thread-safe.
  virtual HttpCounters counters() const = 0;
};

// Binds and starts serving. InvalidArgument for a host that is no address of this machine, Unavailable when the port is
// taken. The handler is called on several threads; one that throws answers 500.
Result<std::unique_ptr<HttpServer>> StartHttpServer(const HttpServerOptions& options, HttpHandler handler);

// Its body is {"error":{"message":...,"type":...,"code":...}}, as OpenAI's clients expect it.
HttpAnswer HttpError(int status, std::string_view message);

}  // namespace kvshare::agentd

#include "agentd/server/http_server.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "agentd/server/http_connection.h"
#include "libkvshare/core/json_text.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using ConnectionPtr = std::unique_ptr<HttpConnection>;

constexpr int kBacklog = 512;
constexpr int kAcceptsPerTurn = 64;
// Until what has no descriptors left looks again.
constexpr milliseconds kWithoutDescriptors{50};
constexpr milliseconds kLinger{1000};

class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() { Reset(-1); }
  void Reset(int fd) {
    if (fd_ >= 0) close(fd_);
    fd_ = fd;
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

class HttpServerImpl final : public HttpServer {
 public:
  HttpServerImpl(const HttpServerOptions& options, HttpHandler handler)
      : options_(options), handler_(std::move(handler)) {}

  ~HttpServerImpl() override {
    {
      const std::lock_guard lock(mu_);
      stopping_ = true;
    }
    changed_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    {
      const std::lock_guard lock(mu_);
      answers_made_ = true;
    }
    Wake();
    if (io_.joinable()) io_.join();
  }

  Status Start() {
    KVS_RETURN_IF_ERROR(Bind());
    wake_.Reset(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
    if (wake_.get() < 0) return ResourceExhausted(std::string("no event descriptor: ") + std::strerror(errno));
    io_ = std::thread([this] { IoThread(); });
    for (int i = 0; i < options_.threads; ++i) workers_.emplace_back([this] { WorkerThread(); });
    return OkStatus();
  }

  int port() const override { return port_; }
  HttpCounters counters() const override {
    return {.connections = connections_, .requests = requests_, .refused = refused_};
  }

 private:
  Status Bind() {
    std::string host = options_.host == "localhost" ? "127.0.0.1" : options_.host;
    if (host.size() > 2 && host.front() == '[') host = host.substr(1, host.size() - 2);
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV | AI_PASSIVE;
    if (host == "*") hints.ai_family = AF_INET;
    addrinfo* found = nullptr;
    const std::string port = std::to_string(options_.port);
    const std::string where = options_.host + ":" + port;
    if (getaddrinfo(host == "*" ? nullptr : host.c_str(), port.c_str(), &hints, &found) != 0) {
      return InvalidArgument(where + ": the host must be an address of this machine, localhost or *");
    }
    const std::unique_ptr<addrinfo, void (*)(addrinfo*)> address(found, &freeaddrinfo);
    listener_.Reset(socket(address->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (listener_.get() < 0) return Unavailable(where + ": " + std::strerror(errno));
    const int on = 1;
    setsockopt(listener_.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (bind(listener_.get(), address->ai_addr, address->ai_addrlen) != 0 || listen(listener_.get(), kBacklog) != 0) {
      const int error = errno;
      const bool taken = error == EADDRINUSE || error == EACCES;
      const std::string what = where + ": " + std::strerror(error);
      return taken ? Unavailable(what + "; stop the process that has the port, or choose another one")
                   : InvalidArgument(what + "; the host must be an address of this machine");
    }
    sockaddr_storage bound{};
    socklen_t size = sizeof(bound);
    getsockname(listener_.get(), reinterpret_cast<sockaddr*>(&bound), &size);
    port_ = ntohs(bound.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&bound)->sin6_port
                                              : reinterpret_cast<sockaddr_in*>(&bound)->sin_port);
    return OkStatus();
  }

  void Wake() {
    const std::uint64_t one = 1;
    // Cannot fail but by overflow, and then it is awake already.
    if (write(wake_.get(), &one, sizeof(one)) < 0) return;
  }

  // ---- the io thread: owns the connections that wait for a request, or for their answer to be taken ----

  void IoThread() {
    while (Turn()) {
    }
  }

  bool Turn() {
    const bool listens = Clock::now() >= accept_again_;
    std::vector<pollfd> fds = {{wake_.get(), POLLIN, 0}, {listens ? listener_.get() : -1, POLLIN, 0}};
    for (const ConnectionPtr& connection : waiting_) {
      const short event = connection->writing() ? POLLOUT : POLLIN;
      fds.push_back({connection->fd(), event, 0});
    }
    poll(fds.data(), fds.size(), static_cast<int>(NextDeadline().count()));
    std::uint64_t ignored = 0;
    if ((fds[0].revents & POLLIN) != 0 && read(wake_.get(), &ignored, sizeof(ignored)) < 0) ignored = 0;

    std::vector<ConnectionPtr> polled = std::exchange(waiting_, {});
    for (std::size_t i = 0; i < polled.size(); ++i) {
      if (fds[i + 2].revents == 0) {
        waiting_.push_back(std::move(polled[i]));
      } else {
        Advance(std::move(polled[i]));
      }
    }
    std::vector<ConnectionPtr> returned;
    bool last = false;
    {
      const std::lock_guard lock(mu_);
      last = answers_made_;
      returned.swap(returned_);
    }
    for (ConnectionPtr& connection : returned) Advance(std::move(connection));
    if (last) return false;
    if ((fds[1].revents & POLLIN) != 0) Accept();
    CloseOverdue();
    return true;
  }

  // As far as it goes without waiting.
  void Advance(ConnectionPtr connection) {
    if (connection->writing()) {
      if (!connection->Write()) {
        connection.reset();
        --open_;
        return;
      }
      if (connection->writing()) return waiting_.push_back(std::move(connection));
      connection->waiting_since = Clock::now();
    }
    ReadFrom(std::move(connection));  // it may hold its next request already
  }

  void ReadFrom(ConnectionPtr connection) {
    const bool begun = connection->begun();
    switch (connection->Read()) {
      case HttpConnection::Outcome::kGone: --open_; return;
      case HttpConnection::Outcome::kRefused: Refuse(std::move(connection)); return;
      case HttpConnection::Outcome::kWaiting:
        // The clock of a request starts with its first byte.
        if (!begun && connection->begun()) connection->waiting_since = Clock::now();
        waiting_.push_back(std::move(connection));
        return;
      case HttpConnection::Outcome::kRequest: break;
    }
    {
      const std::lock_guard lock(mu_);
      queue_.push_back(std::move(connection));
    }
    changed_.notify_one();
  }

  void Refuse(ConnectionPtr connection, int status, const std::string& reason) {
    ++refused_;
    connection->SetAnswer(HttpBytes(HttpError(status, reason), /*head_only=*/false, /*keep_alive=*/false),
                          HttpConnection::Then::kLinger);
    connection->waiting_since = Clock::now();
    Advance(std::move(connection));
  }
  void Refuse(ConnectionPtr connection) {
    const int status = connection->parser().status();
    const std::string reason = connection->parser().reason();
    Refuse(std::move(connection), status, reason);
  }

  void Accept() {
    for (int i = 0; i < kAcceptsPerTurn; ++i) {
      const int fd = accept4(listener_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
      if (fd < 0) {
        // Without descriptors the connection stays in the backlog, and would be offered for ever.
        const bool none_left = errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM;
        if (none_left && !CloseLongestWaiting()) accept_again_ = Clock::now() + kWithoutDescriptors;
        return;
      }
      ++connections_;
      const int on = 1;
      setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
      ++open_;
      auto connection = std::make_unique<HttpConnection>(fd, options_.limits);
      if (open_ > static_cast<std::int64_t>(options_.max_connections) && !CloseLongestWaiting()) {
        // All others have an answer under way.
        Refuse(std::move(connection), 503, "too many connections");
        continue;
      }
      waiting_.push_back(std::move(connection));
    }
  }

  bool CloseLongestWaiting() {
    if (waiting_.empty()) return false;
    const auto oldest = std::min_element(
        waiting_.begin(), waiting_.end(),
        [](const ConnectionPtr& a, const ConnectionPtr& b) { return a->waiting_since < b->waiting_since; });
    waiting_.erase(oldest);
    --open_;
    ++refused_;
    return true;
  }

  Clock::time_point DeadlineOf(const HttpConnection& connection) const {
    if (connection.lingering()) return connection.waiting_since + kLinger;
    if (connection.writing()) return connection.waiting_since + options_.write_timeout;
    const bool idle = connection.answered && !connection.begun();
    return connection.waiting_since + (idle ? options_.idle_timeout : options_.request_timeout);
  }

  milliseconds NextDeadline() const {
    Clock::time_point next = Clock::now() < accept_again_ ? accept_again_ : Clock::time_point::max();
    if (waiting_.empty() && next == Clock::time_point::max()) return milliseconds(-1);
    for (const ConnectionPtr& connection : waiting_) next = std::min(next, DeadlineOf(*connection));
    const auto left = std::chrono::duration_cast<milliseconds>(next - Clock::now()) + milliseconds(1);
    return std::max(left, milliseconds(0));
  }

  void CloseOverdue() {
    const Clock::time_point now = Clock::now();
    std::vector<ConnectionPtr> all = std::exchange(waiting_, {});
    for (ConnectionPtr& connection : all) {
      if (DeadlineOf(*connection) > now) {
        waiting_.push_back(std::move(connection));
      } else if (connection->begun() && !connection->lingering() && !connection->writing()) {
        Refuse(std::move(connection), 408, "the request took too long to arrive");
      } else {
        if (connection->writing()) ++refused_;
        connection.reset();
        --open_;
      }
    }
  }

  // ---- the workers ----

  void WorkerThread() {
    while (true) {
      ConnectionPtr connection;
      {
        std::unique_lock lock(mu_);
        changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
        if (stopping_) return;
        connection = std::move(queue_.front());
        queue_.pop_front();
      }
      Answer(*connection);
      connection->answered = true;
      connection->waiting_since = Clock::now();
      {
        const std::lock_guard lock(mu_);
        returned_.push_back(std::move(connection));
      }
      Wake();
    }
  }

  void Answer(HttpConnection& connection) {
    const HttpRequest request = connection.TakeRequest();
    ++requests_;
    HttpAnswer answer;
    try {
      answer = handler_(request);
    } catch (const std::exception&) {
      // Ours do not throw; one that does must not take the daemon with it.
      answer = HttpError(500, "the request was not answered");
    }
    connection.SetAnswer(HttpBytes(answer, request.method == "HEAD", request.keep_alive),
                         request.keep_alive ? HttpConnection::Then::kRead : HttpConnection::Then::kClose);
  }

  const HttpServerOptions options_;
  const HttpHandler handler_;
  Descriptor listener_;
  Descriptor wake_;
  int port_ = 0;
  std::vector<ConnectionPtr> waiting_;  // the io thread's
  Clock::time_point accept_again_;      // likewise
  std::atomic<std::int64_t> open_ = 0;  // connections, wherever they are
  std::atomic<std::int64_t> connections_ = 0;
  std::atomic<std::int64_t> requests_ = 0;
  std::atomic<std::int64_t> refused_ = 0;

  std::mutex mu_;
  std::condition_variable changed_;
  bool stopping_ = false;                // guarded by mu_, as all below
  bool answers_made_ = false;            // and no more are made
  std::deque<ConnectionPtr> queue_;      // with a whole request; at most max_connections
  std::vector<ConnectionPtr> returned_;  // answered
  std::thread io_;
  std::vector<std::thread> workers_;
};

}  // namespace

Result<std::unique_ptr<HttpServer>> StartHttpServer(const HttpServerOptions& options, HttpHandler handler) {
  auto server = std::make_unique<HttpServerImpl>(options, std::move(handler));
  KVS_RETURN_IF_ERROR(server->Start());
  return std::unique_ptr<HttpServer>(std::move(server));
}

HttpAnswer HttpError(int status, std::string_view message) {
  const char* type = status == 429   ? "rate_limit_error"
                     : status == 404 ? "not_found_error"
                     : status < 500  ? "invalid_request_error"
                                     : "server_error";
  const nlohmann::ordered_json error = {
      {"error", {{"message", message}, {"type", type}, {"param", nullptr}, {"code", status}}}};
  return {.status = status, .content_type = "application/json", .body = JsonText(error) + "\n"};
}

}  // namespace kvshare::agentd

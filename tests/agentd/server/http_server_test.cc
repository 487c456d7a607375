// HttpServer and HttpRoutes over real sockets: pipelines, strangers that send rubbish, nothing, or one byte at a time,
// that read nothing, and more connections than there are places.
#include "agentd/server/http_server.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <ctime>
#include <mutex>
#include <optional>
#include <thread>

#include "agentd/server/http_routes.h"
#include "tests/testing/echo_service.h"
#include "tests/testing/one_more_descriptor.h"
#include "tests/testing/status_matchers.h"

namespace kvshare::agentd {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;
using ::testing::StartsWith;

// A client that writes what it likes and reads until the server closes, or until it has seen enough.
class RawClient {
 public:
  explicit RawClient(int port) : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  RawClient(const RawClient&) = delete;
  RawClient& operator=(const RawClient&) = delete;
  ~RawClient() { close(fd_); }

  bool Send(std::string_view data) {
    while (!data.empty()) {
      const ssize_t n = send(fd_, data.data(), data.size(), MSG_NOSIGNAL);
      if (n <= 0) return false;
      data.remove_prefix(static_cast<std::size_t>(n));
    }
    return true;
  }
  bool NothingComesFor(milliseconds time) {
    pollfd readable{fd_, POLLIN, 0};
    return poll(&readable, 1, static_cast<int>(time.count())) == 0;
  }
  // The first that comes, at most so many bytes.
  std::string ReadSome(std::size_t bytes) {
    std::string some(bytes, ' ');
    const ssize_t n = recv(fd_, some.data(), some.size(), 0);
    some.resize(n > 0 ? static_cast<std::size_t>(n) : 0);
    return some;
  }
  // All that comes until `until` has been seen or the connection ends; fails the test after 20 seconds.
  std::string Read(const std::string& until = "") {
    std::string all;
    char buffer[4096];
    while (until.empty() || all.find(until) == std::string::npos) {
      pollfd readable{fd_, POLLIN, 0};
      if (poll(&readable, 1, 20000) <= 0) {
        ADD_FAILURE() << "nothing came, after " << all;
        break;
      }
      const ssize_t n = recv(fd_, buffer, sizeof(buffer), 0);
      if (n <= 0) break;
      all.append(buffer, static_cast<std::size_t>(n));
    }
    return all;
  }

 private:
  const int fd_;
};

std::string Get(int port, const std::string& path, const std::string& method = "GET") {
  RawClient client(port);
  EXPECT_TRUE(client.Send(method + " " + path + " HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"));
  return client.Read();
}

std::unique_ptr<HttpServer> Start(HttpHandler handler, HttpServerOptions options = {}) {
  auto server = StartHttpServer(options, std::move(handler));
  KVS_EXPECT_OK(server);
  return server.ok() ? std::move(*server) : nullptr;
}

HttpAnswer Echo(const HttpRequest& request) {
  return {.content_type = "text/plain", .body = request.method + " " + request.path + " " + request.body};
}

TEST(HttpServerTest, AnswersManyRequestsOnOneConnection) {
  const auto server = Start(Echo);
  RawClient client(server->port());
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(client.Send("POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nb" + std::to_string(i)));
    const std::string answer = client.Read("POST /a b" + std::to_string(i));
    EXPECT_THAT(answer, StartsWith("HTTP/1.1 200 OK\r\n"));
    EXPECT_THAT(answer, HasSubstr("Content-Length: 10\r\n"));
  }
  // Three in one write, the last of which ends the connection.
  ASSERT_TRUE(
      client.Send("GET /x HTTP/1.1\r\nHost: h\r\n\r\nGET /y HTTP/1.1\r\nHost: h\r\n\r\n"
                  "GET /z HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"));
  const std::string rest = client.Read();
  EXPECT_LT(rest.find("GET /x"), rest.find("GET /y"));
  EXPECT_LT(rest.find("GET /y"), rest.find("GET /z"));
  EXPECT_THAT(rest, HasSubstr("Connection: close"));
  EXPECT_EQ(server->counters().requests, 6);
}

TEST(HttpServerTest, TellsHeadsWithoutBodies) {
  const auto server = Start(Echo);
  const std::string head = Get(server->port(), "/x", "HEAD");
  EXPECT_THAT(head, HasSubstr("Content-Length: 8\r\n"));
  EXPECT_THAT(head, ::testing::EndsWith("\r\n\r\n"));
}

TEST(HttpServerTest, AHandlerThatThrowsIsA500) {
  const auto server = Start([](const HttpRequest&) -> HttpAnswer { throw std::runtime_error("x"); });
  EXPECT_THAT(Get(server->port(), "/throw"), StartsWith("HTTP/1.1 500"));
}

TEST(HttpServerTest, WhoWaitsBeforeSendingABodyIsToldToGoOnOrThatItIsTooLarge) {
  const auto server = Start(Echo, {.limits = {.body_bytes = 5}});
  const std::string head = "POST /x HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: ";
  RawClient client(server->port());
  ASSERT_TRUE(client.Send(head + "5\r\n\r\n"));
  EXPECT_EQ(client.Read("\r\n\r\n"), "HTTP/1.1 100 Continue\r\n\r\n");
  ASSERT_TRUE(client.Send("hello"));
  EXPECT_THAT(client.Read("hello"), StartsWith("HTTP/1.1 200"));
  RawClient large(server->port());
  ASSERT_TRUE(large.Send(head + "6\r\n\r\n"));
  EXPECT_THAT(large.Read("}}"), StartsWith("HTTP/1.1 413"));
}

TEST(HttpServerTest, RubbishIsRefusedWithALineAndTheServerLivesOn) {
  const auto server = Start(Echo);
  for (const auto& [text, status] : std::vector<std::pair<std::string, std::string>>{
           {"\x16\x03\x01\r\n\r\n", "400"},
           {"GET / HTTP/1.1\r\n\r\n", "400"},
           {"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 65537\r\n\r\n", "413"},
           {"GET / HTTP/1.1\r\nHost: h\r\nX: " + std::string(100000, 'x'), "431"},
           {"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999\r\n\r\n" + std::string(1 << 20, 'x'), "413"}}) {
    RawClient client(server->port());
    client.Send(text);  // may fail when the answer comes before the end
    EXPECT_THAT(client.Read("}}"), StartsWith("HTTP/1.1 " + status));
  }
  EXPECT_EQ(server->counters().refused, 5);
  EXPECT_THAT(Get(server->port(), "/ok"), StartsWith("HTTP/1.1 200"));
}

TEST(HttpServerTest, SlowSendersAreGivenUpAndHoldNobodyUp) {
  const auto server = Start(Echo, {.threads = 1, .request_timeout = milliseconds(300)});
  std::vector<std::unique_ptr<RawClient>> slow;
  for (int i = 0; i < 50; ++i) {
    slow.push_back(std::make_unique<RawClient>(server->port()));
    ASSERT_TRUE(slow.back()->Send("GET / HTTP/1.1\r\nHost"));
  }
  slow.push_back(std::make_unique<RawClient>(server->port()));  // says nothing at all
  for (int i = 0; i < 20; ++i) EXPECT_THAT(Get(server->port(), "/fast"), StartsWith("HTTP/1.1 200"));
  for (int i = 0; i < 50; ++i) EXPECT_THAT(slow[i]->Read(), StartsWith("HTTP/1.1 408"));
  EXPECT_EQ(slow.back()->Read(), "");
}

TEST(HttpServerTest, WhenPlacesRunOutTheLongestWaitingGoes) {
  const auto server = Start(Echo, {.max_connections = 8});
  std::vector<std::unique_ptr<RawClient>> idle;
  for (int i = 0; i < 40; ++i) {
    idle.push_back(std::make_unique<RawClient>(server->port()));
    ASSERT_TRUE(idle.back()->Send("GET /"));
    if (i % 10 != 9) continue;
    EXPECT_THAT(Get(server->port(), "/honest"), StartsWith("HTTP/1.1 200"));
  }
  EXPECT_EQ(idle.front()->Read(), "");
  EXPECT_GE(server->counters().refused, 32);
}

// Who cannot be accepted stays in the backlog until there are descriptors again; the server does not turn round for it.
TEST(HttpServerTest, WithoutDescriptorsItWaits) {
  const auto server = Start(Echo);
  std::optional<kvshare::testing::OneMoreDescriptor> one_more(std::in_place);
  RawClient client(server->port());  // takes the last one
  EXPECT_TRUE(client.NothingComesFor(milliseconds(20)));
  const auto cpu_seconds = [] { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; };
  const double begun = cpu_seconds();
  EXPECT_TRUE(client.NothingComesFor(milliseconds(400)));
  EXPECT_LT(cpu_seconds() - begun, 0.1);  // of all threads
  EXPECT_EQ(server->counters().connections, 0);
  one_more.reset();
  EXPECT_TRUE(client.Send("GET /x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"));
  EXPECT_THAT(client.Read(), StartsWith("HTTP/1.1 200"));
}

// Each holds a place, and no thread; the server's end does not wait for them.
TEST(HttpServerTest, ReadersThatDoNotReadHoldNobodyUpAndAreGivenUp) {
  const auto much = [](const HttpRequest& request) -> HttpAnswer {
    return {.content_type = "text/plain", .body = std::string(request.path == "/much" ? 64 << 20 : 1, 'x')};
  };
  {
    const auto patient = Start(much, {.threads = 1});
    std::vector<std::unique_ptr<RawClient>> deaf;
    for (int i = 0; i < 3; ++i) {
      deaf.push_back(std::make_unique<RawClient>(patient->port()));
      ASSERT_TRUE(deaf.back()->Send("GET /much HTTP/1.1\r\nHost: h\r\n\r\n"));
      EXPECT_THAT(deaf.back()->ReadSome(1000), StartsWith("HTTP/1.1 200"));
    }
    EXPECT_THAT(Get(patient->port(), "/health"), StartsWith("HTTP/1.1 200"));
    EXPECT_EQ(patient->counters().refused, 0);
  }  // within the test's time: no write is waited for
  const milliseconds never = std::chrono::hours(1);
  const auto server =
      Start(much, {.request_timeout = never, .idle_timeout = never, .write_timeout = milliseconds(100)});
  RawClient client(server->port());
  ASSERT_TRUE(client.Send("GET /much HTTP/1.1\r\nHost: h\r\n\r\n"));
  while (server->counters().refused == 0) std::this_thread::yield();
  EXPECT_LT(client.Read().size(), std::size_t{64} << 20);
}

TEST(HttpServerTest, WhatIsBeingAnsweredWhenItStopsIsSent) {
  std::mutex mutex;
  std::condition_variable changed;
  bool begun = false;
  auto server = Start([&](const HttpRequest& request) {
    std::unique_lock lock(mutex);
    begun = true;
    changed.notify_all();
    // Until the server is being stopped: nobody can be seen to wait for that, so give it the time to begin.
    changed.wait_for(lock, milliseconds(50), [] { return false; });
    return Echo(request);
  });
  RawClient client(server->port());
  ASSERT_TRUE(client.Send("GET /x HTTP/1.1\r\nHost: h\r\n\r\n"));
  {
    std::unique_lock lock(mutex);
    ASSERT_TRUE(changed.wait_for(lock, std::chrono::seconds(20), [&] { return begun; }));
  }
  server.reset();
  EXPECT_THAT(client.Read(), ::testing::EndsWith("GET /x "));
}

TEST(HttpServerTest, AddressesThatCannotBeHadAreNamed) {
  const auto server = Start(Echo);
  KVS_EXPECT_FAILS(StartHttpServer({.port = server->port()}, Echo), StatusCode::kUnavailable, "choose another one");
  KVS_EXPECT_FAILS(StartHttpServer({.host = "no.such.host"}, Echo), StatusCode::kInvalidArgument, "no.such.host");
  KVS_EXPECT_FAILS(StartHttpServer({.host = "203.0.113.1"}, Echo), StatusCode::kInvalidArgument, "203.0.113.1");
  EXPECT_GT(Start(Echo, {.host = "localhost"})->port(), 0);
}

TEST(HttpRoutesTest, ReadinessFollowsTheDaemonsLife) {
  HttpRoutes routes("1.2.3");
  const auto server = Start([&](const HttpRequest& request) { return routes.Handle(request); });
  routes.SetServer(server.get());
  const auto status = [&](const char* path) { return Get(server->port(), path).substr(9, 3); };

  EXPECT_EQ(status("/health"), "200");
  EXPECT_EQ(status("/ready"), "503");
  EXPECT_EQ(status("/metrics"), "200");
  EXPECT_THAT(Get(server->port(), "/ready"), HasSubstr("loading"));
  EXPECT_THAT(Get(server->port(), "/version"), HasSubstr("\"1.2.3\""));

  testing::EchoService service;
  routes.Serve(&service, nullptr);
  EXPECT_EQ(status("/ready"), "200");
  EXPECT_THAT(Get(server->port(), "/metrics"), HasSubstr("kvshare_ready 1\n"));
  EXPECT_THAT(Get(server->port(), "/version"), HasSubstr("\"model\""));

  routes.SetDraining();
  EXPECT_EQ(status("/ready"), "503");
  EXPECT_EQ(status("/health"), "200");
  EXPECT_THAT(Get(server->port(), "/metrics"), HasSubstr("kvshare_ready 0\n"));

  routes.Close();
  EXPECT_EQ(status("/ready"), "503");
  EXPECT_EQ(status("/metrics"), "200");

  // Another service takes its place.
  routes.SetLoading();
  EXPECT_EQ(status("/ready"), "503");
  EXPECT_THAT(Get(server->port(), "/ready"), HasSubstr("loading"));
  routes.Serve(&service, nullptr);
  EXPECT_EQ(status("/ready"), "200");
  routes.Close();
}

TEST(HttpRoutesTest, OnlyKnownPathsAndReadingMethods) {
  HttpRoutes routes("1");
  const auto server = Start([&](const HttpRequest& request) { return routes.Handle(request); });
  EXPECT_THAT(Get(server->port(), "/"), StartsWith("HTTP/1.1 404"));
  EXPECT_THAT(Get(server->port(), "/metrics/"), StartsWith("HTTP/1.1 404"));
  EXPECT_THAT(Get(server->port(), "/../etc/passwd"), StartsWith("HTTP/1.1 404"));
  for (const char* method : {"POST", "PUT", "DELETE", "OPTIONS"}) {
    const std::string answer = Get(server->port(), "/metrics", method);
    EXPECT_THAT(answer, StartsWith("HTTP/1.1 405"));
    EXPECT_THAT(answer, HasSubstr("Allow: GET, HEAD"));
  }
}

}  // namespace
}  // namespace kvshare::agentd

// The server's socket: whom it lets in, what it does with bytes that are not requests, with clients that do not read or
// are gone, and how it ends. Raw sockets play the clients that our own client never is.
#include "agentd/server/router_server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <fstream>
#include <future>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <zmq.hpp>

#include "agentd/server/fault_limiter.h"
#include "kvshare/client.h"
#include "libkvshare/codec/codec.h"
#include "tests/testing/echo_service.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"

namespace kvshare::agentd {
namespace {

using kvshare::testing::EchoService;
using std::chrono::milliseconds;
using ::testing::HasSubstr;

constexpr milliseconds kLong{30000};

// A client by hand.
class RawPeer {
 public:
  explicit RawPeer(const std::string& endpoint, int receive_messages_max = 1000) {
    socket_.set(zmq::sockopt::linger, 0);
    socket_.set(zmq::sockopt::rcvhwm, receive_messages_max);
    socket_.set(zmq::sockopt::rcvtimeo, 20000);
    socket_.set(zmq::sockopt::sndtimeo, 20000);
    socket_.connect(endpoint);
  }

  void Send(const codec::Frame& frame) { socket_.send(zmq::buffer(frame), zmq::send_flags::none); }
  void Send(std::uint64_t correlation, const codec::Request& request) {
    Send(*codec::EncodeRequest(correlation, request));
  }
  void SendTwoParts(const codec::Frame& frame) {
    socket_.send(zmq::buffer(frame), zmq::send_flags::sndmore);
    socket_.send(zmq::buffer(frame), zmq::send_flags::none);
  }

  struct Received {
    std::uint64_t correlation = 0;
    codec::Reply reply;
  };
  // The next reply; nullopt after 20 seconds.
  std::optional<Received> ReceiveAny() {
    zmq::message_t message;
    if (!socket_.recv(message)) return std::nullopt;
    wire::ReceivedFrame received;
    EXPECT_EQ(received.Load({message.data<std::uint8_t>(), message.size()}, wire::FrameKind::kReply),
              wire::FrameFault::kNone);
    Result<codec::Reply> reply = codec::DecodeReply(*received.reply());
    EXPECT_TRUE(reply.ok()) << reply.status().message();
    return Received{received.header().correlation, *std::move(reply)};
  }
  bool NothingComesFor(milliseconds time) {
    zmq::pollitem_t item{socket_.handle(), 0, ZMQ_POLLIN, 0};
    return zmq::poll(&item, 1, time) == 0;
  }
  // The next that is not a sign of life.
  std::optional<Received> Receive() {
    std::optional<Received> received = ReceiveAny();
    while (received.has_value() && received->correlation == 0) received = ReceiveAny();
    return received;
  }
  // Receives an Error for `correlation`.
  Status ReceiveError(std::uint64_t correlation) {
    const std::optional<Received> received = Receive();
    if (!received.has_value()) return Internal("no reply came");
    EXPECT_EQ(received->correlation, correlation);
    const Status* status = std::get_if<Status>(&received->reply);
    return status == nullptr ? Internal("the reply is no error") : *status;
  }
  template <typename T>
  std::optional<T> ReceiveA(std::uint64_t correlation) {
    const std::optional<Received> received = Receive();
    if (!received.has_value() || received->correlation != correlation) return std::nullopt;
    const T* reply = std::get_if<T>(&received->reply);
    return reply == nullptr ? std::nullopt : std::optional<T>(*reply);
  }

 private:
  zmq::context_t context_;
  zmq::socket_t socket_{context_, zmq::socket_type::dealer};
};

GenerateRequest Echo(const std::string& text, int max_tokens) {
  return {.prompt = TextPrompt{text}, .max_tokens = max_tokens, .timeout = kLong};
}

class RouterServerTest : public ::testing::Test {
 protected:
  Result<std::unique_ptr<RouterServer>> Start(const std::string& endpoint) {
    return StartRouterServer(&service_, {.endpoint = endpoint});
  }
  void StartHere() {
    auto started = Start(endpoint_);
    ASSERT_TRUE(started.ok()) << started.status().message();
    server_ = *std::move(started);
  }
  static std::unique_ptr<Client> NewClient(const std::string& endpoint) {
    return *Connect({.endpoint = endpoint, .timeout = kLong});
  }
  bool SocketFileExists() const {
    struct stat found {};
    return ::lstat(path_.c_str(), &found) == 0;
  }

  kvshare::testing::TempDir dir_;
  const std::string path_ = dir_.File("d.sock");
  const std::string endpoint_ = "ipc://" + path_;
  EchoService service_;
  std::unique_ptr<RouterServer> server_;
};

// ---- listening ----

TEST_F(RouterServerTest, TheSocketFileIsItsUsersAloneAndGoesWithTheServer) {
  StartHere();
  struct stat found {};
  ASSERT_EQ(::lstat(path_.c_str(), &found), 0);
  EXPECT_TRUE(S_ISSOCK(found.st_mode));
  EXPECT_EQ(found.st_mode & 0777, 0600u);
  EXPECT_EQ(server_->endpoint(), endpoint_);
  KVS_EXPECT_OK(NewClient(endpoint_)->Ping(kLong));
  server_.reset();
  EXPECT_FALSE(SocketFileExists());
}

TEST_F(RouterServerTest, ASecondDaemonIsRefusedAndTheFirstServesOn) {
  StartHere();
  KVS_EXPECT_FAILS(Start(endpoint_), StatusCode::kUnavailable, "choose another path");
  KVS_EXPECT_OK(NewClient(endpoint_)->Ping(kLong));
}

TEST_F(RouterServerTest, AStaleSocketFileIsReplaced) {
  const int fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path_.c_str(), sizeof address.sun_path - 1);
  ASSERT_EQ(::bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  ::close(fd);
  ASSERT_TRUE(SocketFileExists());
  StartHere();
  KVS_EXPECT_OK(NewClient(endpoint_)->Ping(kLong));
}

TEST_F(RouterServerTest, AFileThatIsNoSocketIsLeftAlone) {
  std::ofstream(path_) << "precious";
  KVS_EXPECT_FAILS(Start(endpoint_), StatusCode::kUnavailable, "not a socket");
  std::string content;
  std::ifstream(path_) >> content;
  EXPECT_EQ(content, "precious");
}

TEST_F(RouterServerTest, AFolderThatIsNotThereIsNamed) {
  KVS_EXPECT_FAILS(Start("ipc://" + dir_.File("none/d.sock")), StatusCode::kUnavailable, "folder");
}

TEST_F(RouterServerTest, BadEndpointsAreInvalid) {
  EXPECT_EQ(Start("nonsense").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(Start("tcp://203.0.113.77:0").status().code(), StatusCode::kInvalidArgument) << "not this machine's";
}

TEST_F(RouterServerTest, ATcpPortOfZeroIsResolvedAndATakenOneRefused) {
  auto started = Start("tcp://127.0.0.1:0");
  KVS_ASSERT_OK(started);
  const std::string endpoint = (*started)->endpoint();
  EXPECT_TRUE(ValidateEndpoint(endpoint).ok()) << endpoint;
  const auto client = NewClient(endpoint);
  KVS_EXPECT_OK(client->Ping(kLong));
  KVS_EXPECT_OK(client->GenerateAll(Echo("over tcp", 100)));
  KVS_EXPECT_FAILS(Start(endpoint), StatusCode::kUnavailable, "choose another one");
}

// ---- bytes ----

TEST_F(RouterServerTest, AnotherVersionIsToldSo) {
  StartHere();
  RawPeer peer(endpoint_);
  codec::Frame frame = *codec::EncodeRequest(5, codec::Ping{});
  frame[4] = 2;
  peer.Send(frame);
  const Status status = peer.ReceiveError(5);
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("version 2"), std::string::npos) << status.message();
  EXPECT_NE(status.message().find("version 1"), std::string::npos) << status.message();
}

TEST_F(RouterServerTest, BadFramesAreAnsweredWherePossibleAndCounted) {
  StartHere();
  RawPeer peer(endpoint_);
  codec::Frame frame = *codec::EncodeRequest(6, codec::Tokenize{"x"});
  for (std::size_t i = wire::kHeaderBytes; i < frame.size(); ++i) frame[i] = 0xEE;
  peer.Send(frame);
  EXPECT_EQ(peer.ReceiveError(6).code(), StatusCode::kInvalidArgument);
  peer.Send(codec::Frame{});
  peer.Send(codec::Frame{1, 2, 3});
  peer.SendTwoParts(*codec::EncodeRequest(7, codec::Ping{}));
  peer.Send(8, codec::Ping{});
  EXPECT_TRUE(peer.ReceiveA<codec::Pong>(8).has_value()) << "nothing was answered in between";
  EXPECT_EQ(server_->counters().malformed_frames, 4);
  EXPECT_EQ(server_->counters().frames, 5);
}

TEST_F(RouterServerTest, AFrameAboveTheLimitCostsItsSenderTheConnectionAndNobodyElse) {
  StartHere();
  const auto client = NewClient(endpoint_);
  KVS_ASSERT_OK(client->Ping(kLong));
  RawPeer peer(endpoint_);
  peer.Send(codec::Frame(wire::kMaxFrameBytes + 1));
  KVS_EXPECT_OK(client->Ping(kLong));
  EXPECT_EQ(server_->counters().malformed_frames, 0) << "it is never received";
}

TEST_F(RouterServerTest, AFloodOfRubbishDoesNotStopAnHonestClient) {
  StartHere();
  std::jthread flood([this](std::stop_token stop) {
    std::mt19937_64 rng(7);
    const codec::Frame good = *codec::EncodeRequest(3, codec::Generate{.request = Echo("x", 1)});
    RawPeer peer(endpoint_);
    while (!stop.stop_requested()) {
      codec::Frame frame = good;
      for (int i = 0; i < 3; ++i) frame[rng() % frame.size()] = static_cast<std::uint8_t>(rng());
      frame.resize(rng() % 4 == 0 ? rng() % frame.size() : frame.size());
      peer.Send(frame);  // and never reads an answer
    }
  });
  const auto client = NewClient(endpoint_);
  for (int i = 0; i < 100; ++i) {
    const GenerateRequest request = Echo("honest " + std::to_string(i), 20);
    const Result<GenerateReply> reply = client->GenerateAll(request);
    ASSERT_TRUE(reply.ok()) << reply.status().message();
    ASSERT_EQ(reply->ids, EchoService::Expected(request).ids);
  }
  flood.request_stop();
  flood.join();
  EXPECT_GT(server_->counters().malformed_frames, 0);
}

TEST(FloodBrakeTest, AFewAreReadAtOnceAndManyInTheirTime) {
  FloodBrake brake;
  FloodBrake::Clock::time_point now{std::chrono::hours(1)};
  const auto holds = [&] { return brake.HoldsFor(now).count() > 0; };
  // Now and then one, for ever.
  for (int i = 0; i < 100; ++i) {
    brake.OnMalformed(now);
    EXPECT_FALSE(holds());
    now += FloodBrake::kWindow;
  }
  // As many as there are: no more than so many in a window.
  const auto start = now;
  int read = 0;
  while (now < start + milliseconds(100)) {
    if (holds()) {
      now += brake.HoldsFor(now);
      EXPECT_FALSE(holds());
      continue;
    }
    brake.OnMalformed(now);
    ++read;
    now += std::chrono::microseconds(1);
  }
  EXPECT_LE(read, (100 / FloodBrake::kWindow.count() + 1) * FloodBrake::kFramesMax);
  EXPECT_GE(read, 100 / FloodBrake::kWindow.count() * FloodBrake::kFramesMax - FloodBrake::kFramesMax);
}

TEST_F(RouterServerTest, AFloodIsReadSlowlyAndWholly) {
  StartHere();
  constexpr int kFrames = 500;
  RawPeer peer(endpoint_);
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kFrames; ++i) peer.Send(codec::Frame{1, 2, 3});
  peer.Send(9, codec::Ping{});
  const auto pong = peer.ReceiveAny();
  ASSERT_TRUE(pong.has_value());
  EXPECT_EQ(pong->correlation, 9u);
  EXPECT_EQ(server_->counters().malformed_frames, kFrames);
  EXPECT_GE(std::chrono::steady_clock::now() - start, (kFrames / FloodBrake::kFramesMax - 1) * FloodBrake::kWindow);
}

// ---- clients that do not read, or go ----

TEST_F(RouterServerTest, NoMoreChunksThanGrantedAndTheRestInOne) {
  StartHere();
  service_.CloseGate(0);
  RawPeer peer(endpoint_);
  peer.Send(1, codec::Generate{.request = Echo("credit", 500), .credit = 2});
  ASSERT_TRUE(peer.ReceiveA<codec::Accepted>(1).has_value());
  std::string text;
  for (int i = 1; i <= 2; ++i) {
    service_.CloseGate(i);
    const auto chunk = peer.ReceiveA<TokenChunk>(1);
    ASSERT_TRUE(chunk.has_value());
    EXPECT_EQ(chunk->ids.size(), 1u);
    text += chunk->text;
  }
  service_.OpenGate();
  ASSERT_TRUE(service_.WaitForFinished(1)) << "computing does not wait for the reader";
  peer.Send(2, codec::Ping{});
  ASSERT_TRUE(peer.ReceiveA<codec::Pong>(2).has_value()) << "no third chunk comes first";
  peer.Send(0, codec::Credit{.target = 1, .chunks = 1});
  const auto rest = peer.ReceiveA<TokenChunk>(1);
  ASSERT_TRUE(rest.has_value());
  text += rest->text;
  EXPECT_EQ(text, EchoService::Expected(Echo("credit", 500)).text);
  const auto done = peer.ReceiveA<GenerateReply>(1);
  ASSERT_TRUE(done.has_value());
  EXPECT_EQ(done->text, text);
}

TEST_F(RouterServerTest, AClientThatGoesHasItsRequestsCancelled) {
  StartHere();
  service_.CloseGate(1);
  {
    RawPeer peer(endpoint_);
    peer.Send(1, codec::Generate{.request = Echo("gone", 10), .credit = 100});
    peer.Send(2, codec::Generate{.request = Echo("gone too", 10), .credit = 0});
    ASSERT_TRUE(peer.Receive().has_value());
    while (service_.generations() < 2) ASSERT_TRUE(peer.ReceiveAny().has_value());
  }
  EXPECT_TRUE(service_.WaitForCancellations(2));
  EXPECT_EQ(server_->counters().clients_lost, 1);
}

TEST_F(RouterServerTest, AClientThatNeverReadsIsDroppedBeforeItFillsTheMemory) {
  StartHere();
  const auto client = NewClient(endpoint_);
  RawPeer peer(endpoint_, /*receive_messages_max=*/1);
  // Answers of 4 MiB each, which nobody takes: ZeroMQ holds some, the server a bounded rest, then it lets go.
  const std::string text(wire::kMaxTokens, 'x');
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(200);
  for (std::uint64_t i = 1; server_->counters().replies_dropped == 0; ++i) {
    ASSERT_LT(std::chrono::steady_clock::now(), give_up);
    // Beyond these the daemon would only say that too many wait.
    if (i <= 200) peer.Send(i, codec::Tokenize{text});
    KVS_ASSERT_OK(client->Ping(kLong));
  }
  EXPECT_GT(server_->counters().replies_dropped, 0);
  KVS_EXPECT_OK(client->GenerateAll(Echo("still served", 10)));
  // It is told so behind what ZeroMQ still held for it.
  std::optional<RawPeer::Received> received = peer.ReceiveAny();
  while (received.has_value() && received->correlation != 0) received = peer.ReceiveAny();
  ASSERT_TRUE(received.has_value());
  const auto* error = std::get_if<Status>(&received->reply);
  ASSERT_NE(error, nullptr);
  EXPECT_EQ(error->code(), StatusCode::kUnavailable);
  EXPECT_THAT(error->message(), HasSubstr("ask again"));
}

TEST_F(RouterServerTest, ACorrelationInUseIsRefused) {
  StartHere();
  service_.CloseGate(1);
  RawPeer peer(endpoint_);
  peer.Send(1, codec::Generate{.request = Echo("one", 10), .credit = 0});
  ASSERT_TRUE(peer.ReceiveA<codec::Accepted>(1).has_value());
  peer.Send(1, codec::Generate{.request = Echo("two", 10), .credit = 0});
  EXPECT_EQ(peer.ReceiveError(1).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(service_.generations(), 1);
}

TEST_F(RouterServerTest, AClientMayNotRunRequestsWithoutEnd) {
  StartHere();
  service_.CloseGate(0);
  RawPeer peer(endpoint_);
  std::uint64_t refused = 0;
  for (std::uint64_t i = 1; i <= 1100 && refused == 0; ++i) {
    peer.Send(i, codec::Generate{.request = Echo("many", 1), .credit = 1});
    const auto received = peer.Receive();
    ASSERT_TRUE(received.has_value());
    if (const Status* status = std::get_if<Status>(&received->reply)) {
      EXPECT_EQ(status->code(), StatusCode::kResourceExhausted);
      refused = i;
    }
  }
  EXPECT_EQ(refused, 1025u);
}

// ---- the end ----

TEST_F(RouterServerTest, DrainingFinishesWhatRunsAndRefusesWhatIsNew) {
  StartHere();
  service_.CloseGate(2);
  const auto client = NewClient(endpoint_);
  const GenerateRequest request = Echo("draining", 300);
  const auto stream = client->Generate(request);
  KVS_ASSERT_OK(stream);
  auto drained = std::async(std::launch::async, [this] { server_->DrainAndStop(); });
  while (client->Tokenize("x").ok()) {
  }
  KVS_EXPECT_FAILS(client->GenerateAll(Echo("new", 1)), StatusCode::kUnavailable, "draining");
  KVS_EXPECT_OK(client->Ping(kLong));
  EXPECT_EQ(drained.wait_for(milliseconds(0)), std::future_status::timeout) << "a request still runs";
  service_.OpenGate();
  std::string text;
  while (true) {
    const auto chunk = (*stream)->Next();
    KVS_ASSERT_OK(chunk);
    if (!chunk->has_value()) break;
    text += (*chunk)->text;
  }
  EXPECT_EQ(text, EchoService::Expected(request).text);
  drained.get();
  EXPECT_FALSE(SocketFileExists());
}

TEST_F(RouterServerTest, DrainingDoesNotWaitForCredit) {
  StartHere();
  RawPeer peer(endpoint_);
  peer.Send(1, codec::Generate{.request = Echo("no credit", 100), .credit = 0});
  ASSERT_TRUE(peer.ReceiveA<codec::Accepted>(1).has_value());
  ASSERT_TRUE(service_.WaitForFinished(1));
  server_->DrainAndStop();
  const auto chunk = peer.ReceiveA<TokenChunk>(1);
  ASSERT_TRUE(chunk.has_value());
  EXPECT_EQ(chunk->text, EchoService::Expected(Echo("no credit", 100)).text);
  EXPECT_TRUE(peer.ReceiveA<GenerateReply>(1).has_value());
}

// What it was about to read is made already: it comes, and the stream is over.
TEST_F(RouterServerTest, CancellingDoesNotWaitForCredit) {
  StartHere();
  RawPeer peer(endpoint_);
  peer.Send(1, codec::Generate{.request = Echo("no credit", 100), .credit = 0});
  ASSERT_TRUE(peer.ReceiveA<codec::Accepted>(1).has_value());
  ASSERT_TRUE(service_.WaitForFinished(1));
  peer.Send(0, codec::Cancel{.target = 1});
  EXPECT_TRUE(peer.ReceiveA<TokenChunk>(1).has_value());
  EXPECT_TRUE(peer.ReceiveA<GenerateReply>(1).has_value());
  peer.Send(1, codec::Generate{.request = Echo("again", 1), .credit = 10});
  EXPECT_TRUE(peer.ReceiveA<codec::Accepted>(1).has_value());
}

// Prompts that take long to read: everybody else is served, and who asked may think better of it.
class LargePromptTest : public RouterServerTest {
 protected:
  static codec::Generate Large(const std::string& name, std::uint32_t credit) {
    return {.request = Echo(name + std::string(100'000, 'x'), 10), .credit = credit};
  }
  void Hold(RawPeer& peer, const codec::Generate& request) {
    service_.HoldGenerate();
    peer.Send(1, request);
    ASSERT_TRUE(service_.WaitForHeld());
  }
};

TEST_F(LargePromptTest, HoldsNobodyUp) {
  StartHere();
  RawPeer peer(endpoint_);
  const codec::Generate request = Large("a", 100);
  Hold(peer, request);
  peer.Send(2, Large("behind", 0));
  const auto client = NewClient(endpoint_);
  for (int i = 0; i < 100; ++i) KVS_ASSERT_OK(client->Ping(kLong));
  peer.Send(1, codec::Generate{.request = Echo("the same name", 10), .credit = 0});
  EXPECT_EQ(peer.ReceiveError(1).code(), StatusCode::kInvalidArgument);
  service_.LetIn();
  ASSERT_TRUE(peer.ReceiveA<codec::Accepted>(1).has_value());
  EXPECT_TRUE(service_.WaitForFinished(2));
  std::optional<GenerateReply> done;
  while (!done.has_value()) {
    const auto received = peer.ReceiveAny();
    ASSERT_TRUE(received.has_value());
    if (const auto* reply = std::get_if<GenerateReply>(&received->reply)) done = *reply;
  }
  EXPECT_EQ(done->text, EchoService::Expected(request.request).text);
}

TEST_F(LargePromptTest, IsCancelledOnceItIsRead) {
  StartHere();
  service_.CloseGate(0);
  RawPeer peer(endpoint_);
  Hold(peer, Large("a", 100));
  peer.Send(0, codec::Cancel{.target = 1});
  peer.Send(7, codec::Ping{});  // behind the cancellation
  ASSERT_TRUE(peer.ReceiveA<codec::Pong>(7).has_value());
  service_.LetIn();
  EXPECT_TRUE(service_.WaitForCancellations(1));
}

TEST_F(LargePromptTest, OfAClientThatHasGoneIsCancelled) {
  StartHere();
  service_.CloseGate(0);
  {
    RawPeer peer(endpoint_);
    Hold(peer, Large("a", 100));
  }
  while (server_->counters().clients_lost == 0) std::this_thread::yield();
  service_.LetIn();
  EXPECT_TRUE(service_.WaitForCancellations(1));
}

// Nor is what it asked besides looked at any more.
TEST_F(LargePromptTest, QuestionsOfAClientThatHasGoneAreDropped) {
  StartHere();
  service_.CloseGate(0);
  RawPeer holder(endpoint_);
  Hold(holder, Large("a", 100));
  {
    RawPeer peer(endpoint_);
    for (std::uint64_t i = 1; i <= 5; ++i) peer.Send(i, codec::Tokenize{std::string(100'000, 'x')});
    peer.Send(6, codec::Ping{});  // behind them
    ASSERT_TRUE(peer.ReceiveA<codec::Pong>(6).has_value());
  }
  while (server_->counters().clients_lost == 0) std::this_thread::yield();
  service_.LetIn();
  const auto client = NewClient(endpoint_);
  KVS_EXPECT_OK(client->Tokenize(std::string(100'000, 'y')));  // it would be behind them
  EXPECT_EQ(service_.texts(), 1);
}

TEST_F(LargePromptTest, SignsOfLifeComeToWhoWaitsForAnAnswerAndNobodyElse) {
  StartHere();
  RawPeer peer(endpoint_), other(endpoint_);
  Hold(other, Large("a", 100));
  peer.Send(1, codec::Tokenize{std::string(100'000, 'x')});
  const std::optional<RawPeer::Received> sign = peer.ReceiveAny();
  ASSERT_TRUE(sign.has_value());
  EXPECT_EQ(sign->correlation, 0u);
  service_.LetIn();
  EXPECT_TRUE(peer.ReceiveA<codec::Tokens>(1).has_value());
  EXPECT_TRUE(peer.NothingComesFor(milliseconds(1500)));  // a sign a second, if there were any
}

TEST_F(LargePromptTest, ThatCannotBeReadIsAnErrorOfItsOwn) {
  StartHere();
  service_.FailNextGenerate();
  RawPeer peer(endpoint_);
  peer.Send(1, Large("a", 100));
  const Status error = peer.ReceiveError(1);
  EXPECT_EQ(error.code(), StatusCode::kInternal);
  EXPECT_THAT(error.message(), HasSubstr("the request failed"));
  service_.FailNextGenerate();
  peer.Send(1, codec::Generate{.request = Echo("short", 10), .credit = 100});
  EXPECT_EQ(peer.ReceiveError(1).code(), StatusCode::kInternal);
  peer.Send(1, Large("again", 100));
  EXPECT_TRUE(peer.ReceiveA<codec::Accepted>(1).has_value());
}

TEST_F(LargePromptTest, ThatIsRefusedIsAnError) {
  StartHere();
  RawPeer peer(endpoint_);
  codec::Generate request = Large("a", 100);
  request.request.max_tokens = 1 << 20;
  peer.Send(1, request);
  EXPECT_EQ(peer.ReceiveError(1).code(), StatusCode::kInvalidArgument);
  peer.Send(1, Large("again", 100));
  EXPECT_TRUE(peer.ReceiveA<codec::Accepted>(1).has_value());
}

TEST_F(LargePromptTest, IsServedByADaemonThatDrains) {
  StartHere();
  RawPeer peer(endpoint_);
  Hold(peer, Large("a", 0));
  auto drained = std::async(std::launch::async, [this] { server_->DrainAndStop(); });
  service_.LetIn();
  ASSERT_TRUE(peer.ReceiveA<codec::Accepted>(1).has_value());
  EXPECT_TRUE(peer.ReceiveA<TokenChunk>(1).has_value());
  EXPECT_TRUE(peer.ReceiveA<GenerateReply>(1).has_value());
  drained.get();
}

TEST_F(LargePromptTest, IsCancelledByAServerThatStops) {
  StartHere();
  service_.CloseGate(0);
  RawPeer peer(endpoint_);
  Hold(peer, Large("a", 100));
  auto stopped = std::async(std::launch::async, [this] { server_.reset(); });
  service_.LetIn();
  stopped.get();
  EXPECT_TRUE(service_.WaitForCancellations(1));
}

TEST_F(LargePromptTest, MoreThanTheirShareAreRefused) {
  StartHere();
  RawPeer peer(endpoint_);
  Hold(peer, Large("a", 100));
  codec::Generate request{.request = Echo(std::string(wire::kMaxTextBytes - 100, 'x'), 1), .credit = 100};
  for (std::uint64_t i = 2; i <= 20; ++i) peer.Send(i, request);
  int refused = 0;
  while (refused < 16) {  // 32 MiB hold three of nearly 8 MiB, beside the first
    const auto received = peer.ReceiveAny();
    ASSERT_TRUE(received.has_value());
    const auto* error = std::get_if<Status>(&received->reply);
    if (error == nullptr) continue;
    EXPECT_EQ(error->code(), StatusCode::kResourceExhausted);
    ++refused;
  }
  service_.LetIn();
  EXPECT_TRUE(service_.WaitForFinished(4));
  EXPECT_EQ(service_.generations(), 4);
}

TEST_F(RouterServerTest, StoppingWithoutDrainingCancelsWhatRuns) {
  StartHere();
  service_.CloseGate(1);
  RawPeer peer(endpoint_);
  peer.Send(1, codec::Generate{.request = Echo("stopped", 10), .credit = 10});
  ASSERT_TRUE(peer.ReceiveA<codec::Accepted>(1).has_value());
  server_.reset();
  EXPECT_TRUE(service_.WaitForCancellations(1));
}

// The stop comes while the io thread is at work, at any point of its round.
TEST_F(RouterServerTest, StoppingAmidRequestsNeverHangs) {
  std::mt19937_64 rng(11);
  for (int i = 0; i < 300; ++i) {
    StartHere();
    RawPeer peer(endpoint_);
    const std::uint64_t pings = 1 + rng() % 60;
    for (std::uint64_t n = 1; n <= pings; ++n) peer.Send(n, codec::Ping{});
    for (std::uint64_t n = 1 + rng() % pings; n > 0; --n) ASSERT_TRUE(peer.Receive().has_value());
    if (i % 3 == 0) server_->DrainAndStop();
    server_.reset();
  }
}

TEST_F(RouterServerTest, StoppingTwiceAndDrainingAnIdleServerAreQuick) {
  StartHere();
  server_->DrainAndStop();
  server_->DrainAndStop();
  server_.reset();
  StartHere();
}

}  // namespace
}  // namespace kvshare::agentd

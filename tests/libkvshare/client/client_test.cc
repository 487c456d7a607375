// The client over a real socket, against the real server; the service behind it echoes.
#include "kvshare/client.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <future>
#include <set>
#include <string>
#include <thread>
#include <vector>
#include <zmq.hpp>

#include "agentd/server/router_server.h"
#include "libkvshare/codec/codec.h"
#include "tests/testing/echo_service.h"
#include "tests/testing/one_more_descriptor.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"

namespace kvshare {
namespace {

using kvshare::testing::EchoService;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

// What a loaded machine may add to a timeout. Far below the timeouts that a hang would run into.
constexpr milliseconds kSlack{5000};
constexpr milliseconds kLong{30000};

class ClientTest : public ::testing::Test {
 protected:
  void StartServer() {
    auto started = agentd::StartRouterServer(&service_, {.endpoint = endpoint_});
    ASSERT_TRUE(started.ok()) << started.status().message();
    server_ = *std::move(started);
  }

  std::unique_ptr<Client> NewClient(milliseconds timeout = kLong) {
    auto client = Connect({.endpoint = endpoint_, .timeout = timeout});
    EXPECT_TRUE(client.ok()) << client.status().message();
    return *std::move(client);
  }

  static GenerateRequest Echo(const std::string& text, int max_tokens) {
    return {.prompt = TextPrompt{text}, .max_tokens = max_tokens, .timeout = kLong};
  }

  // Chunks may come joined; their tokens come one by one.
  static void ExpectTokens(TokenStream& stream, std::size_t count) {
    for (std::size_t seen = 0; seen < count;) {
      const auto chunk = stream.Next();
      ASSERT_TRUE(chunk.ok()) << chunk.status().message();
      ASSERT_TRUE(chunk->has_value());
      seen += (*chunk)->ids.size();
    }
  }

  kvshare::testing::TempDir dir_;
  const std::string endpoint_ = "ipc://" + dir_.File("d.sock");
  EchoService service_;
  std::unique_ptr<agentd::RouterServer> server_;
};

TEST_F(ClientTest, ConnectRefusesWhatCannotBeAnEndpoint) {
  EXPECT_EQ(Connect({.endpoint = "somewhere"}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(ValidateEndpoint("tcp://127.0.0.1:0").code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(ValidateEndpoint(endpoint_).ok());
}

TEST_F(ClientTest, PingSaysUnavailableWhenNobodyListens) {
  for (const std::string& endpoint : {endpoint_, std::string("tcp://127.0.0.1:1")}) {
    auto client = Connect({.endpoint = endpoint});
    ASSERT_TRUE(client.ok());
    const auto start = steady_clock::now();
    const Result<ServerInfo> info = (*client)->Ping(milliseconds(200));
    const auto elapsed = steady_clock::now() - start;
    KVS_EXPECT_FAILS(info, StatusCode::kUnavailable, endpoint);
    EXPECT_GE(elapsed, milliseconds(200));
    EXPECT_LT(elapsed, milliseconds(200) + kSlack);
  }
}

TEST_F(ClientTest, EveryCallEndsByItsTimeoutWhenNobodyListens) {
  const auto client = NewClient(milliseconds(100));
  const auto start = steady_clock::now();
  EXPECT_EQ(client->Tokenize("x").status().code(), StatusCode::kUnavailable);
  EXPECT_EQ(client->Detokenize({}).status().code(), StatusCode::kUnavailable);
  EXPECT_EQ(client->Render({}).status().code(), StatusCode::kUnavailable);
  EXPECT_EQ(client->Explain({}).status().code(), StatusCode::kUnavailable);
  EXPECT_EQ(client->GetStats().status().code(), StatusCode::kUnavailable);
  // A generation's own timeout is long; finding the daemon's is not.
  EXPECT_EQ(client->GenerateAll(Echo("x", 1)).status().code(), StatusCode::kUnavailable);
  EXPECT_LT(steady_clock::now() - start, 6 * milliseconds(100) + kSlack);
}

TEST_F(ClientTest, PingWaitsUntilTheDaemonIsThere) {
  const auto client = NewClient();
  auto info = std::async(std::launch::async, [&client] { return client->Ping(kLong); });
  StartServer();
  const Result<ServerInfo> answer = info.get();
  KVS_ASSERT_OK(answer);
  EXPECT_EQ(answer->model, "echo");
  EXPECT_EQ(answer->vocab_size, 256);
}

// An agent's profiler or its runtime sends itself signals; one that a thread of ours took would interrupt its socket.
TEST_F(ClientTest, NoThreadOfTheClientTakesSignals) {
  StartServer();
  const auto threads = [] {
    std::set<std::string> all;
    for (const auto& thread : std::filesystem::directory_iterator("/proc/self/task")) all.insert(thread.path());
    return all;
  };
  const std::set<std::string> before = threads();
  const auto client = NewClient();
  ASSERT_TRUE(client->Ping(kLong).ok());
  int ours = 0;
  for (const std::string& thread : threads()) {
    if (before.count(thread) > 0) continue;
    ++ours;
    std::ifstream status(thread + "/status");
    std::string line;
    while (std::getline(status, line) && line.rfind("SigBlk:", 0) != 0) {
    }
    ASSERT_GT(line.size(), 8u) << thread;
    const std::uint64_t blocked = std::stoull(line.substr(7), nullptr, 16);
    for (const int signal : {SIGUSR1, SIGALRM, SIGPROF, SIGCHLD, SIGTERM}) {
      EXPECT_TRUE((blocked >> (signal - 1)) & 1) << thread << " takes signal " << signal;
    }
  }
  EXPECT_GE(ours, 2);  // and libzmq's
  sigset_t here;
  ASSERT_EQ(pthread_sigmask(SIG_SETMASK, nullptr, &here), 0);
  EXPECT_FALSE(sigismember(&here, SIGUSR1)) << "the caller's mask changed";
}

// libzmq would end the process.
TEST_F(ClientTest, WithoutDescriptorsItIsRefused) {
  {
    const kvshare::testing::OneMoreDescriptor one_more;
    const Result<std::unique_ptr<Client>> client = Connect({.endpoint = endpoint_, .timeout = kLong});
    KVS_EXPECT_FAILS(client, StatusCode::kUnavailable, "descriptors");
  }
  StartServer();
  KVS_EXPECT_OK(NewClient()->Ping(kLong));
}

TEST_F(ClientTest, UnaryCallsBringTheServicesAnswers) {
  StartServer();
  const auto client = NewClient();
  const Result<std::vector<TokenId>> ids = client->Tokenize("abc");
  KVS_ASSERT_OK(ids);
  EXPECT_EQ(*ids, (std::vector<TokenId>{'a', 'b', 'c'}));
  const Result<std::string> text = client->Detokenize(*ids);
  KVS_ASSERT_OK(text);
  EXPECT_EQ(*text, "abc");
  const Result<RenderReply> rendered = client->Render({.chat = {.messages_json = "[1]", .tools_json = "[2]"}});
  KVS_ASSERT_OK(rendered);
  EXPECT_EQ(rendered->prompt, "[1][2]");
  const Result<Explanation> explanation = client->Explain({.prompt = TextPrompt{"abcd"}});
  KVS_ASSERT_OK(explanation);
  ASSERT_EQ(explanation->spans.size(), 1u);
  EXPECT_EQ(explanation->spans[0].length, 4);
  const Result<Stats> stats = client->GetStats();
  KVS_ASSERT_OK(stats);
  EXPECT_EQ(stats->agents.count("default"), 1u);
}

TEST_F(ClientTest, LargeTextsTakeTheSlowLaneAndArriveWhole) {
  StartServer();
  const auto client = NewClient();
  const std::string text(2 << 20, 'q');
  const Result<std::vector<TokenId>> ids = client->Tokenize(text.substr(0, 1 << 20));
  KVS_ASSERT_OK(ids);
  EXPECT_EQ(ids->size(), std::size_t{1} << 20);
  // More tokens than an answer may hold: an error, and the connection lives on.
  EXPECT_EQ(client->Tokenize(text).status().code(), StatusCode::kResourceExhausted);
  // More text than a request may hold never leaves.
  EXPECT_EQ(client->Tokenize(std::string(9 << 20, 'q')).status().code(), StatusCode::kInvalidArgument);
  KVS_EXPECT_OK(client->Ping(kLong));
}

TEST_F(ClientTest, TheServicesErrorsArriveAsTheyAre) {
  StartServer();
  const auto client = NewClient();
  KVS_EXPECT_FAILS(client->Generate(Echo("x", -1)), StatusCode::kInvalidArgument, "max_tokens");
  KVS_EXPECT_FAILS(client->Explain({.request_id = 99}), StatusCode::kNotFound, "99");
  const std::vector<TokenId> bad = {300};
  KVS_EXPECT_FAILS(client->Detokenize(bad), StatusCode::kInvalidArgument, "300");
}

TEST_F(ClientTest, TheRequestReachesTheServiceWithEveryField) {
  StartServer();
  const auto client = NewClient();
  const GenerateRequest request{
      .prompt = ChatPrompt{.messages_json = "[{}]", .tools_json = "[]", .add_generation_prompt = false},
      .sampling = {.temperature = 0.5f, .top_k = 7, .top_p = 0.25f, .seed = 42},
      .max_tokens = 3,
      .stop = {"a", "bc"},
      .ignore_eos = true,
      .agent = "planner",
      .session = "s1",
      .reuse = ReuseMode::kOff,
      .timeout = kLong};
  KVS_ASSERT_OK(client->GenerateAll(request));
  const GenerateRequest seen = service_.last_request();
  EXPECT_EQ(std::get<ChatPrompt>(seen.prompt).messages_json, "[{}]");
  EXPECT_FALSE(std::get<ChatPrompt>(seen.prompt).add_generation_prompt);
  EXPECT_EQ(seen.sampling.top_k, 7);
  EXPECT_EQ(seen.sampling.seed, 42u);
  EXPECT_EQ(seen.stop, request.stop);
  EXPECT_TRUE(seen.ignore_eos);
  EXPECT_EQ(seen.agent, "planner");
  EXPECT_EQ(seen.session, "s1");
  EXPECT_EQ(seen.reuse, ReuseMode::kOff);
  EXPECT_EQ(seen.timeout, kLong);
}

TEST_F(ClientTest, ChunksAddUpToTheReply) {
  StartServer();
  const auto client = NewClient();
  const GenerateRequest request = Echo("hello", 1000);
  const auto stream = client->Generate(request);
  KVS_ASSERT_OK(stream);
  TokenChunk sum;
  while (true) {
    const auto chunk = (*stream)->Next();
    KVS_ASSERT_OK(chunk);
    if (!chunk->has_value()) break;
    sum.ids.insert(sum.ids.end(), (*chunk)->ids.begin(), (*chunk)->ids.end());
    sum.text += (*chunk)->text;
  }
  const GenerateReply expected = EchoService::Expected(request);
  EXPECT_EQ(sum.ids, expected.ids);
  EXPECT_EQ(sum.text, expected.text);
  const GenerateReply& reply = (*stream)->reply();
  EXPECT_EQ(reply.ids, expected.ids);
  EXPECT_EQ(reply.prompt_tokens, 5);
  EXPECT_EQ(reply.finish_reason, FinishReason::kLength);
  ASSERT_EQ(reply.reuse.miss_reasons.size(), 1u);
  EXPECT_EQ(reply.reuse.miss_reasons[0].reason, "never_seen");
  const auto after = (*stream)->Next();
  KVS_ASSERT_OK(after);
  EXPECT_FALSE(after->has_value()) << "the end stays the end";
}

// The daemon goes on computing for a reader that does not read, and holds no more than the reply for it.
TEST_F(ClientTest, ASlowReaderGetsEverythingInFewerChunks) {
  StartServer();
  const auto client = NewClient();
  const GenerateRequest request = Echo("slow", 5000);
  const auto stream = client->Generate(request);
  KVS_ASSERT_OK(stream);
  ASSERT_TRUE(service_.WaitForFinished(1));
  int chunks = 0;
  std::string text;
  while (true) {
    const auto chunk = (*stream)->Next();
    KVS_ASSERT_OK(chunk);
    if (!chunk->has_value()) break;
    ++chunks;
    text += (*chunk)->text;
  }
  EXPECT_EQ(text, EchoService::Expected(request).text);
  EXPECT_LE(chunks, 65) << "the credit, and the rest in one";
}

TEST_F(ClientTest, AStreamEndsAtItsDeadline) {
  StartServer();
  service_.CloseGate(3);
  const auto client = NewClient();
  GenerateRequest request = Echo("late", 10);
  request.timeout = milliseconds(500);
  const auto start = steady_clock::now();
  const auto stream = client->Generate(request);
  KVS_ASSERT_OK(stream);
  Status end;
  while (end.ok()) end = (*stream)->Next().status();
  EXPECT_EQ(end.code(), StatusCode::kDeadlineExceeded) << end.message();
  EXPECT_LT(steady_clock::now() - start, request.timeout + kSlack);
  EXPECT_EQ((*stream)->Next().status().code(), StatusCode::kDeadlineExceeded) << "the end stays the end";
  EXPECT_TRUE(service_.WaitForCancellations(1));
}

TEST_F(ClientTest, CancelEndsTheStreamAndTheRequest) {
  StartServer();
  service_.CloseGate(3);
  const auto client = NewClient();
  const auto stream = client->Generate(Echo("stop", 10));
  KVS_ASSERT_OK(stream);
  ExpectTokens(**stream, 1);
  (*stream)->Cancel();
  EXPECT_EQ((*stream)->Next().status().code(), StatusCode::kCancelled);
  EXPECT_TRUE(service_.WaitForCancellations(1));
  KVS_EXPECT_OK(client->Ping(kLong));
}

TEST_F(ClientTest, DestroyingAnUnfinishedStreamCancels) {
  StartServer();
  service_.CloseGate(3);
  const auto client = NewClient();
  {
    const auto stream = client->Generate(Echo("drop", 10));
    KVS_ASSERT_OK(stream);
  }
  EXPECT_TRUE(service_.WaitForCancellations(1));
}

TEST_F(ClientTest, DestroyingTheClientRightAfterAStreamStillCancels) {
  StartServer();
  service_.CloseGate(3);
  {
    const auto client = NewClient();
    const auto stream = client->Generate(Echo("drop", 10));
    KVS_ASSERT_OK(stream);
  }
  EXPECT_TRUE(service_.WaitForCancellations(1));
}

TEST_F(ClientTest, ADaemonThatDiesMidStreamIsUnavailableAndTheNextOneServes) {
  StartServer();
  service_.CloseGate(3);
  const auto client = NewClient();
  const auto stream = client->Generate(Echo("dies", 10));
  KVS_ASSERT_OK(stream);
  ExpectTokens(**stream, 3);
  const auto start = steady_clock::now();
  server_.reset();
  EXPECT_EQ((*stream)->Next().status().code(), StatusCode::kUnavailable);
  EXPECT_LT(steady_clock::now() - start, kSlack);

  service_.OpenGate();
  StartServer();
  const Result<GenerateReply> reply = client->GenerateAll(Echo("again", 10));
  KVS_ASSERT_OK(reply);
  EXPECT_EQ(reply->ids, EchoService::Expected(Echo("again", 10)).ids);
}

TEST_F(ClientTest, EightClientsAtOnceEachGetTheirOwn) {
  StartServer();
  std::vector<std::thread> threads;
  std::atomic<int> right = 0;
  for (int c = 0; c < 8; ++c) {
    threads.emplace_back([this, c, &right] {
      const auto client = NewClient();
      for (int i = 0; i < 10; ++i) {
        const GenerateRequest request = Echo("client " + std::to_string(c) + " request " + std::to_string(i), 50 + i);
        const Result<GenerateReply> reply = client->GenerateAll(request);
        if (reply.ok() && reply->ids == EchoService::Expected(request).ids) ++right;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right, 80);
}

TEST_F(ClientTest, OneClientServesManyThreads) {
  StartServer();
  const auto client = NewClient();
  std::vector<std::thread> threads;
  std::atomic<int> right = 0;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 20; ++i) {
        const std::string text = std::to_string(t) + "/" + std::to_string(i);
        const Result<std::vector<TokenId>> ids = client->Tokenize(text);
        const Result<GenerateReply> reply = client->GenerateAll(Echo(text, 20));
        if (ids.ok() && ids->size() == text.size() && reply.ok() &&
            reply->ids == EchoService::Expected(Echo(text, 20)).ids) {
          ++right;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right, 160);
}

// ---- daemons that are not ours ----

// A ROUTER that answers every message with what `answer` makes of it, until it is destroyed.
class FakeDaemon {
 public:
  using AnswerFn = std::function<codec::Frame(const codec::Frame&)>;

  FakeDaemon(const std::string& endpoint, AnswerFn answer) : answer_(std::move(answer)) {
    socket_.set(zmq::sockopt::linger, 0);
    socket_.set(zmq::sockopt::rcvtimeo, 20);
    socket_.bind(endpoint);
    thread_ = std::thread([this] { Run(); });
  }
  ~FakeDaemon() {
    stopping_ = true;
    thread_.join();
  }

 private:
  void Run() {
    while (!stopping_) {
      zmq::message_t peer, message;
      if (!socket_.recv(peer) || !socket_.recv(message)) continue;
      const auto* data = message.data<std::uint8_t>();
      const codec::Frame reply = answer_(codec::Frame(data, data + message.size()));
      socket_.send(peer, zmq::send_flags::sndmore);
      socket_.send(zmq::buffer(reply), zmq::send_flags::none);
    }
  }

  const AnswerFn answer_;
  std::atomic<bool> stopping_ = false;
  zmq::context_t context_;
  zmq::socket_t socket_{context_, zmq::socket_type::router};
  std::thread thread_;
};

std::uint64_t CorrelationOf(const codec::Frame& frame) {
  wire::FrameHeader header;
  EXPECT_EQ(wire::ReadHeader(frame, &header), wire::FrameFault::kNone);
  return header.correlation;
}

TEST_F(ClientTest, ADaemonOfAnotherVersionIsNamedAtOnce) {
  const FakeDaemon daemon(endpoint_, [](const codec::Frame& frame) {
    codec::Frame reply = codec::EncodeError(CorrelationOf(frame), Internal("in words this version cannot know"));
    reply[4] = 9;
    return reply;
  });
  const auto client = NewClient();
  const auto start = steady_clock::now();
  const Result<ServerInfo> info = client->Ping(kLong);
  KVS_EXPECT_FAILS(info, StatusCode::kFailedPrecondition, "version 9");
  EXPECT_LT(steady_clock::now() - start, kSlack);
  EXPECT_EQ(client->GenerateAll(Echo("x", 1)).status().code(), StatusCode::kFailedPrecondition);
}

TEST_F(ClientTest, ADaemonThatRefusesTheGreetingIsHeard) {
  const FakeDaemon daemon(endpoint_, [](const codec::Frame& frame) {
    return codec::EncodeError(CorrelationOf(frame), FailedPrecondition("upgrade first"));
  });
  KVS_EXPECT_FAILS(NewClient()->Ping(kLong), StatusCode::kFailedPrecondition, "upgrade first");
}

TEST_F(ClientTest, NonsenseFromADaemonIsAnErrorOfThatCall) {
  const FakeDaemon daemon(endpoint_, [greeted = false](const codec::Frame& frame) mutable {
    const std::uint64_t correlation = CorrelationOf(frame);
    if (!greeted) {
      greeted = true;
      return *codec::EncodeReply(correlation, codec::HelloAck{});
    }
    codec::Frame reply = *codec::EncodeReply(correlation, codec::Accepted{.request_id = 1});
    for (std::size_t i = wire::kHeaderBytes; i < reply.size(); ++i) reply[i] = 0xEE;
    return reply;
  });
  const auto client = NewClient();
  EXPECT_EQ(client->Tokenize("x").status().code(), StatusCode::kInternal);
  EXPECT_EQ(client->Generate(Echo("x", 1)).status().code(), StatusCode::kInternal);
}

TEST_F(ClientTest, AGenerationThatNobodyWaitsForIsCancelled) {
  std::promise<std::uint64_t> cancelled;
  const FakeDaemon daemon(endpoint_, [&cancelled, greeted = false](const codec::Frame& frame) mutable {
    if (!greeted) {
      greeted = true;
      return *codec::EncodeReply(CorrelationOf(frame), codec::HelloAck{});
    }
    wire::ReceivedFrame received;
    EXPECT_EQ(received.Load(frame, wire::FrameKind::kRequest), wire::FrameFault::kNone);
    const Result<codec::Request> request = codec::DecodeRequest(*received.request());
    const auto* cancel = request.ok() ? std::get_if<codec::Cancel>(&*request) : nullptr;
    if (cancel != nullptr) {
      cancelled.set_value(cancel->target);
      return codec::EncodeError(cancel->target, Cancelled("as asked"));
    }
    // Of a call that this client never made, or has given up.
    return *codec::EncodeReply(999, codec::Accepted{.request_id = 1});
  });
  const auto client = NewClient(milliseconds(50));
  EXPECT_FALSE(client->Tokenize("x").ok());
  std::future<std::uint64_t> target = cancelled.get_future();
  ASSERT_EQ(target.wait_for(kLong), std::future_status::ready);
  EXPECT_EQ(target.get(), 999u);
}

// 15 seconds: a daemon that is only slow should not go on computing what its client has given up.
TEST_F(ClientTest, StreamsOfASilentDaemonAreCancelled) {
  std::uint64_t stream = 0;
  std::promise<std::uint64_t> cancelled;
  const FakeDaemon daemon(endpoint_, [&, greeted = false](const codec::Frame& frame) mutable {
    if (!greeted) {
      greeted = true;
      return *codec::EncodeReply(CorrelationOf(frame), codec::HelloAck{});
    }
    if (stream == 0) {
      stream = CorrelationOf(frame);
      return *codec::EncodeReply(stream, codec::Accepted{.request_id = 1});
    }
    wire::ReceivedFrame received;
    EXPECT_EQ(received.Load(frame, wire::FrameKind::kRequest), wire::FrameFault::kNone);
    const Result<codec::Request> request = codec::DecodeRequest(*received.request());
    const auto* cancel = request.ok() ? std::get_if<codec::Cancel>(&*request) : nullptr;
    if (cancel != nullptr) cancelled.set_value(cancel->target);
    return codec::EncodeError(stream, Cancelled("as asked"));
  });
  const auto client = NewClient();
  const auto tokens = client->Generate({.prompt = TextPrompt{"x"}, .max_tokens = 1, .timeout = 4 * kLong});
  KVS_ASSERT_OK(tokens);
  KVS_EXPECT_FAILS((*tokens)->Next(), StatusCode::kUnavailable, "silent");
  std::future<std::uint64_t> target = cancelled.get_future();
  ASSERT_EQ(target.wait_for(kLong), std::future_status::ready);
  EXPECT_EQ(target.get(), stream);
}

TEST_F(ClientTest, ADaemonThatLetsItGoEndsItsCalls) {
  int frames = 0;
  const FakeDaemon daemon(endpoint_, [&](const codec::Frame& frame) {
    switch (++frames) {
      case 1: return *codec::EncodeReply(CorrelationOf(frame), codec::HelloAck{});
      case 2: return *codec::EncodeReply(CorrelationOf(frame), codec::Accepted{.request_id = 1});
      case 3: return codec::EncodeError(0, Unavailable("did not read, ask again"));
      default: return *codec::EncodeReply(CorrelationOf(frame), codec::Tokens{.ids = {7}});
    }
  });
  const auto client = NewClient();
  const auto tokens = client->Generate(Echo("x", 1));
  KVS_ASSERT_OK(tokens);
  KVS_EXPECT_FAILS(client->Tokenize("x"), StatusCode::kUnavailable, "ask again");
  KVS_EXPECT_FAILS((*tokens)->Next(), StatusCode::kUnavailable, "ask again");
  const auto ids = client->Tokenize("x");
  KVS_ASSERT_OK(ids);
  EXPECT_EQ(*ids, std::vector<TokenId>{7});
}

TEST_F(ClientTest, ADaemonThatIgnoresCreditIsCutOff) {
  // Answers everything after the greeting with one more chunk, asked or not.
  std::uint64_t stream = 0;
  bool accepted = false;
  const FakeDaemon daemon(endpoint_, [&stream, &accepted, greeted = false](const codec::Frame& frame) mutable {
    const std::uint64_t correlation = CorrelationOf(frame);
    if (!greeted) {
      greeted = true;
      return *codec::EncodeReply(correlation, codec::HelloAck{});
    }
    if (!accepted) {
      accepted = true;
      stream = correlation;
      return *codec::EncodeReply(correlation, codec::Accepted{.request_id = 1});
    }
    return *codec::EncodeReply(stream, TokenChunk{.ids = {1}, .text = "x"});
  });
  const auto client = NewClient(milliseconds(50));
  const auto tokens = client->Generate(Echo("x", 1));
  KVS_ASSERT_OK(tokens);
  // Each call makes the daemon send a chunk that nobody reads.
  for (int i = 0; i < 80; ++i) EXPECT_FALSE(client->Tokenize("x").ok());
  Status end;
  int chunks = 0;
  for (; end.ok(); ++chunks) end = (*tokens)->Next().status();
  EXPECT_EQ(end.code(), StatusCode::kInternal) << end.message();
  EXPECT_LE(chunks, 68);
}

}  // namespace
}  // namespace kvshare

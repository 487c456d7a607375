// What honest clients notice of a flood of malformed frames.
//
//   flood MODEL [FRAMES [ROUNDS]]       default: 1,000,000 frames, 10 rounds
//
// A daemon's server over ipc with MODEL, honest clients that each ask one request after another (a fresh prompt of 200
// tokens, 8 tokens of answer; and a Lookup), and a process that sends malformed frames as fast as the daemon takes
// them. Rounds with the flood and without take turns, so that whatever else the machine does meets both. Ends when
// FRAMES were read by the daemon and ROUNDS are over. Prints p50 and p99 of both.
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>
#include <zmq.hpp>

#include "agentd/server/router_server.h"
#include "agentd/service.h"
#include "kvshare/client.h"
#include "libkvshare/codec/codec.h"
#include "runtime/model.h"
#include "tests/testing/temp_dir.h"

namespace kvshare {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kClients = 2;
constexpr int kRequestsPerRound = 60;  // of each client
constexpr int kPromptTokens = 200;
constexpr int kFloodConnections = 4;

[[noreturn]] void Fail(const Status& status) {
  std::fprintf(stderr, "flood: %s\n", status.message().c_str());
  std::exit(1);
}

template <typename T>
T OrFail(Result<T> result) {
  if (!result.ok()) Fail(result.status());
  return *std::move(result);
}

// The other process: floods from 'g' to 's', until its parent has gone.
[[noreturn]] void Flood(const std::string& endpoint, int commands) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  zmq::context_t context;
  std::vector<zmq::socket_t> sockets;
  for (int i = 0; i < kFloodConnections; ++i) {
    sockets.emplace_back(context, zmq::socket_type::dealer);
    sockets.back().set(zmq::sockopt::linger, 0);
    sockets.back().set(zmq::sockopt::sndtimeo, 10);
    sockets.back().connect(endpoint);
  }
  std::mt19937_64 rng(7);
  const codec::Frame good = OrFail(codec::EncodeRequest(
      3, codec::Generate{.request = {.prompt = TokenPrompt{std::vector<TokenId>(100, 1)}}, .credit = 8}));
  std::vector<codec::Frame> frames;
  wire::ReceivedFrame received;
  while (frames.size() < 1000) {
    codec::Frame frame = good;
    for (int i = 0; i < 3; ++i) frame[rng() % frame.size()] = static_cast<std::uint8_t>(rng());
    if (rng() % 4 == 0) frame.resize(rng() % frame.size());
    if (received.Load(frame, wire::FrameKind::kRequest) != wire::FrameFault::kNone) frames.push_back(std::move(frame));
  }
  bool flooding = false;
  for (std::size_t n = 0;; ++n) {
    pollfd item{.fd = commands, .events = POLLIN, .revents = 0};
    if ((!flooding || n % 256 == 0) && ::poll(&item, 1, flooding ? 0 : -1) > 0) {
      char command = 0;
      if (::read(commands, &command, 1) != 1) std::_Exit(0);
      flooding = command == 'g';
      continue;
    }
    (void)sockets[n % sockets.size()].send(zmq::buffer(frames[n % frames.size()]), zmq::send_flags::none);
  }
}

struct Times {
  std::vector<double> generate, lookup;  // ms
};

double Percentile(std::vector<double> times, double p) {
  std::sort(times.begin(), times.end());
  return times[static_cast<std::size_t>(p * static_cast<double>(times.size() - 1))];
}

template <typename F>
double Took(const F& call) {
  const auto start = Clock::now();
  call();
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

void Round(const std::vector<std::unique_ptr<Client>>& clients, int round, Times* times) {
  std::array<Times, kClients> own;
  std::vector<std::jthread> threads;
  for (std::size_t c = 0; c < kClients; ++c) {
    threads.emplace_back([&, c] {
      std::mt19937 rng(static_cast<unsigned>(round * kClients) + static_cast<unsigned>(c));
      for (int i = 0; i < kRequestsPerRound; ++i) {
        TokenPrompt prompt;
        for (int t = 0; t < kPromptTokens; ++t) prompt.ids.push_back(static_cast<TokenId>(10 + rng() % 1000));
        own[c].generate.push_back(
            Took([&] { OrFail(clients[c]->GenerateAll({.prompt = prompt, .max_tokens = 8, .ignore_eos = true})); }));
        own[c].lookup.push_back(Took([&] { OrFail(clients[c]->Lookup({.prompt = prompt})); }));
      }
    });
  }
  threads.clear();
  for (const Times& one : own) {
    times->generate.insert(times->generate.end(), one.generate.begin(), one.generate.end());
    times->lookup.insert(times->lookup.end(), one.lookup.begin(), one.lookup.end());
  }
}

int Main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: flood MODEL [FRAMES [ROUNDS]]\n");
    return 2;
  }
  const std::int64_t frames = argc > 2 ? std::atoll(argv[2]) : 1000000;
  const int rounds = argc > 3 ? std::atoi(argv[3]) : 10;
  const kvshare::testing::TempDir dir;
  const std::string endpoint = "ipc://" + dir.File("d.sock");
  std::array<int, 2> commands{};
  if (::pipe(commands.data()) != 0) return 1;
  const pid_t child = ::fork();  // before there is a thread
  if (child == 0) Flood(endpoint, commands[0]);

  auto service = OrFail(agentd::NewService(OrFail(runtime::LoadModel(argv[1], {.threads = 1})), {}));
  auto server = OrFail(agentd::StartRouterServer(service.get(), {.endpoint = endpoint}));
  std::vector<std::unique_ptr<Client>> clients;
  for (int c = 0; c < kClients; ++c) clients.push_back(OrFail(Connect({.endpoint = endpoint})));
  const auto tell = [&commands](char command) {
    if (::write(commands[1], &command, 1) != 1) std::exit(1);
  };

  Times quiet, flooded, ignored;
  Round(clients, 1000000, &ignored);
  int round = 0;
  double seconds = 0;
  while (round < rounds || server->counters().malformed_frames < frames) {
    Round(clients, 2 * round, &quiet);
    tell('g');
    seconds += Took([&] { Round(clients, 2 * round + 1, &flooded); }) / 1000;
    tell('s');
    ++round;
  }
  const std::int64_t malformed = server->counters().malformed_frames;
  std::printf("%lld malformed frames in %.1f s, %d rounds of %d requests of %d clients each way\n",
              static_cast<long long>(malformed), seconds, round, kRequestsPerRound, kClients);
  const auto row = [](const char* what, const std::vector<double>& a, const std::vector<double>& b) {
    for (const double p : {0.5, 0.99}) {
      const double quiet_ms = Percentile(a, p), flooded_ms = Percentile(b, p);
      std::printf("%-8s p%-2.0f  quiet %8.3f ms  flooded %8.3f ms  %+6.1f %%\n", what, 100 * p, quiet_ms, flooded_ms,
                  100 * (flooded_ms / quiet_ms - 1));
    }
  };
  row("generate", quiet.generate, flooded.generate);
  row("lookup", quiet.lookup, flooded.lookup);
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  server->DrainAndStop();
  return 0;
}

}  // namespace
}  // namespace kvshare

int main(int argc, char** argv) { return kvshare::Main(argc, argv); }

// The wire's cost.
//
//   EncodeGenerate, DecodeGenerate   a request with 3,000 token ids
//   EncodeDone, DecodeDone           a reply with 3,000 token ids and their text
//   BareRoundTrip                    DEALER to ROUTER and back over ipc, 100 bytes: what ZeroMQ and two wake-ups cost
//   PingRoundTrip                    kvshare::Client::Ping over ipc; the caller's own wake-up comes on top
//   StreamedToken                    a reply of 3,000 tokens, one chunk a token where the reader keeps up
//   LookupRoundTrip, AcquireRoundTrip  of a stored prompt of 2,048 tokens, from a service that runs a model; Acquire
//                                      finds and leases; its release is not timed
//   AcquireAndRelease                  with the release, which is not waited for but delays the next
//   LookupInProcess, AcquireInProcess  the same asked of the service itself, with the release
//   Handover/MiB                     a lease of so much KV, until its last page is at hand to be read
//   HandoverCopied/MiB               and copied out of it
#include <benchmark/benchmark.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <thread>
#include <zmq.hpp>

#include "agentd/server/router_server.h"
#include "agentd/service.h"
#include "kvshare/client.h"
#include "libkvshare/codec/codec.h"
#include "runtime/model.h"
#include "tests/testing/echo_service.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace kvshare {
namespace {

constexpr int kTokens = 3000;

[[noreturn]] void Fail(const Status& status) {
  std::fprintf(stderr, "wire_bench: %s\n", status.message().c_str());
  std::exit(1);
}

std::vector<TokenId> Ids() {
  std::vector<TokenId> ids(kTokens);
  std::iota(ids.begin(), ids.end(), 1000);
  return ids;
}

codec::Request GenerateMessage() {
  return codec::Generate{
      .request = {.prompt = TokenPrompt{Ids()}, .stop = {"\n\n"}, .agent = "planner", .session = "s"}, .credit = 64};
}

codec::Reply DoneMessage() {
  return GenerateReply{.request_id = 1,
                       .ids = Ids(),
                       .text = std::string(4 * kTokens, 'a'),
                       .prompt_tokens = kTokens,
                       .reuse = {.fresh_tokens = kTokens, .miss_reasons = {{"never_seen", kTokens}}}};
}

template <typename T>
T OrFail(Result<T> result) {
  if (!result.ok()) Fail(result.status());
  return *std::move(result);
}

void CountBytes(benchmark::State& state, std::size_t bytes) {
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(bytes));
}

void BM_EncodeGenerate(benchmark::State& state) {
  const codec::Request request = GenerateMessage();
  std::size_t bytes = 0;
  for (auto _ : state) {
    const codec::Frame frame = OrFail(codec::EncodeRequest(1, request));
    bytes = frame.size();
    benchmark::DoNotOptimize(frame.data());
  }
  CountBytes(state, bytes);
}
BENCHMARK(BM_EncodeGenerate);

void BM_DecodeGenerate(benchmark::State& state) {
  const codec::Frame frame = OrFail(codec::EncodeRequest(1, GenerateMessage()));
  wire::ReceivedFrame received;
  for (auto _ : state) {
    if (received.Load(frame, wire::FrameKind::kRequest) != wire::FrameFault::kNone) Fail(Internal("bad frame"));
    const codec::Request request = OrFail(codec::DecodeRequest(*received.request()));
    benchmark::DoNotOptimize(&request);
  }
  CountBytes(state, frame.size());
}
BENCHMARK(BM_DecodeGenerate);

void BM_EncodeDone(benchmark::State& state) {
  const codec::Reply reply = DoneMessage();
  std::size_t bytes = 0;
  for (auto _ : state) {
    const codec::Frame frame = OrFail(codec::EncodeReply(1, reply));
    bytes = frame.size();
    benchmark::DoNotOptimize(frame.data());
  }
  CountBytes(state, bytes);
}
BENCHMARK(BM_EncodeDone);

void BM_DecodeDone(benchmark::State& state) {
  const codec::Frame frame = OrFail(codec::EncodeReply(1, DoneMessage()));
  wire::ReceivedFrame received;
  for (auto _ : state) {
    if (received.Load(frame, wire::FrameKind::kReply) != wire::FrameFault::kNone) Fail(Internal("bad frame"));
    const codec::Reply reply = OrFail(codec::DecodeReply(*received.reply()));
    benchmark::DoNotOptimize(&reply);
  }
  CountBytes(state, frame.size());
}
BENCHMARK(BM_DecodeDone);

void BM_BareRoundTrip(benchmark::State& state) {
  const kvshare::testing::TempDir dir;
  const std::string endpoint = "ipc://" + dir.File("b.sock");
  zmq::context_t server_context, client_context;
  zmq::socket_t router(server_context, zmq::socket_type::router);
  router.set(zmq::sockopt::linger, 0);
  router.bind(endpoint);
  std::thread echo([&router] {
    while (true) {
      zmq::message_t peer, message;
      if (!router.recv(peer) || !router.recv(message) || message.size() == 0) return;
      router.send(peer, zmq::send_flags::sndmore);
      router.send(message, zmq::send_flags::none);
    }
  });
  zmq::socket_t dealer(client_context, zmq::socket_type::dealer);
  dealer.set(zmq::sockopt::linger, -1);
  dealer.connect(endpoint);
  const std::string request(100, 'x');
  for (auto _ : state) {
    zmq::message_t reply;
    if (!dealer.send(zmq::buffer(request), zmq::send_flags::none) || !dealer.recv(reply)) Fail(Internal("no reply"));
  }
  dealer.send(zmq::message_t(), zmq::send_flags::none);
  echo.join();
}
BENCHMARK(BM_BareRoundTrip)->UseRealTime();

struct Daemon {
  kvshare::testing::TempDir dir;
  kvshare::testing::EchoService service;
  std::unique_ptr<agentd::RouterServer> server =
      OrFail(agentd::StartRouterServer(&service, {.endpoint = "ipc://" + dir.File("d.sock")}));
  std::unique_ptr<Client> client = OrFail(Connect({.endpoint = server->endpoint()}));
};

void BM_PingRoundTrip(benchmark::State& state) {
  const Daemon daemon;
  for (auto _ : state) {
    OrFail(daemon.client->Ping(std::chrono::seconds(10)));
  }
}
BENCHMARK(BM_PingRoundTrip)->UseRealTime();

void BM_StreamedToken(benchmark::State& state) {
  const Daemon daemon;
  const GenerateRequest request{.prompt = TokenPrompt{Ids()}, .max_tokens = kTokens};
  if (OrFail(daemon.client->GenerateAll(request)).ids != Ids()) Fail(Internal("wrong tokens"));
  for (auto _ : state) {
    OrFail(daemon.client->GenerateAll(request));
  }
  state.SetItemsProcessed(state.iterations() * kTokens);
}
BENCHMARK(BM_StreamedToken)->UseRealTime();

// A service that runs a (tiny) model, with a prompt stored.
struct ModelDaemon {
  static constexpr int kStored = 2048;

  ModelDaemon() {
    const Status written = kvshare::testing::WriteTinyModel(dir.path(), {.max_positions = 4096});
    if (!written.ok()) Fail(written);
    std::unique_ptr<runtime::Model> model = OrFail(runtime::LoadModel(dir.path().string(), {.threads = 1}));
    service = OrFail(agentd::NewService(std::move(model), {.kv_pool_bytes = 64 << 20}));
    server = OrFail(agentd::StartRouterServer(service.get(), {.endpoint = "ipc://" + dir.File("d.sock")}));
    client = OrFail(Connect({.endpoint = server->endpoint()}));
    for (int i = 0; i < kStored; ++i) prompt.ids.push_back(i % 250);
    OrFail(client->GenerateAll({.prompt = prompt, .max_tokens = 1}));
  }

  kvshare::testing::TempDir dir;
  std::unique_ptr<agentd::Service> service;
  std::unique_ptr<agentd::RouterServer> server;
  std::unique_ptr<Client> client;
  TokenPrompt prompt;
};

void BM_LookupRoundTrip(benchmark::State& state) {
  const ModelDaemon daemon;
  for (auto _ : state) {
    if (OrFail(daemon.client->Lookup({.prompt = daemon.prompt})).prefix_tokens == 0) Fail(Internal("nothing stored"));
  }
}
BENCHMARK(BM_LookupRoundTrip)->UseRealTime();

Lease AcquireWhole(const ModelDaemon& daemon) {
  Lease lease = OrFail(daemon.client->Acquire({.prompt = daemon.prompt}));
  if (!lease.Valid() || lease.tokens() < ModelDaemon::kStored - 64) Fail(Internal("nothing leased"));
  return lease;
}

void BM_AcquireRoundTrip(benchmark::State& state) {
  const ModelDaemon daemon;
  for (auto _ : state) {
    const auto start = std::chrono::steady_clock::now();
    Lease lease = AcquireWhole(daemon);
    state.SetIterationTime(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    const Status released = lease.Release();
    if (!released.ok()) Fail(released);
  }
}
BENCHMARK(BM_AcquireRoundTrip)->UseManualTime();

void BM_AcquireAndRelease(benchmark::State& state) {
  const ModelDaemon daemon;
  for (auto _ : state) {
    AcquireWhole(daemon);
  }
}
BENCHMARK(BM_AcquireAndRelease)->UseRealTime();

// The same of the service, in one's own process: what is left of the round trips is the wire's.
void BM_LookupInProcess(benchmark::State& state) {
  const ModelDaemon daemon;
  for (auto _ : state) {
    if (OrFail(daemon.service->Lookup({.prompt = daemon.prompt})).prefix_tokens == 0) Fail(Internal("nothing stored"));
  }
}
BENCHMARK(BM_LookupInProcess)->UseRealTime();

void BM_AcquireInProcess(benchmark::State& state) {
  const ModelDaemon daemon;
  for (auto _ : state) {
    const LeaseInfo lease = OrFail(daemon.service->Acquire({.prompt = daemon.prompt}));
    const Status released = daemon.service->Release(lease.id);
    if (!released.ok()) Fail(released);
  }
}
BENCHMARK(BM_AcquireInProcess)->UseRealTime();

constexpr std::int64_t kHandoverPageBytes = 1 << 20;

struct MemoryDaemon {
  MemoryDaemon() {
    const Status shared = service.ShareMemory(64, kHandoverPageBytes);
    if (!shared.ok()) Fail(shared);
    server = OrFail(agentd::StartRouterServer(&service, {.endpoint = "ipc://" + dir.File("d.sock")}));
    client = OrFail(Connect({.endpoint = server->endpoint()}));
  }
  // KV of `mib` MiB, one page of 1 MiB for each 64 tokens.
  Lease Acquire(std::int64_t mib) const {
    return OrFail(client->Acquire({.prompt = TokenPrompt{std::vector<TokenId>(static_cast<std::size_t>(64 * mib))}}));
  }

  kvshare::testing::TempDir dir;
  kvshare::testing::EchoService service;
  std::unique_ptr<agentd::RouterServer> server;
  std::unique_ptr<Client> client;
};

void BM_Handover(benchmark::State& state) {
  const MemoryDaemon daemon;
  for (auto _ : state) {
    const Lease lease = daemon.Acquire(state.range(0));
    const std::span<const std::byte> last = OrFail(lease.PageBytes(lease.pages().size() - 1));
    std::byte read = last.back();
    benchmark::DoNotOptimize(read);
    if (!lease.Valid()) Fail(Internal("the lease does not hold"));
  }
  state.counters["MiB"] = static_cast<double>(state.range(0));
}
BENCHMARK(BM_Handover)->RangeMultiplier(4)->Range(1, 64)->UseRealTime();

void BM_HandoverCopied(benchmark::State& state) {
  const MemoryDaemon daemon;
  std::vector<std::byte> copy(static_cast<std::size_t>(state.range(0) * kHandoverPageBytes));
  for (auto _ : state) {
    const Lease lease = daemon.Acquire(state.range(0));
    for (std::size_t i = 0; i < lease.pages().size(); ++i) {
      const std::span<const std::byte> page = OrFail(lease.PageBytes(i));
      std::memcpy(copy.data() + i * page.size(), page.data(), page.size());
    }
    if (!lease.Valid()) Fail(Internal("the lease does not hold"));
  }
  CountBytes(state, copy.size());
}
BENCHMARK(BM_HandoverCopied)->RangeMultiplier(4)->Range(1, 64)->UseRealTime();

}  // namespace
}  // namespace kvshare

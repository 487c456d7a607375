// Many clients at once, who ask, give up, lease, pin and evict as they please, over a pool and a disk that are both too
// small: every answer is right, and at the end nothing is held, nothing waits and nothing is broken.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/agentd/service_harness.h"
#include "tests/testing/temp_dir.h"

namespace kvshare::testing {
namespace {

using Ids = std::vector<TokenId>;

constexpr int kClients = 64;
constexpr int kRequestsPerClient = 80;

std::uint32_t Seed() {
  const char* given = std::getenv("KVSHARE_TEST_SEED");
  return given == nullptr ? 3u : static_cast<std::uint32_t>(std::strtoul(given, nullptr, 10));
}

class Client {
 public:
  Client(TapeService* tape, std::uint32_t seed) : tape_(tape), rng_(seed) {}

  void Run() {
    for (int i = 0; i < kRequestsPerClient && !::testing::Test::HasFailure(); ++i) {
      switch (Below(12)) {
        case 0: Lease(); break;
        case 1: Pin(); break;
        case 2: Look(); break;
        case 3: Cancelled(); break;
        case 4: Late(); break;
        default: Generate();
      }
    }
  }

  static std::atomic<int> answered;

 private:
  int Below(int n) { return std::uniform_int_distribution<int>(0, n - 1)(rng_); }

  // One of a few conversations, cut somewhere, perhaps with an end of its own.
  Ids Prompt() {
    Ids ids;
    const int story = Below(6), length = 1 + Below(700);
    for (int i = 0; i < length; ++i) ids.push_back((story * 11 + i * (3 + story)) % 50);
    for (int more = Below(3) == 0 ? Below(60) : 0; more > 0; --more) ids.push_back(Below(50));
    return ids;
  }

  GenerateRequest Request() {
    GenerateRequest request = IdsRequest(Prompt(), Below(8) == 0 ? 0 : 1 + Below(20), "a" + std::to_string(Below(5)));
    if (Below(10) == 0) request.reuse = ReuseMode::kOff;
    return request;
  }

  void Generate() {
    const GenerateRequest request = Request();
    const auto recorder = std::make_shared<Recorder>();
    const Result<std::uint64_t> id = tape_->service->Generate(request, recorder);
    if (!id.ok()) {
      EXPECT_EQ(id.status().code(), StatusCode::kResourceExhausted) << id.status().message();
      return;
    }
    const Recorder::Outcome& outcome = recorder->Wait();
    ASSERT_TRUE(outcome.reply.has_value()) << outcome.error.message();
    tape_->CheckReply(request, outcome);
    ++answered;
  }

  void Cancelled() {
    const auto recorder = std::make_shared<Recorder>();
    const Result<std::uint64_t> id = tape_->service->Generate(Request(), recorder);
    if (!id.ok()) return;
    if (Below(2) == 0) std::this_thread::yield();
    tape_->service->Cancel(*id);
    const Recorder::Outcome& outcome = recorder->Wait();
    if (!outcome.reply.has_value()) {
      EXPECT_EQ(outcome.error.code(), StatusCode::kCancelled);
    }
  }

  void Late() {
    GenerateRequest request = Request();
    request.timeout = std::chrono::milliseconds(1 + Below(4));
    const auto recorder = std::make_shared<Recorder>();
    if (!tape_->service->Generate(request, recorder).ok()) return;
    const Recorder::Outcome& outcome = recorder->Wait();
    if (!outcome.reply.has_value()) {
      EXPECT_EQ(outcome.error.code(), StatusCode::kDeadlineExceeded);
    }
  }

  void Lease() {
    AcquireRequest request;
    request.prompt = TokenPrompt{Prompt()};
    request.ttl = std::chrono::milliseconds(1 + Below(20));
    const Result<LeaseInfo> lease = tape_->service->Acquire(request);
    if (!lease.ok()) {
      EXPECT_EQ(lease.status().code(), StatusCode::kResourceExhausted) << lease.status().message();
    } else if (lease->id != 0 && Below(3) > 0) {
      const Status released = tape_->service->Release(lease->id);
      EXPECT_TRUE(released.ok() || released.code() == StatusCode::kNotFound) << released.message();
    }
  }

  void Pin() {
    PinRequest request;
    request.prompt = TokenPrompt{Prompt()};
    request.ttl = std::chrono::milliseconds(1 + Below(20));
    const Result<PinInfo> pin = tape_->service->Pin(request);
    if (pin.ok() && Below(2) == 0) static_cast<void>(tape_->service->Unpin(pin->key));
  }

  void Look() {
    LookupRequest request;
    request.prompt = TokenPrompt{Prompt()};
    switch (Below(20)) {
      case 0: static_cast<void>(tape_->service->Evict({.host = Below(2) == 0, .cold = Below(2) == 0})); break;
      case 1: EXPECT_TRUE(tape_->service->Entries({.limit = 50}).ok()); break;
      case 2: {
        const Status status = tape_->service->CheckIntegrity();
        EXPECT_TRUE(status.ok()) << status.message();
        break;
      }
      case 3: EXPECT_GE(tape_->service->GetStats().uptime_s, 0); break;
      case 4: EXPECT_TRUE(tape_->service->Prefetch(request).ok()); break;
      default: EXPECT_TRUE(tape_->service->Lookup(request).ok());
    }
  }

  TapeService* const tape_;
  std::mt19937 rng_;
};

std::atomic<int> Client::answered = 0;

TEST(EngineStressTest, ManyClientsLeaveNothingBehind) {
  SCOPED_TRACE("KVSHARE_TEST_SEED=" + std::to_string(Seed()));
  const TempDir dir;
  agentd::ServiceOptions options;
  options.cold_dir = (dir.path() / "cold").string();
  options.max_running = 12;
  options.max_waiting = 48;  // fewer than there are clients
  options.prefill_chunk_tokens = 100;
  TapeService tape({.eos = 3}, 40, options, std::make_shared<TierHooks>());
  // Now and then a page is lost, damaged or unreadable on its way.
  std::atomic<std::uint32_t> loads = 0;
  tape.hooks->on_loaded = [&loads](std::vector<agentd::ColdLoaded>& loaded) {
    const std::uint32_t n = ++loads;
    const Status troubles[] = {NotFound("x"), DataLoss("x"), Unavailable("x")};
    if (n % 5 == 0) loaded[n % loaded.size()].status = troubles[n / 5 % 3];
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < kClients; ++i) {
    threads.emplace_back([&tape, i] { Client(&tape, Seed() * 1000 + static_cast<std::uint32_t>(i)).Run(); });
  }
  for (std::thread& thread : threads) thread.join();
  tape.service->Drain();
  tape.ExpectSound();
  EXPECT_GT(Client::answered, kClients * kRequestsPerClient / 4);
  EXPECT_GT(loads, 0u);
  // The last leases and pins end by themselves.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  Stats stats = tape.service->GetStats();
  while ((stats.client_leases > 0 || stats.pinned_bytes > 0) && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::yield();
    stats = tape.service->GetStats();
  }
  EXPECT_EQ(stats.client_leases, 0);
  EXPECT_EQ(stats.pinned_bytes, 0);
  EXPECT_EQ(stats.pool.leases, 0);
  EXPECT_EQ(stats.requests_running, 0);
  EXPECT_EQ(stats.requests_waiting, 0);
}

}  // namespace
}  // namespace kvshare::testing

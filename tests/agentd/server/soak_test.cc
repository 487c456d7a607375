// Many clients that behave as clients do: they cancel, vanish, read slowly, lease and forget. Afterwards nothing is
// held, nothing runs, and the pool's invariants stand. KVSHARE_SOAK_REQUESTS sets how many requests (default 1,000).
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "agentd/server/router_server.h"
#include "agentd/service.h"
#include "kvshare/client.h"
#include "runtime/model.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::agentd {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr int kClients = 64;

int Requests() {
  const char* text = std::getenv("KVSHARE_SOAK_REQUESTS");
  return text == nullptr ? 1000 : std::max(1, std::atoi(text));
}

// A few texts that many share, first or behind words of one's own, and an end of one's own.
TokenPrompt PromptOf(std::mt19937& rng) {
  TokenPrompt prompt;
  if (rng() % 3 == 0) {
    for (int i = static_cast<int>(rng() % 40); i > 0; --i) prompt.ids.push_back(static_cast<TokenId>(rng() % 250));
  }
  const int shared = static_cast<int>(rng() % 4);
  for (int i = 0; i < 40 + 40 * shared; ++i) prompt.ids.push_back((7 * i + shared) % 250);
  for (int i = static_cast<int>(rng() % 30); i > 0; --i) prompt.ids.push_back(static_cast<TokenId>(rng() % 250));
  return prompt;
}

struct Tally {
  std::atomic<int> done = 0;
  std::atomic<int> cancelled = 0;
  std::atomic<int> left = 0;
  std::atomic<int> leased = 0;
  std::atomic<int> invalid = 0;
  std::atomic<int> wrong = 0;
};

// One request in one of a client's ways. False: the client goes.
bool OneRequest(Client& client, std::mt19937& rng, Tally& tally) {
  const TokenPrompt prompt = PromptOf(rng);
  const unsigned way = rng() % 10;
  if (way < 2) {
    Result<Lease> lease = client.Acquire({.prompt = prompt});
    if (!lease.ok()) {
      if (lease.status().code() != StatusCode::kResourceExhausted) ++tally.wrong;
      return true;
    }
    ++tally.leased;
    for (std::size_t i = 0; i < lease->pages().size(); ++i) {
      const auto bytes = lease->PageBytes(i);
      if (!bytes.ok() || bytes->empty()) ++tally.wrong;
    }
    if (!lease->Valid()) ++tally.invalid;  // no page of a lease that lasts may change
    return rng() % 4 != 0;                 // some go with their lease in hand
  }
  constexpr ReuseMode kModes[] = {ReuseMode::kExact,  ReuseMode::kOff,        ReuseMode::kRotate,
                                  ReuseMode::kKvcomm, ReuseMode::kCacheBlend, ReuseMode::kAuto};
  const auto stream = client.Generate({.prompt = prompt,
                                       .max_tokens = static_cast<int>(1 + rng() % 24),
                                       .ignore_eos = true,
                                       .agent = "soak",
                                       .session = "s" + std::to_string(rng() % 3),
                                       .reuse = kModes[rng() % std::size(kModes)]});
  if (!stream.ok()) {
    if (stream.status().code() != StatusCode::kResourceExhausted) ++tally.wrong;
    return true;
  }
  if (way == 2) {
    ++tally.left;
    return false;  // in the middle of a stream
  }
  for (int read = 0;; ++read) {
    if (way == 3 && read == 1) {
      (*stream)->Cancel();
      ++tally.cancelled;
      return true;
    }
    if (way == 4) std::this_thread::yield();  // a slow reader
    const auto chunk = (*stream)->Next();
    if (!chunk.ok()) {
      ++tally.wrong;
      return true;
    }
    if (!chunk->has_value()) break;
  }
  const ReuseReport& reuse = (*stream)->reply().reuse;
  const std::int64_t told = reuse.prefix_tokens + reuse.moved_tokens + reuse.recomputed_tokens + reuse.fresh_tokens;
  if (told != static_cast<std::int64_t>(prompt.ids.size())) ++tally.wrong;
  ++tally.done;
  return true;
}

TEST(SoakTest, NothingIsHeldWhenTheClientsHaveGone) {
  kvshare::testing::TempDir dir;
  ASSERT_TRUE(kvshare::testing::WriteTinyModel(dir.path()).ok());
  auto model = runtime::LoadModel(dir.path().string(), {.threads = 1});
  KVS_ASSERT_OK(model);
  // Small enough that leases and requests compete for it.
  auto service = NewService(*std::move(model), {.kv_pool_bytes = 4 << 20});
  KVS_ASSERT_OK(service);
  auto server = StartRouterServer(service->get(), {.endpoint = "ipc://" + dir.File("d.sock")});
  KVS_ASSERT_OK(server);

  Tally tally;
  Stats peak;
  std::mutex mu;
  const auto watch = [&] {
    const Stats now = (*service)->GetStats();
    const std::lock_guard lock(mu);
    peak.requests_waiting = std::max(peak.requests_waiting, now.requests_waiting);
    peak.requests_running = std::max(peak.requests_running, now.requests_running);
    peak.client_leases = std::max(peak.client_leases, now.client_leases);
  };
  std::atomic<int> budget = Requests();
  std::vector<std::thread> clients;
  for (int c = 0; c < kClients; ++c) {
    clients.emplace_back([&, c] {
      std::mt19937 rng(static_cast<unsigned>(c));
      while (budget > 0) {
        const auto client = Connect({.endpoint = (*server)->endpoint(), .timeout = milliseconds(120000)});
        if (!client.ok()) {
          ++tally.wrong;
          return;
        }
        while (budget-- > 0 && OneRequest(**client, rng, tally)) watch();
      }
    });
  }
  for (std::thread& client : clients) client.join();
  // Each client has one request or lease at a time, and may have gone from one that the daemon has not ended yet.
  EXPECT_LE(peak.requests_running, 64);
  EXPECT_LE(peak.requests_waiting, 4 * kClients);
  EXPECT_LE(peak.client_leases, 4 * kClients);

  const auto deadline = steady_clock::now() + std::chrono::seconds(30);
  Stats stats = (*service)->GetStats();
  while ((stats.requests_running > 0 || stats.requests_waiting > 0 || stats.client_leases > 0) &&
         steady_clock::now() < deadline) {
    std::this_thread::yield();
    stats = (*service)->GetStats();
  }
  EXPECT_EQ(stats.requests_running, 0);
  EXPECT_EQ(stats.requests_waiting, 0);
  EXPECT_EQ(stats.client_leases, 0);
  EXPECT_EQ(tally.wrong, 0);
  EXPECT_GT(stats.approximate.answers, 0);
  EXPECT_EQ(tally.invalid, 0);
  const Status whole = (*service)->CheckIntegrity();
  EXPECT_TRUE(whole.ok()) << whole.message();
  std::printf(
      "%d done, %d cancelled, %d left in the middle, %d leases; at most %lld running, %lld waiting, %lld leased\n",
      tally.done.load(), tally.cancelled.load(), tally.left.load(), tally.leased.load(),
      static_cast<long long>(peak.requests_running), static_cast<long long>(peak.requests_waiting),
      static_cast<long long>(peak.client_leases));
  (*server)->DrainAndStop();
}

}  // namespace
}  // namespace kvshare::agentd

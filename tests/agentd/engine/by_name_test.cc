// Stored KV by name: leases and pins hold what they say for as long as they say, lists and evictions tell the truth
// about both tiers.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "agentd/in_process_client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/agentd/service_harness.h"
#include "tests/agentd/tiny_service.h"
#include "tests/testing/ids.h"
#include "tests/testing/temp_dir.h"

namespace kvshare::testing {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;
using Ids = std::vector<TokenId>;

Ids Counting(std::int64_t n, TokenId start = 0) {
  Ids ids;
  for (std::int64_t i = 0; i < n; ++i) ids.push_back(static_cast<TokenId>((start + i * 7) % 50));
  return ids;
}

LookupRequest LookupOf(const Ids& ids) {
  LookupRequest request;
  request.prompt = TokenPrompt{ids};
  return request;
}

AcquireRequest AcquireOf(const Ids& ids, milliseconds ttl = std::chrono::minutes(1)) {
  AcquireRequest request;
  request.prompt = TokenPrompt{ids};
  request.ttl = ttl;
  return request;
}

PinRequest PinOf(const Ids& ids, milliseconds ttl = milliseconds(0)) {
  PinRequest request;
  request.prompt = TokenPrompt{ids};
  request.ttl = ttl;
  return request;
}

// Waits until `done` is true; false after 20 seconds.
template <typename Done>
bool Eventually(Done done) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!done()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::yield();
  }
  return true;
}

TEST(LookupTest, SaysWhatIsStored) {
  TapeService tape;
  const Ids prompt = Counting(200);
  EXPECT_EQ(tape.service->Lookup(LookupOf(prompt))->prefix_tokens, 0);
  tape.Ask(IdsRequest(prompt, 0));
  const Result<Match> match = tape.service->Lookup(LookupOf(prompt));
  ASSERT_TRUE(match.ok());
  EXPECT_EQ(match->prompt_tokens, 200);
  EXPECT_EQ(match->prefix_tokens, 199);
  EXPECT_EQ(match->host_tokens, 199);
  EXPECT_EQ(match->cold_tokens, 0);
  EXPECT_EQ(tape.service->Lookup(LookupOf({})).status().code(), StatusCode::kInvalidArgument);
}

TEST(LookupTest, SaysWhatTheSessionHasElsewhere) {
  const auto service = NewTinyService(kernels::DType::kF32);
  ASSERT_NE(service, nullptr);
  std::mt19937 rng(7);
  const Ids note = RandomIds(rng, 150), planner = Join({RandomIds(rng, 30), note, RandomIds(rng, 9)}),
            critic = Join({RandomIds(rng, 45), note, RandomIds(rng, 9)});
  const auto chunk_tokens = [&](const std::string& session) {
    LookupRequest lookup = LookupOf(critic);
    lookup.session = session;
    const Result<Match> match = service->Lookup(lookup);
    EXPECT_TRUE(match.ok());
    return match.ok() ? match->chunk_tokens : -1;
  };
  EXPECT_EQ(chunk_tokens("s"), 0);
  const auto ask = [&](const Ids& prompt) {
    GenerateRequest request = IdsRequest(prompt, 1);
    request.session = "s";
    request.reuse = ReuseMode::kRotate;
    return Ask(*service, request).reuse;
  };
  ask(planner);
  const std::int64_t found = chunk_tokens("s");
  EXPECT_EQ(found, 150 - 4) << "the note, and not its edges";
  EXPECT_EQ(chunk_tokens("t"), 0) << "nothing crosses a session";
  EXPECT_EQ(chunk_tokens(""), 0);
  EXPECT_EQ(ask(critic).moved_tokens, found);
}

TEST(StoreOnlyTest, APromptIsComputedStoredAndNotAnswered) {
  TapeService tape;
  const Ids prompt = Counting(200);
  const auto recorder = tape.Start(IdsRequest(prompt, 0));
  const Recorder::Outcome& outcome = recorder->Wait();
  ASSERT_TRUE(outcome.reply.has_value()) << outcome.error.message();
  EXPECT_TRUE(outcome.reply->ids.empty());
  EXPECT_EQ(outcome.reply->finish_reason, FinishReason::kLength);
  EXPECT_EQ(outcome.reply->reuse.fresh_tokens, 200);
  EXPECT_EQ(tape.probe->rows, 200);
  EXPECT_EQ(tape.service->Acquire(AcquireOf(prompt))->tokens, 200);  // the last token, too
  EXPECT_EQ(tape.Ask(IdsRequest(prompt, 5)).reuse.prefix_tokens, 199);
  tape.Ask(IdsRequest(prompt, 0));  // again: one row is computed
  EXPECT_EQ(tape.probe->rows, 200 + 5 + 1);
  tape.ExpectSound();
}

TEST(LeaseTest, ALeaseShowsTheKvItself) {
  TapeService tape;
  const auto client = agentd::NewInProcessClient(tape.service.get());
  const Ids prompt = Counting(150);
  tape.Ask(IdsRequest(prompt, 0));
  Ids longer = prompt;
  longer.push_back(3);
  Result<Lease> lease = client->Acquire(AcquireOf(longer));
  ASSERT_TRUE(lease.ok()) << lease.status().message();
  EXPECT_EQ(lease->tokens(), 150);
  ASSERT_EQ(lease->pages().size(), 3u);
  EXPECT_EQ(lease->layout().page_tokens, 64);
  std::int64_t t = 0;
  for (std::size_t p = 0; p < 3; ++p) {
    const LeasePage& page = lease->pages()[p];
    EXPECT_EQ(page.start, t);
    const Result<std::span<const std::byte>> bytes = lease->PageBytes(p);
    ASSERT_TRUE(bytes.ok()) << bytes.status().message();
    for (int row = 0; row < page.valid_tokens; ++row, ++t) {
      std::int32_t id = 0;
      std::memcpy(&id, bytes->data() + 4 * row, 4);  // the tape keeps ids in K
      EXPECT_EQ(id, prompt[static_cast<std::size_t>(t)]);
    }
  }
  EXPECT_EQ(t, 150);
  EXPECT_TRUE(lease->Valid());
  EXPECT_EQ(tape.service->GetStats().client_leases, 1);
  EXPECT_TRUE(lease->Release().ok());
  EXPECT_EQ(tape.service->GetStats().client_leases, 0);
  EXPECT_EQ(tape.service->GetStats().pool.leases, 0);
  tape.ExpectSound();
}

TEST(LeaseTest, NothingStoredIsNothingLeased) {
  TapeService tape;
  const Result<LeaseInfo> lease = tape.service->Acquire(AcquireOf(Counting(100)));
  ASSERT_TRUE(lease.ok());
  EXPECT_EQ(lease->tokens, 0);
  EXPECT_EQ(tape.service->GetStats().client_leases, 0);
  EXPECT_EQ(tape.service->Release(0).code(), StatusCode::kNotFound);
}

TEST(LeaseTest, LeasesEndByThemselves) {
  TapeService tape;
  const Ids prompt = Counting(100);
  tape.Ask(IdsRequest(prompt, 0));
  const Result<LeaseInfo> lease = tape.service->Acquire(AcquireOf(prompt, milliseconds(2)));
  ASSERT_TRUE(lease.ok());
  EXPECT_TRUE(Eventually([&] { return tape.service->GetStats().client_leases == 0; }));
  EXPECT_EQ(tape.service->Release(lease->id).code(), StatusCode::kNotFound);
  EXPECT_EQ(tape.service->Acquire(AcquireOf(prompt, milliseconds(0))).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(tape.service->Acquire(AcquireOf(prompt, std::chrono::hours(1))).status().code(),
            StatusCode::kInvalidArgument);
}

TEST(LeaseTest, WhatIsLeasedStaysUntilItIsReleased) {
  TapeService tape({.max_positions = 256}, 8);
  const auto client = agentd::NewInProcessClient(tape.service.get());
  const Ids prompt = Counting(150);
  tape.Ask(IdsRequest(prompt, 0));
  Result<Lease> lease = client->Acquire(AcquireOf(prompt));
  ASSERT_TRUE(lease.ok()) << lease.status().message();
  for (int i = 1; i < 10; ++i) tape.Ask(IdsRequest(Counting(250, i), 2));
  EXPECT_GT(tape.service->GetStats().pool.evictions, 0);
  EXPECT_TRUE(lease->Valid());
  EXPECT_EQ(tape.service->Lookup(LookupOf(prompt))->prefix_tokens, 149);
  const std::uint64_t id = lease->id();
  EXPECT_EQ(tape.service->Evict({.key = "", .host = true, .cold = true}).ok(), true);
  EXPECT_TRUE(lease->Valid());
  EXPECT_TRUE(tape.service->Release(id).ok());
  for (int i = 1; i < 10; ++i) tape.Ask(IdsRequest(Counting(250, i), 2));
  EXPECT_FALSE(lease->Valid());
  tape.ExpectSound();
}

TEST(LeaseTest, RequestsRunWhateverIsLeasedAndPinned) {
  // A context takes 4 of the 8 pages: leases and pins get the other 4.
  TapeService tape({.max_positions = 256}, 8);
  for (int i = 0; i < 3; ++i) tape.Ask(IdsRequest(Counting(120, i), 0));  // two pages each
  EXPECT_TRUE(tape.service->Acquire(AcquireOf(Counting(120, 0))).ok());
  EXPECT_TRUE(tape.service->Pin(PinOf(Counting(120, 1))).ok());
  const Result<LeaseInfo> refused = tape.service->Acquire(AcquireOf(Counting(120, 2)));
  EXPECT_EQ(refused.status().code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(refused.status().message(), HasSubstr("may hold 4"));
  EXPECT_EQ(tape.service->Pin(PinOf(Counting(120, 2))).status().code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(tape.service->Acquire(AcquireOf(Counting(120, 0))).ok());   // the same pages again cost nothing
  EXPECT_EQ(tape.Ask(IdsRequest(Counting(200, 9), 56)).ids.size(), 56u);  // a whole context
  tape.ExpectSound();
}

TEST(LeaseTest, TheirNumberIsBounded) {
  TapeService tape({}, 0, {.max_leases = 2, .max_pins = 1});
  for (int i = 0; i < 3; ++i) tape.Ask(IdsRequest(Counting(70, i), 0));
  for (int i = 0; i < 2; ++i) EXPECT_TRUE(tape.service->Acquire(AcquireOf(Counting(70))).ok());
  EXPECT_EQ(tape.service->Acquire(AcquireOf(Counting(70))).status().code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(tape.service->Pin(PinOf(Counting(70, 1))).ok());
  EXPECT_TRUE(tape.service->Pin(PinOf(Counting(70, 1))).ok());  // the same pin again
  EXPECT_EQ(tape.service->Pin(PinOf(Counting(70, 2))).status().code(), StatusCode::kResourceExhausted);
  tape.ExpectSound();
}

TEST(PinTest, APinStaysThroughEviction) {
  TapeService tape({.max_positions = 256}, 8);
  const Ids prompt = Counting(150);
  EXPECT_EQ(tape.service->Pin(PinOf(prompt)).status().code(), StatusCode::kNotFound);
  tape.Ask(IdsRequest(prompt, 0));
  const Result<PinInfo> pin = tape.service->Pin(PinOf(prompt));
  ASSERT_TRUE(pin.ok()) << pin.status().message();
  EXPECT_EQ(pin->tokens, 150);
  EXPECT_EQ(tape.service->GetStats().pinned_bytes, 3 * 512);
  for (int i = 1; i < 10; ++i) tape.Ask(IdsRequest(Counting(250, i), 2));
  EXPECT_EQ(tape.service->Lookup(LookupOf(prompt))->prefix_tokens, 149);
  const Result<std::vector<Entry>> entries = tape.service->Entries({.key = pin->key});
  ASSERT_TRUE(entries.ok()) << entries.status().message();
  EXPECT_TRUE(entries->front().pinned);
  EXPECT_TRUE(tape.service->Unpin(pin->key).ok());
  EXPECT_EQ(tape.service->Unpin(pin->key).code(), StatusCode::kNotFound);
  EXPECT_EQ(tape.service->Unpin("no key").code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(tape.service->GetStats().pinned_bytes, 0);
  const Result<PinInfo> brief = tape.service->Pin(PinOf(prompt, milliseconds(2)));
  ASSERT_TRUE(brief.ok());
  EXPECT_TRUE(Eventually([&] { return tape.service->GetStats().pinned_bytes == 0; }));
  tape.ExpectSound();
}

TEST(EntriesTest, ListsPagesAndFindsThemByTheBeginningOfTheirKey) {
  TapeService tape;
  const Ids prompt = Counting(150);
  tape.Ask(IdsRequest(prompt, 0, "writer"));
  tape.Ask(IdsRequest(prompt, 0, "reader"));
  const Result<std::vector<Entry>> entries = tape.service->Entries({});
  ASSERT_TRUE(entries.ok());
  ASSERT_EQ(entries->size(), 3u);
  std::int64_t tokens = 0;
  for (const Entry& entry : *entries) {
    tokens += entry.tokens;
    EXPECT_EQ(entry.tier, "host");
    EXPECT_EQ(entry.source, "writer");
    EXPECT_EQ(entry.bytes, 512);
    EXPECT_GE(entry.hits, 1);
    EXPECT_TRUE(entry.ids.empty());
    const auto parent =
        std::find_if(entries->begin(), entries->end(), [&](const Entry& other) { return other.key == entry.parent; });
    EXPECT_EQ(parent == entries->end(), entry.start == 0);
    const Result<std::vector<Entry>> one = tape.service->Entries({.key = entry.key.substr(0, 20)});
    ASSERT_TRUE(one.ok());
    ASSERT_EQ(one->size(), 1u);
    EXPECT_EQ(one->front().key, entry.key);
    EXPECT_EQ(one->front().ids, Ids(prompt.begin() + entry.start, prompt.begin() + entry.start + entry.tokens));
  }
  EXPECT_EQ(tokens, 150);
  EXPECT_EQ(tape.service->Entries({.limit = 2})->size(), 2u);
  EXPECT_EQ(tape.service->Entries({.limit = 0}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(tape.service->Entries({.key = "xyz"}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(tape.service->Entries({.key = std::string(64, '0')}).status().code(), StatusCode::kNotFound);
}

TEST(EvictTest, DropsAnEntryAndAllThatContinuesIt) {
  TapeService tape;
  const Ids prompt = Counting(200);
  Ids other(prompt.begin(), prompt.begin() + 100);
  other.resize(190, 5);
  tape.Ask(IdsRequest(prompt, 0));
  tape.Ask(IdsRequest(other, 0));
  std::string second;
  const Result<std::vector<Entry>> entries = tape.service->Entries({});
  ASSERT_TRUE(entries.ok());
  for (const Entry& entry : *entries) {
    const Entry one = tape.service->Entries({.key = entry.key})->front();
    if (one.start == 64 && one.ids == Ids(prompt.begin() + 64, prompt.begin() + 128)) second = one.key;
  }
  ASSERT_FALSE(second.empty());
  EXPECT_EQ(*tape.service->Evict({.key = second}), 3);                    // 64..127, 128..191, 192..199
  EXPECT_EQ(tape.service->Lookup(LookupOf(prompt))->prefix_tokens, 100);  // as far as the other goes with it
  EXPECT_EQ(tape.service->Lookup(LookupOf(other))->prefix_tokens, 189);
  EXPECT_EQ(tape.service->Evict({.key = second}).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(*tape.service->Evict({}), 3);
  EXPECT_EQ(tape.service->GetStats().pool.pages, 0);
  tape.ExpectSound();
}

class BothTiersTest : public ::testing::Test {
 protected:
  std::unique_ptr<TapeService> Open() {
    agentd::ServiceOptions options;
    options.cold_dir = (dir_.path() / "cold").string();
    return std::make_unique<TapeService>(TapeModelOptions{}, 0, options, std::make_shared<TierHooks>());
  }
  void StorePrompt(const Ids& prompt) {
    const auto tape = Open();
    tape->Ask(IdsRequest(prompt, 0, "writer"));
    tape->service->Drain();
  }
  TempDir dir_;
};

TEST_F(BothTiersTest, LookupAndListsTellTheTiersApart) {
  const Ids prompt = Counting(200);
  StorePrompt(prompt);
  const auto tape = Open();
  Result<Match> match = tape->service->Lookup(LookupOf(prompt));
  ASSERT_TRUE(match.ok());
  EXPECT_EQ(match->host_tokens, 0);
  EXPECT_EQ(match->cold_tokens, 199);
  Result<std::vector<Entry>> entries = tape->service->Entries({});
  ASSERT_EQ(entries->size(), 4u);
  for (const Entry& entry : *entries) {
    EXPECT_EQ(entry.tier, "cold");
    EXPECT_EQ(entry.source, "writer");
  }
  EXPECT_EQ(tape->service->Entries({.key = entries->front().key})->front().ids.size(),
            static_cast<std::size_t>(entries->front().tokens));
  Ids half(prompt.begin(), prompt.begin() + 128);
  EXPECT_EQ(*tape->service->Prefetch(LookupOf(half)), 128);
  match = tape->service->Lookup(LookupOf(prompt));
  EXPECT_EQ(match->host_tokens, 128);
  EXPECT_EQ(match->cold_tokens, 71);
  entries = tape->service->Entries({});
  ASSERT_EQ(entries->size(), 4u);
  EXPECT_EQ(std::count_if(entries->begin(), entries->end(), [](const Entry& e) { return e.tier == "host+cold"; }), 2);
  tape->ExpectSound();
}

TEST_F(BothTiersTest, LeasesAndPinsLoadFirst) {
  const Ids prompt = Counting(200);
  StorePrompt(prompt);
  {
    const auto tape = Open();
    const Result<LeaseInfo> lease = tape->service->Acquire(AcquireOf(prompt));
    ASSERT_TRUE(lease.ok()) << lease.status().message();
    EXPECT_EQ(lease->tokens, 200);
    EXPECT_EQ(lease->pages.size(), 4u);
    EXPECT_EQ(lease->pages.back().valid_tokens, 8);
    EXPECT_EQ(tape->Ask(IdsRequest(prompt, 4)).reuse.prefix_tokens, 199);
    EXPECT_EQ(tape->hooks->loads, 1);
    tape->ExpectSound();
  }
  const auto tape = Open();
  EXPECT_EQ(tape->service->Pin(PinOf(prompt))->tokens, 200);
}

TEST_F(BothTiersTest, CallersWithTheSamePromptShareOneLoad) {
  const Ids prompt = Counting(200);
  StorePrompt(prompt);
  const auto tape = Open();
  tape->hooks->HoldLoads();
  std::vector<std::thread> callers;
  std::atomic<std::int64_t> tokens = 0;
  callers.emplace_back([&] { tokens += *tape->service->Prefetch(LookupOf(prompt)); });
  tape->hooks->AwaitLoads(1);
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&] { tokens += tape->service->Acquire(AcquireOf(prompt))->tokens; });
  }
  const auto generation = tape->Start(IdsRequest(prompt, 4));
  tape->Ask(IdsRequest(Counting(90, 3), 20));  // nobody else waits
  tape->hooks->ReleaseLoads();
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(tokens, 800);
  ASSERT_TRUE(generation->Wait().reply.has_value());
  EXPECT_EQ(generation->Wait().reply->reuse.prefix_tokens, 199);
  EXPECT_EQ(tape->hooks->loads, 1);
  tape->ExpectSound();
}

TEST_F(BothTiersTest, EvictionFromMemoryKeepsTheDisk) {
  const Ids prompt = Counting(200);
  const auto tape = Open();
  tape->hooks->refuse_stores = true;
  tape->Ask(IdsRequest(prompt, 0));
  tape->hooks->refuse_stores = false;
  EXPECT_EQ(*tape->service->Evict({.key = "", .host = true, .cold = false}), 4);  // copied on the way out
  EXPECT_TRUE(Eventually([&] { return tape->service->Lookup(LookupOf(prompt))->cold_tokens == 199; }));
  EXPECT_EQ(*tape->service->Prefetch(LookupOf(prompt)), 200);
  EXPECT_EQ(*tape->service->Evict({.key = "", .host = false, .cold = true}), 4);
  EXPECT_EQ(tape->service->Lookup(LookupOf(prompt))->host_tokens, 199);
  EXPECT_EQ(tape->service->GetStats().cold.entries, 0);
  tape->ExpectSound();
}

TEST_F(BothTiersTest, EvictionFromMemoryWaitsForATierThatTakesFewPages) {
  const Ids prompt = Counting(200);
  const auto tape = Open();
  tape->hooks->stores_per_flush = 1;
  tape->Ask(IdsRequest(prompt, 0));
  EXPECT_EQ(*tape->service->Evict({.key = "", .host = true, .cold = false}), 4);
  EXPECT_EQ(tape->service->Lookup(LookupOf(prompt))->cold_tokens, 199);
  tape->ExpectSound();
}

TEST_F(BothTiersTest, EvictionReachesThePagesOnTheirWayToDisk) {
  const auto tape = Open();
  tape->hooks->slow_stores = true;
  const Ids prompt = Counting(200);
  tape->Ask(IdsRequest(prompt, 0));
  EXPECT_EQ(tape->service->GetStats().cold.entries, 0);
  EXPECT_TRUE(tape->service->Evict({}).ok());
  tape->hooks->slow_stores = false;
  tape->ExpectSound();  // waits for whatever is on its way
  EXPECT_EQ(tape->service->GetStats().cold.entries, 0);
  EXPECT_EQ(tape->service->Lookup(LookupOf(prompt))->prefix_tokens, 0);
}

TEST_F(BothTiersTest, EvictionByKeyReachesThePagesOnDisk) {
  const Ids prompt = Counting(200);
  StorePrompt(prompt);
  const auto tape = Open();
  std::string second;
  const Result<std::vector<Entry>> entries = tape->service->Entries({});
  ASSERT_TRUE(entries.ok());
  for (const Entry& entry : *entries) {
    if (entry.start == 64) second = entry.key;
  }
  EXPECT_EQ(*tape->service->Evict({.key = second}), 3);
  EXPECT_EQ(tape->service->Lookup(LookupOf(prompt))->prefix_tokens, 64);
  EXPECT_EQ(*tape->service->Evict({}), 1);
  EXPECT_EQ(tape->service->Lookup(LookupOf(prompt))->prefix_tokens, 0);
  tape->ExpectSound();
}

}  // namespace
}  // namespace kvshare::testing

// agentd over a model whose pages the host does not reach: the same answers, the same records on disk, and a clear end
// when the device fails. The tape model's device holds every bit turned round, so a page that is read or written in
// place is a wrong one, and copies as late as it may, so one that is not waited for is a wrong one too. All of it with
// pinned memory and without.
#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "agentd/in_process_client.h"
#include "gtest/gtest.h"
#include "tests/agentd/service_harness.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"

namespace kvshare::testing {
namespace {

using Ids = std::vector<TokenId>;

Ids Counting(std::int64_t n, TokenId start = 0) {
  Ids ids;
  for (std::int64_t i = 0; i < n; ++i) ids.push_back(static_cast<TokenId>((start + i * 7 + i * i / 11) % 50));
  return ids;
}

enum class Pinned { kNone, kSome };

class DevicePathTest : public ::testing::TestWithParam<Pinned> {
 protected:
  static bool pinned() { return GetParam() == Pinned::kSome; }
  static TapeModelOptions On(bool device) {
    TapeModelOptions model;
    model.on_device = device;
    if (!pinned()) model.pinned_bytes = 0;
    return model;
  }
  // Pages of 4 MiB: a load onto a device takes four at a time.
  static TapeModelOptions Large() {
    TapeModelOptions model = On(true);
    model.layers = 64;
    model.head_dim = 128;
    return model;
  }

  // A service over the directory that all of a test share.
  std::unique_ptr<TapeService> Open(const TapeModelOptions& model, std::int64_t pool_pages = 0,
                                    std::function<void()> before_forward = nullptr) {
    agentd::ServiceOptions options;
    options.cold_dir = (dir_.path() / "cold").string();
    options.on_device_lost = [this](const Status& status) {
      if (++lost_ == 1) cause_.set_value(status);
    };
    return std::make_unique<TapeService>(model, pool_pages, options, std::make_shared<TierHooks>(),
                                         std::move(before_forward));
  }
  void Store(const TapeModelOptions& model, const Ids& prompt) {
    const auto tape = Open(model, 16);
    tape->Ask(IdsRequest(prompt, 1, "writer"));
    tape->service->Drain();
    EXPECT_EQ(tape->service->GetStats().cold.dropped, 0);
  }
  static std::int64_t ColdTokens(TapeService& tape, const Ids& prompt) {
    LookupRequest request;
    request.prompt = TokenPrompt{prompt};
    const Result<Match> match = tape.service->Lookup(request);
    EXPECT_TRUE(match.ok());
    return match.ok() ? match->cold_tokens : 0;
  }
  static void Await(const std::function<bool()>& there) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!there() && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    EXPECT_TRUE(there());
  }
  // What was evicted and is copied to disk can be found there soon after.
  static void AwaitColdTokens(TapeService& tape, const Ids& prompt, std::int64_t tokens) {
    Await([&] { return ColdTokens(tape, prompt) >= tokens; });
  }
  static void ExpectLost(const Status& status) {
    KVS_EXPECT_FAILS(status, StatusCode::kUnavailable, "the device has failed");
    KVS_EXPECT_FAILS(status, StatusCode::kUnavailable, "the test took the device away");
  }

  TempDir dir_;
  std::atomic<int> lost_ = 0;
  std::promise<Status> cause_;
};

TEST_P(DevicePathTest, WhatIsEvictedComesBackFromTheDisk) {
  const auto tape = Open(On(true), 16);
  const Ids first = Counting(500);
  tape->Ask(IdsRequest(first, 4));
  for (TokenId other = 1; other < 4; ++other) tape->Ask(IdsRequest(Counting(500, other), 4));
  EXPECT_GT(tape->service->GetStats().pool.evictions, 0);
  AwaitColdTokens(*tape, first, 499);
  const GenerateReply again = tape->Ask(IdsRequest(first, 4));
  EXPECT_EQ(again.reuse.prefix_tokens, 499);
  EXPECT_GT(tape->service->GetStats().cold.hits, 0);
  EXPECT_GT(tape->hooks->loads, 0);
  EXPECT_EQ(tape->probe->copies.promoted > 0, pinned());
  EXPECT_EQ(tape->probe->copies.demoted > 0, pinned());
  const std::vector<std::string> warnings = tape->service->Warnings();
  EXPECT_EQ(warnings.size(), pinned() ? 0u : 2u);
  for (const std::string& warning : warnings) EXPECT_TRUE(warning.ends_with("has no such memory")) << warning;
  tape->ExpectSound();
}

TEST_P(DevicePathTest, RecordsAreTheSameWhereverPagesLie) {
  const Ids prompt = Counting(300);
  Store(On(true), prompt);
  {
    const auto host = Open(On(false), 16);
    EXPECT_EQ(ColdTokens(*host, prompt), 299);
    EXPECT_EQ(host->Ask(IdsRequest(prompt, 3)).reuse.prefix_tokens, 299);
    host->Ask(IdsRequest(Counting(200, 9), 1));
    host->ExpectSound();
    host->service->Drain();
  }
  const auto device = Open(On(true), 16);
  EXPECT_EQ(device->Ask(IdsRequest(Counting(200, 9), 3)).reuse.prefix_tokens, 199);
  device->ExpectSound();
}

TEST_P(DevicePathTest, APrefixIsSharedInsideAPage) {
  const auto tape = Open(On(true), 16);
  Ids prompt = Counting(100);
  tape->Ask(IdsRequest(prompt, 2));
  prompt.resize(90);
  prompt.push_back(49);
  prompt.push_back(1);
  EXPECT_EQ(tape->Ask(IdsRequest(prompt, 2)).reuse.prefix_tokens, 90);
  tape->ExpectSound();
}

TEST_P(DevicePathTest, ALoadOfManyPagesComesInParts) {
  const Ids prompt = Counting(700);
  Store(Large(), prompt);
  const auto tape = Open(Large(), 16);
  EXPECT_EQ(tape->Ask(IdsRequest(prompt, 3)).reuse.prefix_tokens, 699);
  EXPECT_EQ(tape->hooks->loads, 3);
  EXPECT_EQ(tape->hooks->loaded_pages, 11);
  tape->ExpectSound();
}

TEST_P(DevicePathTest, BehindADamagedPageIsComputed) {
  const Ids prompt = Counting(700);
  Store(Large(), prompt);
  const auto tape = Open(Large(), 16);
  tape->hooks->on_loaded = [&](std::vector<agentd::ColdLoaded>& loaded) {
    if (tape->hooks->loads == 2) loaded[1].status = DataLoss("the test damaged it");
  };
  const GenerateReply reply = tape->Ask(IdsRequest(prompt, 3));
  EXPECT_EQ(reply.reuse.prefix_tokens, 5 * 64);
  EXPECT_EQ(MissTokens(reply.reuse, "cold_damaged"), 699 - 5 * 64);
  EXPECT_EQ(tape->hooks->loads, 2) << "what is of no use was read";
  EXPECT_EQ(tape->probe->rows, 700 - 5 * 64 + 2) << "computed behind pages that could not be had";
  tape->ExpectSound();
}

TEST_P(DevicePathTest, WhoLeavesWhileItLoadsLeavesItsPages) {
  const Ids prompt = Counting(700);
  Store(Large(), prompt);
  const auto tape = Open(Large(), 16);
  tape->hooks->HoldLoads();
  std::uint64_t id = 0;
  const auto gone = tape->Start(IdsRequest(prompt, 3), &id);
  tape->hooks->AwaitLoads(1);
  tape->service->Cancel(id);
  EXPECT_EQ(gone->Wait().error.code(), StatusCode::kCancelled);
  tape->hooks->ReleaseLoads();
  EXPECT_EQ(tape->Ask(IdsRequest(prompt, 3)).reuse.prefix_tokens, 699);
  // The tail was not shared by the first, and is read once more.
  EXPECT_LE(tape->hooks->loaded_pages, 12);
  tape->ExpectSound();
}

TEST_P(DevicePathTest, ADaemonThatStopsWhileItLoadsEnds) {
  const Ids prompt = Counting(700);
  Store(Large(), prompt);
  const auto tape = Open(Large(), 16);
  tape->hooks->HoldLoads();
  const auto request = tape->Start(IdsRequest(prompt, 3));
  tape->hooks->AwaitLoads(1);
  tape->hooks->ReleaseLoads();
  tape->service.reset();
  const Recorder::Outcome& outcome = request->Wait();
  EXPECT_TRUE(outcome.reply.has_value() || outcome.error.code() == StatusCode::kUnavailable);
}

TEST_P(DevicePathTest, ADaemonThatIsToldToStopWithAReadInItsInboxEnds) {
  const Ids prompt = Counting(300);
  Store(On(true), prompt);
  Gate gate;
  const auto tape = Open(On(true), 40, [&] { gate.Pass(); });
  tape->hooks->HoldLoads();
  std::promise<void> read;
  tape->hooks->on_loaded = [&](std::vector<agentd::ColdLoaded>&) { read.set_value(); };
  const auto loading = tape->Start(IdsRequest(prompt, 3));
  tape->hooks->AwaitLoads(1);
  gate.Close();
  const auto computing = tape->Start(IdsRequest(Counting(100, 9), 3));
  gate.AwaitArrival(1);
  tape->hooks->ReleaseLoads();
  read.get_future().wait();
  gate.Open();  // the step's end finds both, now and then
  tape->service.reset();
  for (const auto& request : {loading, computing}) {
    const Recorder::Outcome& outcome = request->Wait();
    EXPECT_TRUE(outcome.reply.has_value() || outcome.error.code() == StatusCode::kUnavailable);
  }
}

TEST_P(DevicePathTest, ALeaseIsMetadata) {
  const auto tape = Open(On(true));
  const Ids prompt = Counting(130);
  tape->Ask(IdsRequest(prompt, 1));
  const agentd::SharedPages shared = tape->service->Shared();
  EXPECT_EQ(shared.memory, nullptr);
  EXPECT_LT(shared.memory_fd, 0);
  EXPECT_EQ(shared.layout.page_tokens, 64);
  const auto client = agentd::NewInProcessClient(tape->service.get());
  AcquireRequest request;
  request.prompt = TokenPrompt{prompt};
  const auto lease = client->Acquire(request);
  KVS_ASSERT_OK(lease);
  EXPECT_EQ(lease->tokens(), 130);
  KVS_EXPECT_FAILS(lease->PageBytes(0), StatusCode::kFailedPrecondition, "on a device");
}

// This device looks at no rows in the host's stead.
TEST_P(DevicePathTest, ModesThatWouldLookAtRowsComputeAndSayWhy) {
  TapeModelOptions model = On(true);
  model.device_kv = false;
  const auto tape = Open(model);
  for (const ReuseMode mode : {ReuseMode::kCacheBlend, ReuseMode::kDhd, ReuseMode::kKvcomm, ReuseMode::kAuto}) {
    SCOPED_TRACE(std::string(ReuseModeName(mode)));
    const std::string session(ReuseModeName(mode));
    const TokenId first = static_cast<TokenId>(mode);  // each mode's prompts are its own
    const Ids note = Counting(200, first);
    Ids planner = Counting(20, first + 20), critic = Counting(30, first + 30);
    planner.insert(planner.end(), note.begin(), note.end());
    critic.insert(critic.end(), note.begin(), note.end());
    critic.push_back(1);
    for (const Ids& prompt : {planner, critic}) {
      GenerateRequest request = IdsRequest(prompt, 4, "agent");
      request.session = session;
      request.reuse = mode;
      const GenerateReply reply = testing::Ask(*tape->service, request);
      EXPECT_EQ(reply.ids, TapeContinuation(tape->model, prompt, 4));
      EXPECT_FALSE(reply.reuse.approximate);
      EXPECT_EQ(reply.reuse.moved_tokens, 0);
      if (prompt != critic) continue;
      EXPECT_GE(MissTokens(reply.reuse, "not_on_device"), 190);
      EXPECT_EQ(MissTokens(reply.reuse, "not_on_device"), reply.reuse.recomputed_tokens);
    }
  }
  EXPECT_EQ(tape->service->GetStats().pool.leases, 0);
  tape->ExpectSound();
}

TEST_P(DevicePathTest, AFailedStepOfADeviceThatIsWellFailsItsOwnRequest) {
  const auto tape = Open(On(true), 16);
  tape->probe->fail_next_forwards = 1;
  const auto failed = tape->Start(IdsRequest(Counting(100), 3));
  EXPECT_EQ(failed->Wait().error.code(), StatusCode::kInternal);
  tape->Ask(IdsRequest(Counting(100), 3));
  EXPECT_EQ(lost_, 0);
}

TEST_P(DevicePathTest, ADeviceThatFailsEndsEveryRequestOnceAndClearly) {
  const Ids before = Counting(200);
  Gate gate;
  gate.Close();
  {
    const auto tape = Open(On(true), 40, [&] { gate.Pass(); });
    gate.Open();
    tape->Ask(IdsRequest(before, 2));
    Await([&] { return tape->service->GetStats().cold.stores == 4; });
    gate.Close();
    std::vector<std::shared_ptr<Recorder>> flights;
    for (TokenId i = 1; i < 6; ++i) flights.push_back(tape->Start(IdsRequest(Counting(300, i), 20)));
    gate.AwaitArrival(3);  // two steps were the first request's; these have begun
    tape->probe->device_lost = true;
    gate.Open();
    for (const auto& flight : flights) ExpectLost(flight->Wait().error);
    ExpectLost(cause_.get_future().get());
    const auto late = std::make_shared<Recorder>();
    ExpectLost(tape->service->Generate(IdsRequest(before, 1), late).status());
    KVS_EXPECT_OK(tape->service->CheckIntegrity());
    LookupRequest lookup;
    lookup.prompt = TokenPrompt{before};
    EXPECT_TRUE(tape->service->Lookup(lookup).ok()) << "what needs no device is answered";
    tape->service->Drain();
    EXPECT_EQ(lost_, 1);
    EXPECT_EQ(tape->service->GetStats().requests_failed, 5);
  }
  const auto tape = Open(On(true), 40);
  EXPECT_GE(tape->Ask(IdsRequest(before, 2)).reuse.prefix_tokens, 199);
  tape->ExpectSound();
}

TEST_P(DevicePathTest, ADeviceThatFailsUnderALoadEndsTheRequest) {
  const Ids prompt = Counting(700);
  Store(Large(), prompt);
  const auto tape = Open(Large(), 16);
  tape->hooks->HoldLoads();
  const auto request = tape->Start(IdsRequest(prompt, 3));
  tape->hooks->AwaitLoads(1);
  tape->probe->device_lost = true;
  tape->hooks->ReleaseLoads();
  ExpectLost(request->Wait().error);
  tape->service->Drain();
  EXPECT_EQ(lost_, 1);
}

TEST_P(DevicePathTest, AFailureThatOnlyTheDemoterMeetsIsToldToo) {
  const auto tape = Open(On(true), 16);
  tape->hooks->refuse_stores = true;
  tape->Ask(IdsRequest(Counting(300), 2));
  tape->probe->device_lost = true;
  tape->hooks->refuse_stores = false;
  ExpectLost(cause_.get_future().get());
  tape->service->Drain();
  EXPECT_EQ(tape->service->GetStats().cold.stores, 0);
}

TEST_P(DevicePathTest, LoadsOfSeveralRequestsShareWhatIsPinned) {
  // Two have the blocks, the third goes without.
  std::vector<Ids> prompts;
  for (TokenId i = 0; i < 3; ++i) prompts.push_back(Counting(600, 10 * i));
  for (const Ids& prompt : prompts) Store(Large(), prompt);
  const auto tape = Open(Large(), 40);
  tape->hooks->HoldLoads();
  std::vector<std::shared_ptr<Recorder>> flights;
  for (const Ids& prompt : prompts) flights.push_back(tape->Start(IdsRequest(prompt, 3)));
  tape->hooks->AwaitLoads(3);
  tape->hooks->ReleaseLoads();
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const Recorder::Outcome& outcome = flights[i]->Wait();
    ASSERT_TRUE(outcome.reply.has_value()) << outcome.error.message();
    tape->CheckReply(IdsRequest(prompts[i], 3), outcome);
    EXPECT_EQ(outcome.reply->reuse.prefix_tokens, 599);
  }
  EXPECT_EQ(tape->probe->copies.promoted, pinned() ? 20 : 0);
  tape->ExpectSound();
}

std::string PinnedName(const ::testing::TestParamInfo<Pinned>& info) {
  return info.param == Pinned::kSome ? "Pinned" : "NotPinned";
}
INSTANTIATE_TEST_SUITE_P(Device, DevicePathTest, ::testing::Values(Pinned::kNone, Pinned::kSome), PinnedName);

// Copies that end when the test says so, beside whatever else goes on.
class DeviceCopiesTest : public DevicePathTest {
 protected:
  // `first` is being copied out, of which others have written over all pages.
  static void EvictAmidCopies(TapeService& tape, const Ids& first, bool tier_takes = true) {
    tape.probe->copies.hold = true;
    tape.Ask(IdsRequest(first, 4));
    Await([&] { return tape.probe->copies.demoted == 8; });
    EXPECT_GT(tape.probe->copies.open, 0);
    tape.hooks->refuse_stores = !tier_takes;
    GenerateRequest other = IdsRequest(Counting(1000, 1), 4);
    other.reuse = ReuseMode::kOff;
    tape.Ask(other);
    EXPECT_EQ(tape.service->GetStats().pool.evictions, 8);
  }
};

TEST_P(DeviceCopiesTest, AStepBeginsBeforeItsPagesAreCopiedAndAwaitsThem) {
  const Ids prompt = Counting(200);
  Store(On(true), prompt);
  const auto tape = Open(On(true), 16);
  tape->probe->copies.hold = true;
  EXPECT_EQ(tape->Ask(IdsRequest(prompt, 3)).reuse.prefix_tokens, 199);
  EXPECT_EQ(tape->probe->copies.awaited_in, 1);
  EXPECT_EQ(tape->probe->gated_layers, 1);
  tape->ExpectSound();
}

TEST_P(DeviceCopiesTest, WhatIsNextIsReadWhileAPartIsCopied) {
  const Ids prompt = Counting(700);
  Store(Large(), prompt);
  const auto tape = Open(Large(), 16);
  tape->probe->copies.hold = true;
  const auto request = tape->Start(IdsRequest(prompt, 3));
  tape->hooks->AwaitLoads(2);
  Await([&] { return tape->probe->copies.open == 2; });
  EXPECT_EQ(tape->hooks->loads, 2) << "read over what is being copied";
  tape->probe->copies.hold = false;
  const Recorder::Outcome& outcome = request->Wait();
  ASSERT_TRUE(outcome.reply.has_value()) << outcome.error.message();
  tape->CheckReply(IdsRequest(prompt, 3), outcome);
  EXPECT_EQ(outcome.reply->reuse.prefix_tokens, 699);
  EXPECT_EQ(tape->hooks->loads, 3);
  tape->ExpectSound();
}

TEST_P(DeviceCopiesTest, StepsGoOnWhileAPrefixIsCopiedAndItIsFoundWhenItIsThere) {
  const Ids prompt = Counting(200);
  Store(On(true), prompt);
  const auto tape = Open(On(true), 40);
  tape->probe->copies.hold = true;
  auto prefetch = std::async(std::launch::async, [&] {
    LookupRequest request;
    request.prompt = TokenPrompt{prompt};
    return tape->service->Prefetch(request);
  });
  Await([&] { return tape->probe->copies.open == 1; });
  tape->Ask(IdsRequest(Counting(300, 9), 5));
  LookupRequest lookup;
  lookup.prompt = TokenPrompt{prompt};
  const Result<Match> match = tape->service->Lookup(lookup);
  KVS_ASSERT_OK(match);
  EXPECT_EQ(match->host_tokens, 0);
  EXPECT_EQ(match->cold_tokens, 199);
  EXPECT_EQ(tape->probe->copies.promoted, 4);
  EXPECT_EQ(tape->probe->copies.awaited_in, 0);
  tape->probe->copies.hold = false;
  const auto fetched = prefetch.get();
  KVS_ASSERT_OK(fetched);
  EXPECT_EQ(*fetched, 200);
  const int loads = tape->hooks->loads;
  EXPECT_EQ(tape->Ask(IdsRequest(prompt, 3)).reuse.prefix_tokens, 199);
  EXPECT_EQ(tape->hooks->loads, loads);
  tape->ExpectSound();
}

TEST_P(DeviceCopiesTest, WhoLeavesWhileItsPagesAreCopiedLeavesThem) {
  const Ids prompt = Counting(700);
  Store(Large(), prompt);
  const auto tape = Open(Large(), 16);
  tape->probe->copies.hold = true;
  std::uint64_t id = 0;
  const auto gone = tape->Start(IdsRequest(prompt, 3), &id);
  Await([&] { return tape->probe->copies.open == 2; });
  tape->service->Cancel(id);
  EXPECT_EQ(gone->Wait().error.code(), StatusCode::kCancelled);
  tape->probe->copies.hold = false;
  EXPECT_EQ(tape->Ask(IdsRequest(prompt, 3)).reuse.prefix_tokens, 699);
  EXPECT_LE(tape->hooks->loaded_pages, 12);
  tape->ExpectSound();
}

TEST_P(DeviceCopiesTest, ADaemonThatStopsWhileItCopiesEnds) {
  const Ids prompt = Counting(700);
  Store(Large(), prompt);
  const auto tape = Open(Large(), 16);
  tape->probe->copies.hold = true;
  const auto request = tape->Start(IdsRequest(prompt, 3));
  Await([&] { return tape->probe->copies.open == 2; });
  auto stopped = std::async(std::launch::async, [&] { tape->service.reset(); });
  EXPECT_EQ(request->Wait().error.code(), StatusCode::kUnavailable);
  tape->probe->copies.hold = false;
  stopped.get();
}

TEST_P(DeviceCopiesTest, StepsGoOnWhilePagesAreCopiedOut) {
  const Ids first = Counting(300), second = Counting(300, 9);
  const auto tape = Open(On(true), 40);
  tape->probe->copies.hold = true;
  tape->Ask(IdsRequest(first, 4));
  Await([&] { return tape->probe->copies.open > 0; });
  const std::int64_t forwards = tape->probe->forwards;
  tape->Ask(IdsRequest(second, 4));
  EXPECT_GE(tape->probe->forwards, forwards + 4);
  EXPECT_GT(tape->probe->copies.open, 0);
  EXPECT_EQ(tape->service->GetStats().cold.stores, 0);
  EXPECT_EQ(ColdTokens(*tape, first), 0);
  tape->probe->copies.hold = false;
  tape->service->Drain();
  EXPECT_EQ(tape->probe->copies.open, 0);
  EXPECT_EQ(tape->service->GetStats().cold.stores, 10);
  tape->service.reset();
  const auto again = Open(On(true), 40);
  EXPECT_EQ(again->Ask(IdsRequest(first, 3)).reuse.prefix_tokens, 299);
  EXPECT_EQ(again->Ask(IdsRequest(second, 3)).reuse.prefix_tokens, 299);
  again->ExpectSound();
}

TEST_P(DeviceCopiesTest, APageThatIsEvictedWhileItIsCopiedOutIsStoredAsItWas) {
  const Ids first = Counting(500);
  const auto tape = Open(On(true), 16);
  EvictAmidCopies(*tape, first);
  tape->probe->copies.hold = false;
  AwaitColdTokens(*tape, first, 499);
  EXPECT_EQ(tape->Ask(IdsRequest(first, 4)).reuse.prefix_tokens, 499);
  EXPECT_EQ(tape->service->GetStats().cold.integrity_errors, 0);
  tape->ExpectSound();
}

TEST_P(DeviceCopiesTest, WhatIsForgottenWhileItIsCopiedOutStaysForgotten) {
  for (const bool clear : {false, true}) {
    SCOPED_TRACE(clear ? "clear" : "evict");
    const auto tape = Open(On(true), 16);
    EvictAmidCopies(*tape, Counting(500), /*tier_takes=*/false);
    if (clear) {
      tape->service->ClearPool();
    } else {
      KVS_EXPECT_OK(tape->service->Evict({.host = true, .cold = true}));
    }
    tape->hooks->refuse_stores = false;
    tape->service->Drain();
    EXPECT_EQ(tape->service->GetStats().cold.stores, 0);
    EXPECT_EQ(tape->service->GetStats().cold.entries, 0);
    tape->ExpectSound();
  }
}

TEST_P(DeviceCopiesTest, WhatIsEvictedByNameWhileItIsCopiedOutIsNotStored) {
  const auto tape = Open(On(true), 16);
  tape->probe->copies.hold = true;
  tape->Ask(IdsRequest(Counting(500), 4));
  Await([&] { return tape->probe->copies.demoted == 8; });
  KVS_EXPECT_OK(tape->service->Evict({.host = true, .cold = true}));
  tape->probe->copies.hold = false;
  tape->service->Drain();
  EXPECT_EQ(tape->probe->copies.open, 0);
  EXPECT_EQ(tape->service->GetStats().cold.stores, 0);
  tape->ExpectSound();
}

TEST_P(DeviceCopiesTest, WhatLeavesMemoryToStayOnDiskIsCopiedFirst) {
  const Ids first = Counting(500);
  const auto tape = Open(On(true), 16);
  tape->probe->copies.hold = true;
  tape->hooks->refuse_stores = true;
  tape->Ask(IdsRequest(first, 4));
  EXPECT_EQ(tape->probe->copies.demoted, 0);
  KVS_EXPECT_OK(tape->service->Evict({.host = true, .cold = false}));
  EXPECT_EQ(tape->probe->copies.demoted, 8);
  GenerateRequest other = IdsRequest(Counting(1000, 1), 4);
  other.reuse = ReuseMode::kOff;
  tape->Ask(other);  // where the first was
  tape->hooks->refuse_stores = false;
  tape->probe->copies.hold = false;
  AwaitColdTokens(*tape, first, 499);
  EXPECT_EQ(tape->Ask(IdsRequest(first, 4)).reuse.prefix_tokens, 499);
  tape->ExpectSound();
}

TEST_P(DeviceCopiesTest, WhatTheTierDoesNotTakeIsOfferedAgain) {
  const Ids first = Counting(500);
  const auto tape = Open(On(true), 16);
  tape->probe->copies.hold = true;
  tape->Ask(IdsRequest(first, 4));
  Await([&] { return tape->probe->copies.demoted > 0; });
  tape->hooks->refuse_stores = true;
  tape->probe->copies.hold = false;
  Await([&] { return tape->probe->copies.open == 0; });
  EXPECT_EQ(ColdTokens(*tape, first), 0);
  tape->hooks->refuse_stores = false;
  tape->service->Drain();
  tape->service.reset();
  const auto again = Open(On(true), 16);
  EXPECT_EQ(again->Ask(IdsRequest(first, 4)).reuse.prefix_tokens, 499);
  again->ExpectSound();
}

TEST_P(DeviceCopiesTest, ADeviceThatFailsAmidACopyOutStoresNothing) {
  const auto tape = Open(On(true), 16);
  tape->probe->copies.hold = true;
  tape->Ask(IdsRequest(Counting(300), 2));
  Await([&] { return tape->probe->copies.open > 0; });
  tape->probe->device_lost = true;
  tape->probe->copies.hold = false;
  ExpectLost(cause_.get_future().get());
  tape->service->Drain();
  EXPECT_EQ(lost_, 1);
  EXPECT_EQ(tape->service->GetStats().cold.stores, 0);
}

TEST_P(DeviceCopiesTest, ADeviceThatFailsAmidACopyInEndsTheRequest) {
  const Ids prompt = Counting(700);
  Store(Large(), prompt);
  const auto tape = Open(Large(), 16);
  tape->probe->copies.hold = true;
  const auto request = tape->Start(IdsRequest(prompt, 3));
  Await([&] { return tape->probe->copies.open == 2; });
  tape->probe->device_lost = true;
  ExpectLost(request->Wait().error);
  tape->service->Drain();
  EXPECT_EQ(lost_, 1);
  LookupRequest lookup;
  lookup.prompt = TokenPrompt{prompt};
  const Result<Match> match = tape->service->Lookup(lookup);
  KVS_ASSERT_OK(match);
  EXPECT_EQ(match->host_tokens, 0);
}

// Loads, demotions and evictions in any order, with copies that end now or later: the pool holds two prompts, pinned
// memory less than is on its way.
TEST_P(DeviceCopiesTest, NoOrderOfCopiesChangesAnAnswer) {
  std::mt19937 random(5);
  const auto tape = Open(Large(), 18);
  for (int i = 0; i < 40; ++i) {
    tape->probe->copies.hold = random() % 2 == 0;
    Ids prompt = Counting(500, static_cast<TokenId>(random() % 5));
    prompt.resize(65 + random() % 436);
    GenerateRequest request = IdsRequest(prompt, 2);
    if (random() % 8 == 0) request.reuse = ReuseMode::kOff;
    tape->Ask(request);
  }
  tape->probe->copies.hold = false;
  tape->service->Drain();
  const Stats stats = tape->service->GetStats();
  EXPECT_GT(stats.pool.evictions, 20);
  EXPECT_GT(stats.cold.hits, 20);
  EXPECT_EQ(stats.cold.integrity_errors, 0);
  EXPECT_EQ(tape->probe->copies.open, 0);
  tape->ExpectSound();
}

INSTANTIATE_TEST_SUITE_P(Device, DeviceCopiesTest, ::testing::Values(Pinned::kSome), PinnedName);

}  // namespace
}  // namespace kvshare::testing

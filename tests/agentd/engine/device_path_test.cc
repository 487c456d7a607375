// agentd over a model whose pages the host does not reach: the same answers, the same records on disk, and a clear end
// when the device fails. The tape model's device holds every bit turned round, so a page that is read or written in
// place is a wrong one.
#include <atomic>
#include <chrono>
#include <future>
#include <memory>
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

class DevicePathTest : public ::testing::Test {
 protected:
  static TapeModelOptions On(bool device) {
    TapeModelOptions model;
    model.on_device = device;
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
  // What is copied to disk can be found there soon after.
  static void AwaitColdTokens(TapeService& tape, const Ids& prompt, std::int64_t tokens) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (ColdTokens(tape, prompt) < tokens && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
  }
  static void ExpectLost(const Status& status) {
    KVS_EXPECT_FAILS(status, StatusCode::kUnavailable, "the device has failed");
    KVS_EXPECT_FAILS(status, StatusCode::kUnavailable, "the test took the device away");
  }

  TempDir dir_;
  std::atomic<int> lost_ = 0;
  std::promise<Status> cause_;
};

TEST_F(DevicePathTest, WhatIsEvictedComesBackFromTheDisk) {
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
  tape->ExpectSound();
}

TEST_F(DevicePathTest, RecordsAreTheSameWhereverPagesLie) {
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

TEST_F(DevicePathTest, APrefixIsSharedInsideAPage) {
  const auto tape = Open(On(true), 16);
  Ids prompt = Counting(100);
  tape->Ask(IdsRequest(prompt, 2));
  prompt.resize(90);
  prompt.push_back(49);
  prompt.push_back(1);
  EXPECT_EQ(tape->Ask(IdsRequest(prompt, 2)).reuse.prefix_tokens, 90);
  tape->ExpectSound();
}

TEST_F(DevicePathTest, ALoadOfManyPagesComesInParts) {
  const Ids prompt = Counting(700);
  Store(Large(), prompt);
  const auto tape = Open(Large(), 16);
  EXPECT_EQ(tape->Ask(IdsRequest(prompt, 3)).reuse.prefix_tokens, 699);
  EXPECT_EQ(tape->hooks->loads, 3);
  EXPECT_EQ(tape->hooks->loaded_pages, 11);
  tape->ExpectSound();
}

TEST_F(DevicePathTest, BehindADamagedPageIsComputed) {
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
  tape->ExpectSound();
}

TEST_F(DevicePathTest, WhoLeavesWhileItLoadsLeavesItsPages) {
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

TEST_F(DevicePathTest, ADaemonThatStopsWhileItLoadsEnds) {
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

TEST_F(DevicePathTest, ALeaseIsMetadata) {
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

// This device looks at no rows in the host's stead: it has no DeviceKv.
TEST_F(DevicePathTest, ModesThatWouldLookAtRowsComputeAndSayWhy) {
  const auto tape = Open(On(true));
  for (const ReuseMode mode : {ReuseMode::kCacheBlend, ReuseMode::kDhd, ReuseMode::kKvcomm, ReuseMode::kAuto}) {
    SCOPED_TRACE(std::string(ReuseModeName(mode)));
    const std::string session(ReuseModeName(mode));
    const TokenId first = static_cast<TokenId>(mode);  // each mode's prompts are its own
    const Ids note = Counting(200, first);
    Ids planner = Counting(70, first + 20), critic = Counting(40, first + 30);
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

TEST_F(DevicePathTest, AFailedStepOfADeviceThatIsWellFailsItsOwnRequest) {
  const auto tape = Open(On(true), 16);
  tape->probe->fail_next_forwards = 1;
  const auto failed = tape->Start(IdsRequest(Counting(100), 3));
  EXPECT_EQ(failed->Wait().error.code(), StatusCode::kInternal);
  tape->Ask(IdsRequest(Counting(100), 3));
  EXPECT_EQ(lost_, 0);
}

TEST_F(DevicePathTest, ADeviceThatFailsEndsEveryRequestOnceAndClearly) {
  const Ids before = Counting(200);
  Gate gate;
  gate.Close();
  {
    const auto tape = Open(On(true), 40, [&] { gate.Pass(); });
    gate.Open();
    tape->Ask(IdsRequest(before, 2));
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

TEST_F(DevicePathTest, ADeviceThatFailsUnderALoadEndsTheRequest) {
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

TEST_F(DevicePathTest, AFailureThatOnlyTheDemoterMeetsIsToldToo) {
  const auto tape = Open(On(true), 16);
  tape->hooks->refuse_stores = true;
  tape->Ask(IdsRequest(Counting(300), 2));
  tape->probe->device_lost = true;
  tape->hooks->refuse_stores = false;
  ExpectLost(cause_.get_future().get());
  tape->service->Drain();
  EXPECT_EQ(tape->service->GetStats().cold.stores, 0);
}

}  // namespace
}  // namespace kvshare::testing

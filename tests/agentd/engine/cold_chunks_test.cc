// Chunks that lie on disk, on a real tiny model: after a restart or an eviction a session finds what it has seen, to
// the bit as if it had never left memory, and whatever goes wrong on the way is a counted miss.
#include <chrono>
#include <filesystem>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "agentd/service.h"
#include "gtest/gtest.h"
#include "tests/agentd/hooked_tier.h"
#include "tests/agentd/service_harness.h"
#include "tests/agentd/tiny_service.h"
#include "tests/testing/ids.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"

namespace kvshare::testing {
namespace {

using Ids = std::vector<TokenId>;

class ColdChunksTest : public ::testing::Test {
 protected:
  Ids RandomIds(int count) { return testing::RandomIds(rng_, count); }

  // Over the directory that all services of a test share; `hooks` null: without one. Loads whatever it costs, unless
  // the hooks say how long it takes.
  std::unique_ptr<agentd::Service> Open(const std::shared_ptr<TierHooks>& hooks, const std::string& name = "cold") {
    std::unique_ptr<runtime::Model> model = LoadTinyModel(kernels::DType::kBf16, 1024, 1, 8);
    if (model == nullptr) return nullptr;
    agentd::ServiceOptions options;
    options.kv_pool_bytes = static_cast<std::int64_t>(model->kv_layout().page_bytes()) * 400;
    std::unique_ptr<agentd::ColdTier> cold;
    if (hooks != nullptr) {
      options.always_load = !hooks->estimate_seconds.has_value();
      cold = OpenHookedTier(*model, dir_.File(name), hooks);
    }
    Result<std::unique_ptr<agentd::Service>> made = agentd::NewServiceOn(std::move(model), std::move(cold), options);
    EXPECT_TRUE(made.ok()) << made.status().message();
    return made.ok() ? *std::move(made) : nullptr;
  }

  static GenerateRequest Request(Ids prompt, ReuseMode mode, const std::string& agent, const std::string& session) {
    GenerateRequest request = IdsRequest(std::move(prompt), 6, agent);
    request.reuse = mode;
    request.session = session;
    request.ignore_eos = true;
    return request;
  }

  // One agent reads the note, and all of it is on disk afterwards.
  void StoreNote(const std::string& session, const std::string& name = "cold") {
    const auto service = Open(std::make_shared<TierHooks>(), name);
    ASSERT_NE(service, nullptr);
    Ask(*service, Request(planner_, ReuseMode::kExact, "planner", session));
    service->Drain();
  }

  static std::int64_t MovedFrom(agentd::Service& service, const GenerateRequest& request, const std::string& tier) {
    ExplainRequest explain;
    explain.prompt = request.prompt;
    explain.session = request.session;
    explain.reuse = request.reuse;
    const Result<Explanation> explanation = service.Explain(explain);
    EXPECT_TRUE(explanation.ok()) << explanation.status().message();
    std::int64_t tokens = 0;
    for (const ExplainSpan& span : explanation->spans) {
      if (span.kind == "moved" && span.tier == tier) tokens += span.length;
    }
    return tokens;
  }

  // What the critic is answered by a service that never stopped.
  GenerateReply WithoutARestart(ReuseMode mode) {
    const auto service = Open(nullptr);
    Ask(*service, Request(planner_, ReuseMode::kExact, "planner", "s"));
    return Ask(*service, Request(critic_, mode, "critic", "s"));
  }

  static void ExpectSound(agentd::Service& service) {
    EXPECT_EQ(service.GetStats().pool.leases, 0);
    KVS_EXPECT_OK(service.CheckIntegrity());
  }

  std::mt19937 rng_{5};
  const Ids note_ = RandomIds(200);
  const Ids planner_ = Join({RandomIds(30), note_, RandomIds(20)});
  const Ids lead_ = RandomIds(31);
  const Ids critic_ = Join({lead_, note_, RandomIds(25)});
  const TempDir dir_;
  const std::shared_ptr<TierHooks> hooks_ = std::make_shared<TierHooks>();
};

TEST_F(ColdChunksTest, ARestartChangesNoBit) {
  for (const ReuseMode mode :
       {ReuseMode::kRotate, ReuseMode::kEpic, ReuseMode::kCacheBlend, ReuseMode::kDhd, ReuseMode::kAuto}) {
    SCOPED_TRACE(std::string(ReuseModeName(mode)));
    const GenerateReply want = WithoutARestart(mode);
    const std::string name(ReuseModeName(mode));
    StoreNote("s", name);
    const auto service = Open(hooks_, name);
    ASSERT_NE(service, nullptr);
    const GenerateRequest critic = Request(critic_, mode, "critic", "s");
    EXPECT_GE(MovedFrom(*service, critic, "cold"), 190);
    const GenerateReply reply = Ask(*service, critic);
    EXPECT_EQ(reply.ids, want.ids);
    EXPECT_EQ(reply.reuse.moved_tokens, want.reuse.moved_tokens);
    EXPECT_EQ(reply.reuse.recomputed_tokens, want.reuse.recomputed_tokens);
    EXPECT_EQ(reply.reuse.approximate, want.reuse.approximate);
    EXPECT_EQ(service->GetStats().cold.hits, 4) << "232 tokens, and not the rest of the planner's prompt";
    ExpectSound(*service);
  }
}

TEST_F(ColdChunksTest, ThePromptsOwnPrefixComesToo) {
  {
    const auto service = Open(hooks_);
    ASSERT_NE(service, nullptr);
    Ask(*service, Request(planner_, ReuseMode::kExact, "planner", "s"));
    Ask(*service, Request(Join({lead_, RandomIds(100)}), ReuseMode::kExact, "critic", "s"));
    service->Drain();
  }
  const auto service = Open(hooks_);
  ASSERT_NE(service, nullptr);
  const GenerateReply reply = Ask(*service, Request(critic_, ReuseMode::kRotate, "critic", "s"));
  EXPECT_EQ(reply.reuse.prefix_tokens, 31);
  EXPECT_GE(reply.reuse.moved_tokens, 190);
  ExpectSound(*service);
}

TEST_F(ColdChunksTest, StrangersFindNothing) {
  // The tier keeps 128 bytes of a name: what may be cut off is nobody's.
  const std::string longest(128, 'n');
  const std::pair<std::string, std::string> sessions[] = {// who stored it, who asks
                                                          {"s", "t"},
                                                          {"s", ""},
                                                          {"", ""},
                                                          {longest, longest},
                                                          {longest, longest + "m"}};
  for (std::size_t i = 0; i < std::size(sessions); ++i) {
    const auto& [stored, asks] = sessions[i];
    SCOPED_TRACE(stored + " " + asks);
    StoreNote(stored, std::to_string(i));
    const auto service = Open(hooks_, std::to_string(i));
    ASSERT_NE(service, nullptr);
    const GenerateReply reply = Ask(*service, Request(critic_, ReuseMode::kRotate, "critic", asks));
    EXPECT_EQ(reply.reuse.moved_tokens, 0);
    EXPECT_FALSE(reply.reuse.approximate);
  }
  EXPECT_EQ(hooks_->loads, 0);
}

TEST_F(ColdChunksTest, WhatWasEvictedIsReadBack) {
  const auto service = Open(hooks_);
  ASSERT_NE(service, nullptr);
  Ask(*service, Request(planner_, ReuseMode::kExact, "planner", "s"));
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (service->GetStats().cold.entries < 4) {
    ASSERT_LT(std::chrono::steady_clock::now(), deadline);
    std::this_thread::yield();
  }
  const GenerateRequest critic = Request(critic_, ReuseMode::kRotate, "critic", "s");
  EXPECT_GE(MovedFrom(*service, critic, "host"), 190);
  KVS_ASSERT_OK(service->Evict({.cold = false}));
  EXPECT_GE(MovedFrom(*service, critic, "cold"), 190);
  const GenerateReply reply = Ask(*service, critic);
  EXPECT_GE(reply.reuse.moved_tokens, 190);
  EXPECT_EQ(reply.ids, WithoutARestart(ReuseMode::kRotate).ids);
  ExpectSound(*service);
}

TEST_F(ColdChunksTest, WhatIsNowhereAnyMoreHasAReason) {
  const auto service = Open(nullptr);
  ASSERT_NE(service, nullptr);
  Ask(*service, Request(planner_, ReuseMode::kExact, "planner", "s"));
  KVS_ASSERT_OK(service->Evict({.cold = false}));
  const GenerateReply gone = Ask(*service, Request(critic_, ReuseMode::kRotate, "critic", "s"));
  EXPECT_EQ(gone.reuse.moved_tokens, 0);
  EXPECT_GE(MissTokens(gone.reuse, "evicted"), 190);
  ExpectSound(*service);
}

TEST_F(ColdChunksTest, DamageIsAMissWithItsReason) {
  StoreNote("s");
  const auto off = Open(nullptr);
  const GenerateReply want = Ask(*off, Request(critic_, ReuseMode::kOff, "critic", "s"));
  const auto service = Open(hooks_);
  ASSERT_NE(service, nullptr);
  hooks_->lost = 0;
  const GenerateReply reply = Ask(*service, Request(critic_, ReuseMode::kRotate, "critic", "s"));
  EXPECT_EQ(reply.ids, want.ids);
  EXPECT_FALSE(reply.reuse.approximate);
  EXPECT_GE(MissTokens(reply.reuse, "cold_damaged"), 190);
  EXPECT_EQ(hooks_->loads, 1) << "it is not tried again for the same request";
  ExpectSound(*service);
}

TEST_F(ColdChunksTest, ComputingIsPreferredWhereItIsFaster) {
  StoreNote("s");
  hooks_->estimate_seconds = 3600;
  const auto service = Open(hooks_);
  ASSERT_NE(service, nullptr);
  Ask(*service, Request(RandomIds(100), ReuseMode::kExact, "other", ""));  // the cost of computing is known now
  const GenerateReply reply = Ask(*service, Request(critic_, ReuseMode::kRotate, "critic", "s"));
  EXPECT_EQ(reply.reuse.moved_tokens, 0);
  EXPECT_GE(MissTokens(reply.reuse, "load_slower_than_recompute"), 190);
  EXPECT_EQ(hooks_->loads, 0);
}

TEST_F(ColdChunksTest, AChunkInMemoryIsUsedThoughThePrefixIsNotWorthItsLoad) {
  const GenerateReply want = WithoutARestart(ReuseMode::kRotate);
  {
    const auto service = Open(hooks_);
    ASSERT_NE(service, nullptr);
    Ask(*service, Request(Join({lead_, RandomIds(100)}), ReuseMode::kExact, "critic", "s"));
    service->Drain();
  }
  hooks_->estimate_seconds = 3600;
  const auto service = Open(hooks_);
  ASSERT_NE(service, nullptr);
  Ask(*service, Request(planner_, ReuseMode::kExact, "planner", "s"));
  const GenerateReply reply = Ask(*service, Request(critic_, ReuseMode::kRotate, "critic", "s"));
  EXPECT_EQ(hooks_->loads, 0);
  EXPECT_EQ(reply.reuse.prefix_tokens, 0);
  EXPECT_EQ(MissTokens(reply.reuse, "load_slower_than_recompute"), 31);
  EXPECT_EQ(reply.reuse.moved_tokens, want.reuse.moved_tokens);
  EXPECT_EQ(reply.ids, want.ids);
  ExpectSound(*service);
}

// Nothing that does not wait for the disk does; who is cancelled there takes nothing along.
TEST_F(ColdChunksTest, OthersPassWhoWaits) {
  StoreNote("s");
  const auto service = Open(hooks_);
  ASSERT_NE(service, nullptr);
  hooks_->HoldLoads();
  std::vector<std::shared_ptr<Recorder>> waiting;
  std::vector<std::uint64_t> ids;
  for (int i = 0; i < 3; ++i) {
    waiting.push_back(std::make_shared<Recorder>());
    const auto id = service->Generate(Request(critic_, ReuseMode::kRotate, "critic", "s"), waiting.back());
    KVS_ASSERT_OK(id);
    ids.push_back(*id);
  }
  hooks_->AwaitLoads(1);
  EXPECT_EQ(Ask(*service, Request(RandomIds(100), ReuseMode::kExact, "other", "t")).ids.size(), 6u);
  service->Cancel(ids[0]);
  EXPECT_EQ(waiting[0]->Wait().error.code(), StatusCode::kCancelled);
  hooks_->ReleaseLoads();
  for (int i = 1; i < 3; ++i) {
    const auto& outcome = waiting[static_cast<std::size_t>(i)]->Wait();
    ASSERT_TRUE(outcome.reply.has_value()) << outcome.error.message();
    EXPECT_GE(outcome.reply->reuse.moved_tokens, 190);
  }
  EXPECT_EQ(hooks_->loads, 1);
  ExpectSound(*service);
}

TEST_F(ColdChunksTest, StoppingWaitsForLoadsAndForNothingElse) {
  StoreNote("s");
  auto service = Open(hooks_);
  ASSERT_NE(service, nullptr);
  hooks_->HoldLoads();
  const auto loading = std::make_shared<Recorder>();
  KVS_ASSERT_OK(service->Generate(Request(critic_, ReuseMode::kRotate, "critic", "s"), loading));
  hooks_->AwaitLoads(1);
  std::thread stop([&] { service.reset(); });
  EXPECT_EQ(loading->Wait().error.code(), StatusCode::kUnavailable);
  hooks_->ReleaseLoads();
  stop.join();
}

TEST_F(ColdChunksTest, ForgettingForgetsSessionsToo) {
  StoreNote("s");
  const auto service = Open(hooks_);
  ASSERT_NE(service, nullptr);
  service->ClearPool();
  const GenerateReply reply = Ask(*service, Request(critic_, ReuseMode::kRotate, "critic", "s"));
  EXPECT_EQ(reply.reuse.moved_tokens, 0);
  EXPECT_EQ(hooks_->loads, 0);
}

}  // namespace
}  // namespace kvshare::testing

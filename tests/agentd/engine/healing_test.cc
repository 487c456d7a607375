// What answers over chunks leave behind: nothing that passes for exact before it is healed; what is healed is stored
// like any other, and gives its pages up for those who wait.
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "tests/agentd/service_harness.h"
#include "tests/agentd/tiny_service.h"
#include "tests/agentd/watched_model.h"
#include "tests/testing/ids.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"

namespace kvshare::testing {
namespace {

using Ids = std::vector<TokenId>;

GenerateRequest Request(Ids prompt, ReuseMode mode, int max_tokens) {
  GenerateRequest request = IdsRequest(std::move(prompt), max_tokens, "a");
  request.reuse = mode;
  request.session = "s";
  request.ignore_eos = true;
  return request;
}

// One who waits finds no room, so the healing ends and what it has is stored, in place of the page that the next one
// had been found to begin with.
TEST(HealingTest, WhoWaitsBehindIsLookedUpAgain) {
  std::mt19937 rng(3);
  std::unique_ptr<runtime::Model> model = LoadTinyModel(kernels::DType::kF32);
  ASSERT_NE(model, nullptr);
  const auto watch = std::make_shared<StepWatch>();
  agentd::ServiceOptions options{.kv_pool_bytes = 26 * static_cast<std::int64_t>(model->kv_layout().page_bytes())};
  options.seconds_per_token = 1;
  auto made = agentd::NewServiceOn(std::make_unique<WatchedModel>(std::move(model), watch), nullptr, options);
  KVS_ASSERT_OK(made);
  agentd::Service& service = **made;
  const Ids note = RandomIds(rng, 200), role = RandomIds(rng, 20);
  const Ids planner = Join({RandomIds(rng, 30), note, RandomIds(rng, 20)});
  Ask(service, Request(planner, ReuseMode::kRotate, 6));
  const GenerateReply moved = Ask(service, Request(Join({role, note, RandomIds(rng, 25)}), ReuseMode::kRotate, 6));
  ASSERT_TRUE(moved.reuse.approximate);
  watch->HoldNextStep();  // the healer's first
  watch->AwaitHeldStep();

  const auto takes_most = std::make_shared<Recorder>(), finds_no_room = std::make_shared<Recorder>(),
             shares_the_lead = std::make_shared<Recorder>();
  KVS_ASSERT_OK(service.Generate(Request(planner, ReuseMode::kExact, 700), takes_most).status());
  KVS_ASSERT_OK(
      service.Generate(Request(Join({planner, RandomIds(rng, 10)}), ReuseMode::kExact, 700), finds_no_room).status());
  const Ids lead = Join({role, {note.begin(), note.begin() + 2}, RandomIds(rng, 40)});
  KVS_ASSERT_OK(service.Generate(Request(lead, ReuseMode::kExact, 4), shares_the_lead).status());
  watch->LetGo();
  for (const auto& asked : {takes_most, finds_no_room, shares_the_lead}) KVS_EXPECT_OK(asked->Wait().error);
  KVS_EXPECT_OK(service.CheckIntegrity());
}

// A prompt whose first token ends the answer: nothing was generated, and yet its KV is another.
TEST(HealingTest, AnAnswerOfNoTokensLeavesNothingExact) {
  std::mt19937 rng(3);
  const Ids note = RandomIds(rng, 600);
  const Ids planner = Join({RandomIds(rng, 30), note, RandomIds(rng, 20)});
  const Ids critic = Join({RandomIds(rng, 20), note, RandomIds(rng, 25)});
  const auto open = [](std::vector<TokenId> eos_ids) {
    std::unique_ptr<runtime::Model> model = LoadTinyModel(kernels::DType::kF32, 1024, 1, 8);
    agentd::ServiceOptions options{.kv_pool_bytes = 400 * static_cast<std::int64_t>(model->kv_layout().page_bytes())};
    options.seconds_per_token = 1;
    auto made = agentd::NewServiceOn(
        std::make_unique<WatchedModel>(std::move(model), std::make_shared<StepWatch>(), std::move(eos_ids)), nullptr,
        options);
    EXPECT_TRUE(made.ok());
    return std::move(*made);
  };
  const auto fresh = open({});
  const GenerateReply want = Ask(*fresh, Request(critic, ReuseMode::kExact, 6));
  for (const ReuseMode mode : {ReuseMode::kRotate, ReuseMode::kEpic, ReuseMode::kCacheBlend}) {
    SCOPED_TRACE(std::string(ReuseModeName(mode)));
    const auto before = open({});
    Ask(*before, Request(planner, mode, 6));
    const GenerateReply first = Ask(*before, Request(critic, mode, 1));
    ASSERT_GT(first.reuse.moved_tokens, 0);

    const auto service = open({first.ids[0]});
    Ask(*service, Request(planner, mode, 6));
    GenerateRequest request = Request(critic, mode, 200);
    request.ignore_eos = false;
    const GenerateReply ended = Ask(*service, request);
    EXPECT_TRUE(ended.ids.empty());
    EXPECT_TRUE(ended.reuse.approximate);
    EXPECT_EQ(Ask(*service, Request(critic, ReuseMode::kExact, 6)).ids, want.ids);
    KVS_EXPECT_OK(service->CheckIntegrity());
  }
}

// Not a doubt of the guard's: nothing was looked at.
TEST(HealingTest, WhatCannotBeComputedOverChunksIsComputedPlainly) {
  std::mt19937 rng(5);
  const Ids note = RandomIds(rng, 600);
  const Ids planner = Join({RandomIds(rng, 30), note, RandomIds(rng, 20)});
  const Ids critic = Join({RandomIds(rng, 20), note, RandomIds(rng, 25)});
  for (const ReuseMode mode : {ReuseMode::kRotate, ReuseMode::kEpic, ReuseMode::kCacheBlend}) {
    SCOPED_TRACE(std::string(ReuseModeName(mode)));
    const auto watch = std::make_shared<StepWatch>();
    std::unique_ptr<runtime::Model> model = LoadTinyModel(kernels::DType::kF32, 1024, 1, 8);
    agentd::ServiceOptions options{.kv_pool_bytes = 400 * static_cast<std::int64_t>(model->kv_layout().page_bytes())};
    options.seconds_per_token = 1;
    const auto service =
        agentd::NewServiceOn(std::make_unique<WatchedModel>(std::move(model), watch), nullptr, options);
    KVS_ASSERT_OK(service);
    const Ids want = Ask(**service, Request(critic, ReuseMode::kOff, 6)).ids;
    Ask(**service, Request(planner, mode, 6));
    watch->fails_once = true;
    const GenerateReply reply = Ask(**service, Request(critic, mode, 6));
    EXPECT_FALSE(watch->fails_once);
    EXPECT_FALSE(reply.reuse.approximate);
    EXPECT_GT(MissTokens(reply.reuse, "quality_guard"), 0);
    EXPECT_EQ(reply.ids, want);
    EXPECT_EQ((*service)->GetStats().approximate.sent_back, 0);
    KVS_EXPECT_OK((*service)->CheckIntegrity());
  }
}

TEST(HealingTest, WhatWasHealedOutlivesARestartToItsLastToken) {
  std::mt19937 rng(4);
  const TempDir dir;
  const agentd::ServiceOptions options{.cold_dir = dir.path().string(), .cold_bytes = std::int64_t{256} << 20};
  const Ids note = RandomIds(rng, 200);
  Ids all = Join({RandomIds(rng, 20), note, RandomIds(rng, 25)});
  {
    const auto service = NewTinyService(kernels::DType::kF32, options);
    ASSERT_NE(service, nullptr);
    Ask(*service, Request(Join({RandomIds(rng, 30), note, RandomIds(rng, 20)}), ReuseMode::kRotate, 6));
    const GenerateReply reply = Ask(*service, Request(all, ReuseMode::kRotate, 6));
    ASSERT_TRUE(reply.reuse.approximate);
    all = Join({all, reply.ids});
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (service->GetStats().approximate.healed == 0 && std::chrono::steady_clock::now() < deadline) {
      std::this_thread::yield();
    }
    ASSERT_EQ(service->GetStats().approximate.healed, 1);
    service->Drain();
  }
  const auto service = NewTinyService(kernels::DType::kF32, options);
  ASSERT_NE(service, nullptr);
  LookupRequest lookup;
  lookup.prompt = TokenPrompt{all};
  const Result<Match> match = service->Lookup(lookup);
  KVS_ASSERT_OK(match);
  EXPECT_EQ(match->prefix_tokens, static_cast<std::int64_t>(all.size()) - 1);
}

}  // namespace
}  // namespace kvshare::testing

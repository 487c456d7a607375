// Prompts that are computed while their chunks are read from disk, on a real tiny model: the same answers as if these
// had been in memory, whatever is lost on the way; and how much is computed meanwhile.
#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "agentd/service.h"
#include "gtest/gtest.h"
#include "tests/agentd/hooked_tier.h"
#include "tests/agentd/service_harness.h"
#include "tests/agentd/watched_model.h"
#include "tests/testing/ids.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::testing {
namespace {

using Ids = std::vector<TokenId>;

constexpr ReuseMode kModes[] = {ReuseMode::kRotate, ReuseMode::kEpic, ReuseMode::kCacheBlend, ReuseMode::kDhd,
                                ReuseMode::kAuto};

// The last of the model's layers lie in the pages' last part, which the test holds back.
class ChunksComingTest : public ::testing::Test {
 protected:
  // As after a restart of a daemon whose planner has read the note, and nobody else.
  std::unique_ptr<agentd::Service> Open(std::optional<double> share) {
    dir_.emplace();
    {
      const auto before = Start(share, dir_->File("cold"));
      Ask(*before, Request(planner_, ReuseMode::kExact, "planner"));
      before->Drain();
    }
    return Start(share, dir_->File("cold"));
  }

  // `cold` empty: without a disk.
  std::unique_ptr<agentd::Service> Start(std::optional<double> share, const std::string& cold_dir) {
    const TempDir files;
    TinyModelOptions tiny;
    tiny.layers = 8;
    tiny.head_dim = 128;  // pages of 512 KiB: two parts
    KVS_EXPECT_OK(WriteTinyModel(files.path(), tiny));
    Result<std::unique_ptr<runtime::Model>> model = runtime::LoadModel(files.path().string(), {.threads = 1});
    KVS_EXPECT_OK(model.status());
    watch_ = std::make_shared<StepWatch>();
    agentd::ServiceOptions options;
    options.kv_pool_bytes = static_cast<std::int64_t>((*model)->kv_layout().page_bytes()) * kPoolPages;
    options.always_load = true;
    options.seconds_per_token = std::chrono::duration<double>(kPerToken).count();
    options.blend_recompute = share;
    hooks_ = std::make_shared<TierHooks>();
    std::unique_ptr<agentd::ColdTier> cold;
    if (!cold_dir.empty()) cold = OpenHookedTier(**model, cold_dir, hooks_);
    Result<std::unique_ptr<agentd::Service>> service =
        agentd::NewServiceOn(std::make_unique<WatchedModel>(*std::move(model), watch_), std::move(cold), options);
    KVS_EXPECT_OK(service.status());
    return *std::move(service);
  }

  static GenerateRequest Request(Ids prompt, ReuseMode mode, const std::string& agent, int max_tokens = 6) {
    GenerateRequest request = IdsRequest(std::move(prompt), max_tokens, agent);
    request.reuse = mode;
    request.session = "s";
    request.ignore_eos = true;
    return request;
  }

  // What the critic is answered by a service that never stopped.
  GenerateReply FromMemory(ReuseMode mode, int max_tokens = 6) {
    const auto service = Start(0.15, "");
    Ask(*service, Request(planner_, ReuseMode::kExact, "planner"));
    return Ask(*service, Request(critic_, mode, "critic", max_tokens));
  }

  // The critic asks; the last part comes when a layer is being computed that needs none of it.
  std::shared_ptr<Recorder> AskWhileLoading(agentd::Service& service, ReuseMode mode, int max_tokens = 6) {
    hooks_->HoldLoads();
    auto recorder = std::make_shared<Recorder>();
    KVS_EXPECT_OK(service.Generate(Request(critic_, mode, "critic", max_tokens), recorder).status());
    hooks_->AwaitHiding();
    watch_->AwaitGatedStep();
    hooks_->ReleaseLoads();
    return recorder;
  }

  // The critic asks for a blend; the first part has come, and the engine has had time to think of what to do with it.
  std::shared_ptr<Recorder> WaitWithIt(agentd::Service& service) {
    hooks_->HoldLoads();
    auto recorder = std::make_shared<Recorder>();
    KVS_EXPECT_OK(service.Generate(Request(critic_, ReuseMode::kCacheBlend, "critic"), recorder).status());
    hooks_->AwaitHiding();
    const auto beside = std::make_shared<Recorder>();
    KVS_EXPECT_OK(service.Generate(IdsRequest(RandomIds(rng_, 10), 2, "beside"), beside).status());
    while (!beside->ended() && !watch_->gated) std::this_thread::yield();
    return recorder;
  }

  static GenerateReply ReplyOf(Recorder& recorder) {
    const Recorder::Outcome& outcome = recorder.Wait();
    EXPECT_TRUE(outcome.reply.has_value()) << outcome.error.message();
    return outcome.reply.value_or(GenerateReply{});
  }

  static void ExpectSound(agentd::Service& service) {
    EXPECT_EQ(service.GetStats().pool.leases, 0);
    KVS_EXPECT_OK(service.CheckIntegrity());
  }

  static constexpr std::chrono::milliseconds kPerToken{15};  // what the engine takes computing for
  // Less than the prompt's 270 tokens take, and more than the 171 that are computed with 15 % of its chunk.
  static constexpr std::chrono::milliseconds kSlowDisk = kPerToken * 200;
  static constexpr std::int64_t kPoolPages = 40;

  std::mt19937 rng_{5};
  const Ids note_ = RandomIds(rng_, 200);
  const Ids planner_ = Join({RandomIds(rng_, 30), note_, RandomIds(rng_, 20)});
  const Ids critic_ = Join({RandomIds(rng_, 31), note_, RandomIds(rng_, 25)});
  std::optional<TempDir> dir_;
  std::shared_ptr<TierHooks> hooks_;
  std::shared_ptr<StepWatch> watch_;
};

TEST_F(ChunksComingTest, ComputingOverThemMeanwhileChangesNoBit) {
  for (const ReuseMode mode : kModes) {
    SCOPED_TRACE(std::string(ReuseModeName(mode)));
    const GenerateReply want = FromMemory(mode);
    const auto service = Open(0.15);
    const GenerateReply reply = ReplyOf(*AskWhileLoading(*service, mode));
    EXPECT_EQ(reply.ids, want.ids);
    EXPECT_EQ(reply.reuse.moved_tokens, want.reuse.moved_tokens);
    EXPECT_EQ(reply.reuse.recomputed_tokens, want.reuse.recomputed_tokens);
    EXPECT_EQ(reply.reuse.approximate, want.reuse.approximate);
    // What has come is stored like any load: the next finds it in memory.
    const Ids next = Join({RandomIds(rng_, 31), note_, RandomIds(rng_, 25)});
    EXPECT_GE(Ask(*service, Request(next, ReuseMode::kRotate, "next")).reuse.moved_tokens, 190);
    EXPECT_EQ(hooks_->loads, 1);
    ExpectSound(*service);
  }
}

TEST_F(ChunksComingTest, WhatWasComputedOverALostPageIsComputedExactly) {
  const GenerateReply want = FromMemory(ReuseMode::kOff);
  for (const ReuseMode mode : kModes) {
    SCOPED_TRACE(std::string(ReuseModeName(mode)));
    for (const std::string what : {"its first page", "its last page", "another page in its place"}) {
      SCOPED_TRACE(what);
      const auto service = Open(0.15);
      if (what == "its first page") hooks_->lost = 0;
      if (what == "its last page") hooks_->lost = 3;
      if (!hooks_->lost.has_value()) {
        hooks_->on_loaded = [](std::vector<agentd::ColdLoaded>& loaded) { loaded[2].page.tokens[5] ^= 1; };
      }
      const GenerateReply reply = ReplyOf(*AskWhileLoading(*service, mode));
      EXPECT_EQ(reply.ids, want.ids);
      EXPECT_FALSE(reply.reuse.approximate);
      EXPECT_GE(MissTokens(reply.reuse, "cold_damaged"), 190);
      EXPECT_EQ(service->GetStats().approximate.sent_back, 0) << "the guard had nothing to say";
      ExpectSound(*service);
    }
  }
}

TEST_F(ChunksComingTest, WhatHasComeStaysAsLongAsItIsUsed) {
  constexpr int kTokens = 600;
  const GenerateReply want = FromMemory(ReuseMode::kRotate, kTokens);
  const auto service = Open(0.15);
  const auto critic = AskWhileLoading(*service, ReuseMode::kRotate, kTokens);
  critic->WaitForFirstChunk();
  // Twice what the pool has room for, beside the critic.
  for (int i = 0; i < 8; ++i) Ask(*service, Request(RandomIds(rng_, 10 * 64), ReuseMode::kExact, "other", 1));
  EXPECT_EQ(service->GetStats().requests_running, 1) << "the critic had its answer before";
  EXPECT_GT(service->GetStats().pool.evictions, 40);
  EXPECT_EQ(ReplyOf(*critic).ids, want.ids);
  ExpectSound(*service);
}

// CacheBlend's loading controller: what takes no longer than the load costs nothing.
TEST_F(ChunksComingTest, ASlowDiskLetsMoreBeComputed) {
  const auto service = Open(std::nullopt);
  hooks_->before_load = kSlowDisk;
  const GenerateReply reply = ReplyOf(*AskWhileLoading(*service, ReuseMode::kCacheBlend));
  EXPECT_GT(reply.reuse.recomputed_tokens, 29) << "15 % of 196";
  EXPECT_LE(reply.reuse.recomputed_tokens, 127) << "with the choosing, as much work as computing all";
  EXPECT_TRUE(reply.reuse.approximate);
  ExpectSound(*service);
}

TEST_F(ChunksComingTest, NoMoreIsComputedThanWasAskedFor) {
  const auto service = Open(0.15);
  hooks_->before_load = kSlowDisk;
  const auto critic = WaitWithIt(*service);
  EXPECT_FALSE(watch_->gated) << "15 % take less than the disk";
  hooks_->ReleaseLoads();
  EXPECT_EQ(ReplyOf(*critic).reuse.recomputed_tokens, 29);
}

TEST_F(ChunksComingTest, NobodyWaitsForWhatIsComputedMeanwhile) {
  const auto service = Open(std::nullopt);
  hooks_->before_load = kSlowDisk;
  const auto other = std::make_shared<Recorder>();
  KVS_ASSERT_OK(service->Generate(Request(RandomIds(rng_, 10), ReuseMode::kExact, "other", 1500), other));
  other->WaitForFirstChunk();
  const auto critic = WaitWithIt(*service);
  EXPECT_FALSE(watch_->gated);
  hooks_->ReleaseLoads();
  EXPECT_EQ(ReplyOf(*critic).reuse.recomputed_tokens, 29);
  EXPECT_EQ(service->GetStats().requests_running, 1) << "nobody was in its company";
}

}  // namespace
}  // namespace kvshare::testing

// Memory and disk together: what one lacks the other gives, whatever happens to it on the way, and nobody who does not
// need it waits for it.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/agentd/service_harness.h"
#include "tests/testing/temp_dir.h"

namespace kvshare::testing {
namespace {

using Ids = std::vector<TokenId>;

Ids Counting(std::int64_t n, TokenId start = 0) {
  Ids ids;
  for (std::int64_t i = 0; i < n; ++i) ids.push_back(static_cast<TokenId>((start + i * 7) % 50));
  return ids;
}

class ColdPathTest : public ::testing::Test {
 protected:
  // A service over the directory that all of a test share.
  std::unique_ptr<TapeService> Open(std::int64_t pool_pages = 0, std::function<void()> before_forward = nullptr) {
    agentd::ServiceOptions options;
    options.cold_dir = (dir_.path() / "cold").string();
    return std::make_unique<TapeService>(model_, pool_pages, options, std::make_shared<TierHooks>(),
                                         std::move(before_forward));
  }

  // Serves each prompt once and shuts down in order.
  void Store(const std::vector<Ids>& prompts, int max_tokens = 1, std::int64_t pool_pages = 0) {
    const auto tape = Open(pool_pages);
    for (const Ids& prompt : prompts) tape->Ask(IdsRequest(prompt, max_tokens, "writer"));
    tape->service->Drain();
    EXPECT_EQ(tape->service->GetStats().cold.dropped, 0);
  }

  // What is copied to disk can be found there soon after.
  static void AwaitReusable(TapeService& tape, const Ids& prompt, std::int64_t tokens) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    LookupRequest request;
    request.prompt = TokenPrompt{prompt};
    std::int64_t found = 0;
    while (found < tokens && std::chrono::steady_clock::now() < deadline) {
      const Result<Match> match = tape.service->Lookup(request);
      ASSERT_TRUE(match.ok());
      found = match->prefix_tokens;
      std::this_thread::yield();
    }
    EXPECT_EQ(found, tokens);
  }

  static std::string Tiers(const Explanation& explanation) {
    std::string text;
    for (const ExplainSpan& span : explanation.spans) {
      text += span.kind + (span.tier.empty() ? "" : "/" + span.tier) + ":" + std::to_string(span.length) + " ";
    }
    return text;
  }

  TapeModelOptions model_;
  TempDir dir_;
};

TEST_F(ColdPathTest, ARestartFindsEveryTokenAgain) {
  const Ids prompt = Counting(200);
  Store({prompt}, 30);  // 229 tokens have KV: the last one is never an input
  const auto tape = Open();
  kvshare::ExplainRequest ask;
  ask.prompt = TokenPrompt{prompt};
  const Result<Explanation> explanation = tape->service->Explain(ask);
  ASSERT_TRUE(explanation.ok());
  EXPECT_EQ(Tiers(*explanation), "exact/cold:199 fresh:1 ");
  EXPECT_EQ(explanation->spans[0].source, "writer");
  EXPECT_EQ(tape->Ask(IdsRequest(prompt, 30)).reuse.prefix_tokens, 199);
  EXPECT_EQ(tape->Ask(IdsRequest(prompt, 30)).reuse.prefix_tokens, 199);  // from memory
  EXPECT_EQ(tape->hooks->loads, 1);
  Ids longer = prompt;
  for (const TokenId id : TapeContinuation(model_, prompt, 30)) longer.push_back(id);
  longer.push_back(1);
  longer.push_back(2);
  EXPECT_EQ(tape->Ask(IdsRequest(longer, 5)).reuse.prefix_tokens, 229);
  const Stats stats = tape->service->GetStats();
  EXPECT_EQ(stats.cold.hits, 4);
  EXPECT_EQ(stats.cold.state, "ok");
  tape->ExpectSound();
}

TEST_F(ColdPathTest, WhatMemoryEvictsComesBackFromDisk) {
  model_.max_positions = 256;
  const auto tape = Open(4);
  const Ids first = Counting(150), second = Counting(250, 5);
  for (int round = 0; round < 4; ++round) {
    for (const Ids& prompt : {first, second}) {
      const auto reusable = static_cast<std::int64_t>(prompt.size()) - 1;
      const GenerateReply reply = tape->Ask(IdsRequest(prompt, 3));
      if (round > 0) {
        EXPECT_EQ(reply.reuse.prefix_tokens, reusable);
      }
      AwaitReusable(*tape, first, 149);
      if (round > 0) AwaitReusable(*tape, second, 249);
    }
  }
  const Stats stats = tape->service->GetStats();
  EXPECT_GT(stats.pool.evictions, 0);
  EXPECT_GT(stats.cold.hits, 0);
  EXPECT_EQ(stats.cold.dropped, 0);
  tape->ExpectSound();
}

TEST_F(ColdPathTest, TheLongerOfMemorysAndDisksPageIsUsed) {
  const Ids prompt = Counting(100);
  Store({prompt});
  {
    const auto tape = Open();
    Ids other(prompt.begin(), prompt.begin() + 70);
    other.push_back(49);
    EXPECT_EQ(tape->Ask(IdsRequest(other, 1)).reuse.prefix_tokens, 70);
    // Memory has 6 rows of the second page now, the disk 36.
    EXPECT_EQ(tape->Ask(IdsRequest(prompt, 1)).reuse.prefix_tokens, 99);
    EXPECT_EQ(tape->hooks->loaded_pages, 3);
    tape->ExpectSound();
  }
  const auto tape = Open();
  Ids longer = prompt;
  longer.push_back(49);
  EXPECT_EQ(tape->Ask(IdsRequest(longer, 1)).reuse.prefix_tokens, 100);
  EXPECT_EQ(tape->Ask(IdsRequest(prompt, 1)).reuse.prefix_tokens, 99);
  EXPECT_EQ(tape->hooks->loaded_pages, 2);  // what memory has is not loaded
}

TEST_F(ColdPathTest, APageThatIsLostOnTheWayIsComputedAndSaysSo) {
  const Ids prompt = Counting(300);
  struct Case {
    const char* reason;
    std::function<void(agentd::ColdLoaded&)> spoil;
  };
  const Case cases[] = {
      {"cold_evicted", [](agentd::ColdLoaded& page) { page.status = NotFound("x"); }},
      {"cold_damaged", [](agentd::ColdLoaded& page) { page.status = DataLoss("x"); }},
      {"cold_unreadable", [](agentd::ColdLoaded& page) { page.status = Unavailable("x"); }},
      {"cold_damaged", [](agentd::ColdLoaded& page) { page.page.tokens[5] ^= 1; }},
      {"cold_damaged", [](agentd::ColdLoaded& page) { page.page.parent.bytes[0] ^= 1; }},
      {"cold_damaged", [](agentd::ColdLoaded& page) { page.page.start += 64; }},
  };
  Store({prompt});
  for (const Case& c : cases) {
    for (std::size_t lost = 0; lost < 5; ++lost) {
      SCOPED_TRACE(std::string(c.reason) + ", page " + std::to_string(lost));
      const auto tape = Open();
      tape->hooks->on_loaded = [&](std::vector<agentd::ColdLoaded>& loaded) { c.spoil(loaded[lost]); };
      const GenerateReply reply = tape->Ask(IdsRequest(prompt, 8));
      const auto kept = static_cast<std::int64_t>(lost * 64);
      EXPECT_EQ(reply.reuse.prefix_tokens, kept);
      EXPECT_EQ(MissTokens(reply.reuse, c.reason), 299 - kept);
      tape->hooks->on_loaded = nullptr;
      EXPECT_EQ(tape->Ask(IdsRequest(prompt, 8)).reuse.prefix_tokens, 299);
      tape->ExpectSound();
    }
  }
}

// The model's last layer lies in the pages' last part, which the test holds back.
class PipelinedLoadTest : public ColdPathTest {
 protected:
  PipelinedLoadTest() {
    model_.layers = 4;
    model_.head_dim = 512;  // pages of 1 MiB: four parts
    Store({prompt_}, 1, kPoolPages);
  }

  // As after a restart; the engine takes computing for slower than any disk.
  void OpenSlow() {
    tape_.reset();
    slow_ = true;
    tape_ = Open(kPoolPages, [this] {
      const auto begun = std::chrono::steady_clock::now();
      while (slow_ && std::chrono::steady_clock::now() < begun + std::chrono::milliseconds(100)) {
      }
    });
    tape_->Ask(IdsRequest(Counting(20, ++opened_), 1));
    slow_ = false;
  }

  // What is stored, and 100 tokens that are not.
  Ids Longer(std::size_t variant) const {
    Ids ids = prompt_;
    ids.push_back(static_cast<TokenId>(variant));
    for (TokenId id = 1; id < 100; ++id) ids.push_back(49 - id % 50);
    return ids;
  }

  // Returns when a step has begun whose pages are not all there.
  void AwaitPipelinedStep() {
    tape_->hooks->AwaitHiding();
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (tape_->probe->gated_layers == 0 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    EXPECT_GT(tape_->probe->gated_layers, 0) << "no step began before its pages were there";
    EXPECT_LT(tape_->probe->gated_layers, model_.layers);
  }

  static constexpr std::int64_t kPoolPages = 40;
  const Ids prompt_ = Counting(300);
  TokenId opened_ = 0;
  std::atomic<bool> slow_ = false;
  std::unique_ptr<TapeService> tape_;
};

TEST_F(PipelinedLoadTest, AStepBeginsBeforeItsPagesAreAllThere) {
  OpenSlow();
  const Ids longer = Longer(0);
  tape_->hooks->HoldLoads();
  const auto recorder = tape_->Start(IdsRequest(longer, 4));
  AwaitPipelinedStep();
  tape_->hooks->ReleaseLoads();
  const Recorder::Outcome& outcome = recorder->Wait();
  ASSERT_TRUE(outcome.reply.has_value()) << outcome.error.message();
  EXPECT_EQ(outcome.reply->ids, TapeContinuation(model_, longer, 4));
  EXPECT_EQ(outcome.reply->reuse.prefix_tokens, 300);
  EXPECT_EQ(tape_->Ask(IdsRequest(longer, 4)).reuse.prefix_tokens, 399);
  tape_->ExpectSound();
}

TEST_F(PipelinedLoadTest, WhatWasComputedOverALostPageIsComputedAgain) {
  for (std::size_t lost = 0; lost < 5; ++lost) {
    OpenSlow();
    const Ids longer = Longer(lost);
    tape_->hooks->lost = lost;
    tape_->hooks->HoldLoads();
    const auto recorder = tape_->Start(IdsRequest(longer, 4));
    const Ids other = Counting(100, static_cast<TokenId>(20 + lost));
    const auto beside = tape_->Start(IdsRequest(other, 30));
    AwaitPipelinedStep();
    tape_->hooks->ReleaseLoads();
    const Recorder::Outcome& outcome = recorder->Wait();
    ASSERT_TRUE(outcome.reply.has_value()) << outcome.error.message();
    const auto kept = static_cast<std::int64_t>(lost * 64);
    EXPECT_EQ(outcome.reply->ids, TapeContinuation(model_, longer, 4));
    EXPECT_EQ(outcome.reply->reuse.prefix_tokens, kept);
    EXPECT_EQ(MissTokens(outcome.reply->reuse, "cold_damaged"), 300 - kept);
    ASSERT_TRUE(beside->Wait().reply.has_value());
    EXPECT_EQ(beside->Wait().reply->ids, TapeContinuation(model_, other, 30));
    EXPECT_EQ(tape_->probe->wrong_rows, lost < 4 ? 64 : 44);  // seen by the step that was thrown away, and by no other
    const Status sound = tape_->service->CheckIntegrity();
    EXPECT_TRUE(sound.ok()) << sound.message();
  }
}

TEST_F(ColdPathTest, NobodyWaitsForSomebodyElsesLoad) {
  const Ids prompt = Counting(300);
  Store({prompt});
  const auto tape = Open();
  tape->hooks->HoldLoads();
  const auto loading = tape->Start(IdsRequest(prompt, 4));
  tape->hooks->AwaitLoads(1);
  tape->Ask(IdsRequest(Counting(100, 3), 50));
  tape->Ask(IdsRequest(Counting(100, 4), 50));
  const auto same = tape->Start(IdsRequest(prompt, 4));  // wants the same pages: waits for the load that is under way
  tape->Ask(IdsRequest(Counting(100, 5), 50));
  EXPECT_EQ(tape->service->GetStats().requests_running, 1);
  tape->hooks->ReleaseLoads();
  for (const auto& recorder : {loading, same}) {
    const Recorder::Outcome& outcome = recorder->Wait();
    ASSERT_TRUE(outcome.reply.has_value()) << outcome.error.message();
    EXPECT_EQ(outcome.reply->ids, TapeContinuation(model_, prompt, 4));
    EXPECT_EQ(outcome.reply->reuse.prefix_tokens, 299);
  }
  EXPECT_LE(tape->hooks->loaded_pages, 6);  // the second one needs the last, partly filled page for itself
  tape->ExpectSound();
}

TEST_F(ColdPathTest, ARequestEndsWhileItLoads) {
  const Ids prompt = Counting(300);
  Store({prompt});
  const auto tape = Open();
  tape->hooks->HoldLoads();
  std::uint64_t id = 0;
  const auto cancelled = tape->Start(IdsRequest(prompt, 4), &id);
  tape->hooks->AwaitLoads(1);
  tape->service->Cancel(id);
  EXPECT_EQ(cancelled->Wait().error.code(), StatusCode::kCancelled);
  GenerateRequest late = IdsRequest(prompt, 4);
  late.timeout = std::chrono::milliseconds(20);
  EXPECT_EQ(tape->Start(late)->Wait().error.code(), StatusCode::kDeadlineExceeded);  // behind the load
  tape->hooks->ReleaseLoads();
  // The load itself was good: its whole pages are in memory.
  EXPECT_EQ(tape->Ask(IdsRequest(prompt, 4)).reuse.prefix_tokens, 299);
  tape->service->Drain();
  EXPECT_EQ(tape->service->GetStats().pool.leases, 0);
  tape->ExpectSound();
}

TEST_F(ColdPathTest, StoppingWaitsForLoadsAndForNothingElse) {
  const Ids prompt = Counting(300);
  Store({prompt});
  auto tape = Open();
  const auto hooks = tape->hooks;
  hooks->HoldLoads();
  const auto loading = tape->Start(IdsRequest(prompt, 4));
  hooks->AwaitLoads(1);
  std::thread stop([&] { tape->service.reset(); });
  EXPECT_EQ(loading->Wait().error.code(), StatusCode::kUnavailable);
  hooks->ReleaseLoads();
  stop.join();
}

TEST_F(ColdPathTest, ComputingIsPreferredWhereItIsFaster) {
  const Ids prompt = Counting(300);
  Store({prompt});
  agentd::ServiceOptions options;
  options.cold_dir = (dir_.path() / "cold").string();
  const auto hooks = std::make_shared<TierHooks>();
  hooks->estimate_seconds = 3600;
  TapeService tape(model_, 0, options, hooks);
  tape.Ask(IdsRequest(Counting(100, 3), 1));  // the cost of computing is known now
  const GenerateReply reply = tape.Ask(IdsRequest(prompt, 4));
  EXPECT_EQ(reply.reuse.prefix_tokens, 0);
  EXPECT_EQ(MissTokens(reply.reuse, "load_slower_than_recompute"), 299);
  EXPECT_EQ(hooks->loads, 0);
  tape.ExpectSound();
}

TEST_F(ColdPathTest, RefusedPagesAreOfferedAgain) {
  const Ids prompt = Counting(300);
  {
    const auto tape = Open();
    tape->hooks->refuse_stores = true;
    tape->Ask(IdsRequest(prompt, 1));
    EXPECT_EQ(tape->service->GetStats().cold.entries, 0);
    tape->hooks->refuse_stores = false;
    tape->service->Drain();
    EXPECT_EQ(tape->service->GetStats().cold.entries, 5);
  }
  EXPECT_EQ(Open()->Ask(IdsRequest(prompt, 1)).reuse.prefix_tokens, 299);
}

TEST_F(ColdPathTest, AFullDiskDoesNotStopTheService) {
  model_.max_positions = 256;
  const auto tape = Open(4);
  tape->hooks->refuse_stores = true;
  for (int i = 0; i < 20; ++i) tape->Ask(IdsRequest(Counting(200, i), 2));
  EXPECT_GT(tape->service->GetStats().pool.evictions, 0);
  tape->ExpectSound();
  tape->service->Drain();  // returns although nothing can be kept
}

TEST_F(ColdPathTest, AnotherModelsKvIsAMissWithAReason) {
  const Ids prompt = Counting(200);
  Store({prompt});
  model_.weights = 1;
  const auto tape = Open();
  // Known in the background after opening.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  std::int64_t tokens = 0;
  while (tokens == 0 && std::chrono::steady_clock::now() < deadline) {
    kvshare::ExplainRequest ask;
    ask.prompt = TokenPrompt{prompt};
    const Result<Explanation> explanation = tape->service->Explain(ask);
    ASSERT_TRUE(explanation.ok());
    for (const ExplainSpan& span : explanation->spans) {
      if (span.miss_reason == "model_changed") tokens += span.length;
    }
    std::this_thread::yield();
  }
  EXPECT_EQ(tokens, 192);
  const GenerateReply reply = tape->Ask(IdsRequest(prompt, 2));
  EXPECT_EQ(reply.reuse.prefix_tokens, 0);
  EXPECT_EQ(MissTokens(reply.reuse, "model_changed"), 192);
  EXPECT_EQ(MissTokens(reply.reuse, "never_stored"), 7);
}

}  // namespace
}  // namespace kvshare::testing

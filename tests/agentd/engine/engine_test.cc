// The engine's promises about order, ends and counts. A gate stops it between steps where who is first matters.
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/agentd/service_harness.h"

namespace kvshare::testing {
namespace {

using Ids = std::vector<TokenId>;

Ids Counting(std::int64_t n, TokenId start = 0) {
  Ids ids;
  for (std::int64_t i = 0; i < n; ++i) ids.push_back(static_cast<TokenId>((start + i * 7) % 50));
  return ids;
}

kvshare::ExplainRequest EarlierRequest(std::uint64_t id) {
  kvshare::ExplainRequest request;
  request.request_id = id;
  return request;
}

TEST(EngineTest, ASecondIdenticalRequestComputesOneToken) {
  TapeService tape;
  const GenerateRequest request = IdsRequest(Counting(200), 10, "planner");
  EXPECT_EQ(tape.Ask(request).reuse.prefix_tokens, 0);
  const std::int64_t rows = tape.probe->rows;
  const GenerateReply again = tape.Ask(request);
  EXPECT_EQ(again.reuse.prefix_tokens, 199);
  EXPECT_EQ(MissTokens(again.reuse, "last_token"), 1);
  EXPECT_EQ(tape.probe->rows - rows, 10);  // one of the prompt, nine generated; the tenth is never an input
  tape.ExpectSound();
}

TEST(EngineTest, ReuseOffNeitherReadsNorStores) {
  TapeService tape;
  GenerateRequest off = IdsRequest(Counting(200), 10);
  off.reuse = ReuseMode::kOff;
  const GenerateRequest exact = IdsRequest(Counting(200), 10);
  tape.Ask(off);
  EXPECT_EQ(tape.service->GetStats().pool.pages, 0);
  EXPECT_EQ(tape.Ask(exact).reuse.prefix_tokens, 0);
  const GenerateReply reply = tape.Ask(off);
  EXPECT_EQ(reply.reuse.prefix_tokens, 0);
  EXPECT_EQ(MissTokens(reply.reuse, "disabled"), 199);
}

TEST(EngineTest, EosEndsTheReplyAndIsNotPartOfIt) {
  TapeModelOptions options;
  const Ids prompt = Counting(20);
  const Ids answer = TapeContinuation(options, prompt, 12);
  options.eos = answer[8];  // the reply ends at its first occurrence
  TapeService tape(options);
  const GenerateReply reply = tape.Ask(IdsRequest(prompt, 100));
  EXPECT_LE(reply.ids.size(), 8u);
  EXPECT_EQ(reply.finish_reason, FinishReason::kStop);
  GenerateRequest on = IdsRequest(prompt, 100);
  on.ignore_eos = true;
  const auto recorder = tape.Start(on);
  const Recorder::Outcome& outcome = recorder->Wait();
  ASSERT_TRUE(outcome.reply.has_value());
  EXPECT_EQ(outcome.reply->ids.size(), 100u);
  EXPECT_EQ(outcome.reply->finish_reason, FinishReason::kLength);
}

TEST(EngineTest, MissReasonsNameWhatHappened) {
  TapeService tape;
  const Ids first = Counting(150);
  const GenerateReply cold = tape.Ask(IdsRequest(first, 1));
  EXPECT_EQ(MissTokens(cold.reuse, "never_stored"), 149);
  Ids longer = first;
  for (TokenId id : Counting(30, 11)) longer.push_back(id);
  const GenerateReply grown = tape.Ask(IdsRequest(longer, 1));
  EXPECT_EQ(grown.reuse.prefix_tokens, 150);
  EXPECT_EQ(MissTokens(grown.reuse, "never_stored"), 29);
  Ids changed = longer;
  changed[100] = (changed[100] + 1) % 50;
  const GenerateReply reply = tape.Ask(IdsRequest(changed, 1));
  EXPECT_EQ(reply.reuse.prefix_tokens, 100);
  EXPECT_EQ(MissTokens(reply.reuse, "messages_changed"), 79);
}

TEST(EngineTest, WhatWasEvictedIsCalledEvicted) {
  TapeService tape({.max_positions = 256}, 4);
  const Ids first = Counting(150);
  tape.Ask(IdsRequest(first, 1));
  tape.Ask(IdsRequest(Counting(250, 5), 1));
  const GenerateReply reply = tape.Ask(IdsRequest(first, 1));
  EXPECT_EQ(reply.reuse.prefix_tokens, 0);
  EXPECT_EQ(MissTokens(reply.reuse, "evicted"), 149);
  tape.ExpectSound();
}

TEST(EngineTest, AFullPoolDeclinesTheCopyAndSaysSo) {
  TapeService tape({.max_positions = 256}, 4);
  Ids prompt = Counting(100);
  tape.Ask(IdsRequest(prompt, 1));  // a full page and 36 rows of the next
  // Room for 256 tokens is all of the pool: there is none to hold those rows and their copy at once.
  for (TokenId id : Counting(20, 3)) prompt.push_back(id);
  const GenerateReply reply = tape.Ask(IdsRequest(prompt, 136));
  EXPECT_EQ(reply.reuse.prefix_tokens, 64);
  EXPECT_EQ(MissTokens(reply.reuse, "pool_full"), 36);
  tape.ExpectSound();
}

TEST(EngineTest, ExplainAgreesWithTheReplyBeforeAndAfter) {
  TapeService tape;
  const Ids stored = Counting(150);
  tape.Ask(IdsRequest(stored, 5, "writer"));
  Ids prompt = stored;
  prompt[130] = (prompt[130] + 1) % 50;
  kvshare::ExplainRequest ask;
  ask.prompt = TokenPrompt{prompt};
  const Result<Explanation> before = tape.service->Explain(ask);
  ASSERT_TRUE(before.ok()) << before.status().message();
  const GenerateReply reply = tape.Ask(IdsRequest(prompt, 5, "reader"));
  const Result<Explanation> after = tape.service->Explain(EarlierRequest(reply.request_id));
  ASSERT_TRUE(after.ok()) << after.status().message();
  for (const Explanation* explanation : {&*before, &*after}) {
    ASSERT_EQ(explanation->spans.size(), 3u);
    const ExplainSpan &exact = explanation->spans[0], &fresh = explanation->spans[1], &last = explanation->spans[2];
    EXPECT_EQ(exact.kind, "exact");
    EXPECT_EQ(exact.length, 130);
    EXPECT_EQ(exact.source, "writer");
    EXPECT_EQ(exact.tier, "host");
    EXPECT_EQ(exact.repair, "none");
    EXPECT_EQ(fresh.start, 130);
    EXPECT_EQ(fresh.length, 19);
    EXPECT_EQ(fresh.miss_reason, "messages_changed");
    EXPECT_EQ(last.start, 149);
    EXPECT_EQ(last.length, 1);
    EXPECT_EQ(last.miss_reason, "last_token");
  }
  EXPECT_EQ(tape.service->Explain(EarlierRequest(999)).status().code(), StatusCode::kNotFound);
}

TEST(EngineTest, ARequestWaitsForTheOneThatComputesItsPrompt) {
  Gate gate;
  gate.Close();
  TapeService tape({.max_positions = 2048}, 0, {.prefill_chunk_tokens = 100}, [&] { gate.Pass(); });
  const Ids prompt = Counting(1000);
  std::vector<std::shared_ptr<Recorder>> recorders;
  recorders.push_back(tape.Start(IdsRequest(prompt, 4)));
  gate.AwaitArrival(1);
  for (int i = 0; i < 5; ++i) recorders.push_back(tape.Start(IdsRequest(prompt, 4)));
  gate.Open();
  for (const auto& recorder : recorders) {
    const Recorder::Outcome& outcome = recorder->Wait();
    ASSERT_TRUE(outcome.reply.has_value());
    EXPECT_EQ(outcome.reply->ids, TapeContinuation(tape.model, prompt, 4));
  }
  // Once the whole prompt, then for each of the others what stands on its last, partly filled page (1000 = 15 * 64 +
  // 40).
  EXPECT_EQ(tape.probe->rows, 1000 + 5 * 40 + 6 * 3);
  tape.ExpectSound();
}

TEST(EngineTest, ACancelledRequestEndsWhereverItIs) {
  Gate gate;
  gate.Close();
  TapeService tape({}, 0, {.max_running = 1}, [&] { gate.Pass(); });
  std::uint64_t running_id = 0, waiting_id = 0;
  const auto running = tape.Start(IdsRequest(Counting(100), 900), &running_id);
  gate.AwaitArrival(1);
  const auto waiting = tape.Start(IdsRequest(Counting(100, 3), 5), &waiting_id);
  const auto patient = tape.Start(IdsRequest(Counting(100, 4), 5));
  tape.service->Cancel(running_id);
  tape.service->Cancel(waiting_id);
  tape.service->Cancel(12345);
  gate.Open();
  EXPECT_EQ(running->Wait().error.code(), StatusCode::kCancelled);
  EXPECT_EQ(waiting->Wait().error.code(), StatusCode::kCancelled);
  EXPECT_TRUE(patient->Wait().reply.has_value());
  EXPECT_EQ(tape.service->GetStats().requests_failed, 2);
  // What the cancelled request had computed is good and stays.
  EXPECT_EQ(tape.Ask(IdsRequest(Counting(100), 2)).reuse.prefix_tokens, 99);
  tape.ExpectSound();
}

TEST(EngineTest, DeadlinesHoldForRunningAndWaiting) {
  Gate gate;
  gate.Close();
  TapeService tape({}, 0, {.max_running = 1}, [&] { gate.Pass(); });
  GenerateRequest request = IdsRequest(Counting(100), 900);
  request.timeout = std::chrono::milliseconds(5);
  const auto running = tape.Start(request);
  gate.AwaitArrival(1);
  const auto waiting = tape.Start(request);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(6);
  while (std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
  gate.Open();
  EXPECT_EQ(running->Wait().error.code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(waiting->Wait().error.code(), StatusCode::kDeadlineExceeded);
  tape.ExpectSound();
}

TEST(EngineTest, TheQueueIsBounded) {
  Gate gate;
  gate.Close();
  TapeService tape({}, 0, {.max_running = 1, .max_waiting = 2}, [&] { gate.Pass(); });
  std::vector<std::shared_ptr<Recorder>> recorders = {tape.Start(IdsRequest(Counting(10), 2))};
  gate.AwaitArrival(1);
  recorders.push_back(tape.Start(IdsRequest(Counting(10), 2)));
  recorders.push_back(tape.Start(IdsRequest(Counting(10), 2)));
  const Result<std::uint64_t> refused =
      tape.service->Generate(IdsRequest(Counting(10), 2), std::make_shared<Recorder>());
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), StatusCode::kResourceExhausted);
  gate.Open();
  for (const auto& recorder : recorders) EXPECT_TRUE(recorder->Wait().reply.has_value());
}

TEST(EngineTest, DrainFinishesWhatRunsAndRefusesTheRest) {
  Gate gate;
  gate.Close();
  TapeService tape({}, 0, {.max_running = 1}, [&] { gate.Pass(); });
  const auto running = tape.Start(IdsRequest(Counting(100), 20));
  const auto waiting = tape.Start(IdsRequest(Counting(100, 9), 20));
  gate.AwaitArrival(1);
  std::thread drain([&] { tape.service->Drain(); });
  // Until the drain has begun, a request is queued: then it is one more that must end well.
  std::vector<std::shared_ptr<Recorder>> queued;
  while (true) {
    auto recorder = std::make_shared<Recorder>();
    const Result<std::uint64_t> id = tape.service->Generate(IdsRequest(Counting(10), 1), recorder);
    if (!id.ok() && id.status().code() == StatusCode::kResourceExhausted) continue;  // the queue is full, too
    if (!id.ok()) {
      EXPECT_EQ(id.status().code(), StatusCode::kUnavailable);
      break;
    }
    queued.push_back(recorder);
    if (queued.size() > 1) tape.service->Cancel(*id);
  }
  gate.Open();
  drain.join();
  EXPECT_TRUE(running->Wait().reply.has_value());
  EXPECT_TRUE(waiting->Wait().reply.has_value());
  if (!queued.empty()) {
    EXPECT_TRUE(queued[0]->Wait().reply.has_value());
  }
}

TEST(EngineTest, StoppingEndsEveryRequest) {
  Gate gate;
  gate.Close();
  TapeService tape({.max_positions = 1 << 20}, 0, {.max_running = 1}, [&] { gate.Pass(); });
  // Far more tokens than are generated before the destructor has begun.
  const auto running = tape.Start(IdsRequest(Counting(100), 500000));
  const auto waiting = tape.Start(IdsRequest(Counting(100, 9), 500000));
  gate.AwaitArrival(1);
  std::thread stop([&] { tape.service.reset(); });
  gate.Open();
  stop.join();
  EXPECT_EQ(running->Wait().error.code(), StatusCode::kUnavailable);
  EXPECT_EQ(waiting->Wait().error.code(), StatusCode::kUnavailable);
}

TEST(EngineTest, AFailedStepFailsItsRequestsAndNothingElse) {
  TapeService tape;
  const GenerateRequest request = IdsRequest(Counting(100), 5);
  tape.probe->fail_next_forwards = 1;
  const auto recorder = tape.Start(request);
  EXPECT_EQ(recorder->Wait().error.code(), StatusCode::kInternal);
  EXPECT_EQ(tape.Ask(request).reuse.prefix_tokens, 0);
  EXPECT_EQ(tape.Ask(request).reuse.prefix_tokens, 99);
  tape.ExpectSound();
}

// No token is made up where the model names none, and what it came from is not kept.
TEST(EngineTest, LogitsThatAreNotNumbersFailTheirRequest) {
  TapeService tape;
  const GenerateRequest request = IdsRequest(Counting(100), 5);
  tape.probe->forward_without_numbers = 1;
  const auto recorder = tape.Start(request);
  EXPECT_EQ(recorder->Wait().error.code(), StatusCode::kInternal);
  EXPECT_NE(recorder->Wait().error.message().find("not numbers"), std::string::npos);
  EXPECT_EQ(tape.Ask(request).reuse.prefix_tokens, 0);

  const GenerateRequest longer = IdsRequest(Counting(200), 5);
  tape.probe->forward_without_numbers = 3;
  EXPECT_EQ(tape.Start(longer)->Wait().error.code(), StatusCode::kInternal);
  EXPECT_EQ(tape.Ask(longer).reuse.prefix_tokens, 199);  // its first two steps were sound
  tape.ExpectSound();
}

TEST(EngineTest, TheAnswerIsCutAtTheWindow) {
  TapeService tape({.max_positions = 128});
  const auto recorder = tape.Start(IdsRequest(Counting(100), 1000));
  const Recorder::Outcome& outcome = recorder->Wait();
  ASSERT_TRUE(outcome.reply.has_value());
  EXPECT_EQ(outcome.reply->ids.size(), 28u);
  EXPECT_EQ(outcome.reply->finish_reason, FinishReason::kLength);
  EXPECT_EQ(tape.Ask(IdsRequest(Counting(127), 1)).ids.size(), 1u);
}

TEST(EngineTest, StatisticsAreTheSumOfTheReplies) {
  TapeService tape;
  ReuseTotals sum;
  std::int64_t miss_tokens = 0;
  for (int i = 0; i < 12; ++i) {
    const GenerateReply reply =
        tape.Ask(IdsRequest(Counting(30 + 20 * i), 3 + i, i % 3 == 0 ? "" : "a" + std::to_string(i % 3)));
    ++sum.requests;
    sum.prompt_tokens += reply.prompt_tokens;
    sum.prefix_tokens += reply.reuse.prefix_tokens;
    sum.fresh_tokens += reply.reuse.fresh_tokens;
    sum.generated_tokens += static_cast<std::int64_t>(reply.ids.size());
  }
  const Stats stats = tape.service->GetStats();
  EXPECT_EQ(stats.totals.requests, sum.requests);
  EXPECT_EQ(stats.totals.prompt_tokens, sum.prompt_tokens);
  EXPECT_EQ(stats.totals.prefix_tokens, sum.prefix_tokens);
  EXPECT_EQ(stats.totals.fresh_tokens, sum.fresh_tokens);
  EXPECT_EQ(stats.totals.generated_tokens, sum.generated_tokens);
  for (const auto& [reason, tokens] : stats.miss_reasons) miss_tokens += tokens;
  EXPECT_EQ(miss_tokens, sum.fresh_tokens);
  ASSERT_EQ(stats.agents.size(), 3u);
  EXPECT_EQ(stats.agents.at("default").requests, 4);
  EXPECT_EQ(stats.agents.at("a1").prompt_tokens + stats.agents.at("a2").prompt_tokens +
                stats.agents.at("default").prompt_tokens,
            sum.prompt_tokens);
}

}  // namespace
}  // namespace kvshare::testing

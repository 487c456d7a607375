// What tests of the service share: a sink that remembers, and a service over a tape model.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "agentd/service.h"
#include "gtest/gtest.h"
#include "tests/agentd/hooked_tier.h"
#include "tests/agentd/tape_model.h"

namespace kvshare::testing {

// Remembers one request's outcome; Wait() returns when it is there.
class Recorder final : public agentd::GenerateSink {
 public:
  struct Outcome {
    std::optional<GenerateReply> reply;
    Status error;
    std::vector<TokenId> chunk_ids;  // all chunks joined
    std::string chunk_text;
  };

  void OnChunk(TokenChunk chunk) override {
    const std::lock_guard lock(mutex_);
    EXPECT_FALSE(ended_) << "a chunk after the end";
    outcome_.chunk_ids.insert(outcome_.chunk_ids.end(), chunk.ids.begin(), chunk.ids.end());
    outcome_.chunk_text += chunk.text;
    changed_.notify_all();
  }
  void OnDone(GenerateReply reply) override { End(std::move(reply), OkStatus()); }
  void OnError(Status status) override { End(std::nullopt, std::move(status)); }

  const Outcome& Wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return ended_; });
    return outcome_;
  }
  bool ended() {
    const std::lock_guard lock(mutex_);
    return ended_;
  }
  void WaitForFirstChunk() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return ended_ || !outcome_.chunk_ids.empty(); });
  }

 private:
  void End(std::optional<GenerateReply> reply, Status status) {
    const std::lock_guard lock(mutex_);
    EXPECT_FALSE(ended_) << "two ends";
    ended_ = true;
    outcome_.reply = std::move(reply);
    outcome_.error = std::move(status);
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool ended_ = false;
  Outcome outcome_;
};

// Lets the engine's thread through one gate at a time, in the order the test says.
class Gate {
 public:
  void Close() {
    const std::lock_guard lock(mutex_);
    open_ = false;
  }
  void Open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  // The engine's side.
  void Pass() {
    std::unique_lock lock(mutex_);
    ++arrivals_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
  }
  // The test's side: until the engine has come to the gate `n` times in all.
  void AwaitArrival(int n) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this, n] { return arrivals_ >= n; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = true;
  int arrivals_ = 0;
};

inline GenerateRequest IdsRequest(std::vector<TokenId> ids, int max_tokens, std::string agent = "") {
  GenerateRequest request;
  request.prompt = TokenPrompt{std::move(ids)};
  request.max_tokens = max_tokens;
  request.agent = std::move(agent);
  return request;
}

// Waits for the reply; a failure fails the test.
inline GenerateReply Ask(agentd::Service& service, const GenerateRequest& request) {
  const auto recorder = std::make_shared<Recorder>();
  const Result<std::uint64_t> id = service.Generate(request, recorder);
  EXPECT_TRUE(id.ok()) << id.status().message();
  if (!id.ok()) return {};
  const Recorder::Outcome& outcome = recorder->Wait();
  EXPECT_TRUE(outcome.reply.has_value()) << outcome.error.message();
  return outcome.reply.value_or(GenerateReply{});
}

struct TapeService {
  TapeModelOptions model;
  std::shared_ptr<TapeProbe> probe = std::make_shared<TapeProbe>();
  std::shared_ptr<TierHooks> hooks = std::make_shared<TierHooks>();  // where there is a cold tier
  std::unique_ptr<agentd::Service> service;

  // `pool_pages`: 0 for room without end.
  explicit TapeService(const TapeModelOptions& model_options = {}, std::int64_t pool_pages = 0,
                       agentd::ServiceOptions options = {}, std::function<void()> before_forward = nullptr)
      : model(model_options) {
    Open(pool_pages, std::move(options), std::move(before_forward));
  }

  // With a cold tier in options.cold_dir, `hooks` in its hands. Loads whatever it costs: the tape computes faster than
  // any disk reads.
  TapeService(const TapeModelOptions& model_options, std::int64_t pool_pages, agentd::ServiceOptions options,
              std::shared_ptr<TierHooks> tier_hooks, std::function<void()> before_forward = nullptr)
      : model(model_options), hooks(std::move(tier_hooks)) {
    options.always_load = !hooks->estimate_seconds.has_value();
    Open(pool_pages, std::move(options), std::move(before_forward));
  }

  void Open(std::int64_t pool_pages, agentd::ServiceOptions options, std::function<void()> before_forward) {
    probe->before_forward = std::move(before_forward);
    std::unique_ptr<runtime::Model> tape = NewTapeModel(model, probe);
    const auto page_bytes = static_cast<std::int64_t>(tape->kv_layout().page_bytes());
    options.kv_pool_bytes = page_bytes * (pool_pages == 0 ? 20000 : pool_pages);
    std::unique_ptr<agentd::ColdTier> cold;
    if (!options.cold_dir.empty()) cold = OpenHookedTier(*tape, options.cold_dir, hooks);
    Result<std::unique_ptr<agentd::Service>> made = NewServiceOn(std::move(tape), std::move(cold), options);
    EXPECT_TRUE(made.ok()) << made.status().message();
    if (made.ok()) service = std::move(*made);
  }

  std::shared_ptr<Recorder> Start(const GenerateRequest& request, std::uint64_t* id = nullptr) {
    auto recorder = std::make_shared<Recorder>();
    const Result<std::uint64_t> started = service->Generate(request, recorder);
    EXPECT_TRUE(started.ok()) << started.status().message();
    if (started.ok() && id != nullptr) *id = *started;
    return started.ok() ? recorder : nullptr;
  }

  // The reply, checked against the model's own continuation.
  GenerateReply Ask(const GenerateRequest& request) {
    const auto recorder = Start(request);
    if (recorder == nullptr) return {};
    const Recorder::Outcome& outcome = recorder->Wait();
    EXPECT_TRUE(outcome.reply.has_value()) << outcome.error.message();
    if (!outcome.reply.has_value()) return {};
    CheckReply(request, outcome);
    return *outcome.reply;
  }

  void CheckReply(const GenerateRequest& request, const Recorder::Outcome& outcome) {
    const GenerateReply& reply = *outcome.reply;
    const std::vector<TokenId>& prompt = std::get<TokenPrompt>(request.prompt).ids;
    EXPECT_EQ(reply.ids, TapeContinuation(model, prompt, request.max_tokens));
    EXPECT_EQ(outcome.chunk_ids, reply.ids);
    EXPECT_EQ(reply.prompt_tokens, static_cast<std::int64_t>(prompt.size()));
    EXPECT_EQ(reply.reuse.prefix_tokens + reply.reuse.fresh_tokens, reply.prompt_tokens);
    std::int64_t explained = 0;
    for (const MissReason& miss : reply.reuse.miss_reasons) explained += miss.tokens;
    EXPECT_EQ(explained, reply.reuse.fresh_tokens);
    EXPECT_GE(reply.reuse.fresh_tokens, 1);
  }

  void ExpectSound() {
    const Status status = service->CheckIntegrity();
    EXPECT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(probe->wrong_rows, 0);
  }
};

inline std::int64_t MissTokens(const ReuseReport& report, const std::string& reason) {
  for (const MissReason& miss : report.miss_reasons) {
    if (miss.reason == reason) return miss.tokens;
  }
  return 0;
}

}  // namespace kvshare::testing

// Whatever stands in the pool, whoever shares the step and however prompts are cut: the same answers, and exactly the
// reuse that was possible.
#include <algorithm>
#include <cstdlib>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/agentd/service_harness.h"

namespace kvshare::testing {
namespace {

using Ids = std::vector<TokenId>;

std::uint32_t Seed() {
  const char* given = std::getenv("KVSHARE_TEST_SEED");
  return given == nullptr ? 7u : static_cast<std::uint32_t>(std::strtoul(given, nullptr, 10));
}

// Prompts as agents send them: a few beginnings, then earlier prompts and answers continued or cut somewhere.
class PromptSource {
 public:
  PromptSource(std::uint32_t seed, std::int64_t longest, std::int64_t vocab)
      : rng_(seed), longest_(longest), vocab_(vocab) {}

  Ids Next() {
    Ids prompt;
    if (!heard_.empty() && Uniform(0, 3) > 0) {
      prompt = heard_[static_cast<std::size_t>(Uniform(0, static_cast<std::int64_t>(heard_.size()) - 1))];
      if (Uniform(0, 1) == 0)
        prompt.resize(static_cast<std::size_t>(Uniform(1, static_cast<std::int64_t>(prompt.size()))));
    }
    const std::int64_t more = Uniform(prompt.empty() ? 1 : 0, 150);
    for (std::int64_t i = 0; i < more; ++i) prompt.push_back(static_cast<TokenId>(Uniform(0, vocab_ - 1)));
    if (static_cast<std::int64_t>(prompt.size()) > longest_) prompt.resize(static_cast<std::size_t>(longest_));
    return prompt;
  }

  void Hear(Ids sequence) {
    heard_.push_back(std::move(sequence));
    if (heard_.size() > 30) heard_.pop_front();
  }

  std::int64_t Uniform(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(rng_);
  }

 private:
  std::mt19937 rng_;
  const std::int64_t longest_;
  const std::int64_t vocab_;
  std::deque<Ids> heard_;
};

std::int64_t CommonPrefix(const Ids& a, const Ids& b) {
  std::size_t n = 0;
  while (n < a.size() && n < b.size() && a[n] == b[n]) ++n;
  return static_cast<std::int64_t>(n);
}

TEST(EnginePropertyTest, OneAtATimeReuseReachesTheExactCeiling) {
  for (const std::int64_t chunk : {1, 37, 64, 512}) {
    for (const TokenId eos : {-1, 3}) {
      SCOPED_TRACE("chunk " + std::to_string(chunk) + ", KVSHARE_TEST_SEED=" + std::to_string(Seed()));
      agentd::ServiceOptions options;
      options.prefill_chunk_tokens = chunk;
      TapeService tape({.eos = eos}, 0, options);
      PromptSource source(Seed(), 900, tape.model.vocab_size);
      std::vector<Ids> stored;
      std::int64_t reused = 0;
      for (int i = 0; i < 120 && !::testing::Test::HasFailure(); ++i) {
        GenerateRequest request = IdsRequest(source.Next(), static_cast<int>(source.Uniform(1, 90)));
        const Ids& prompt = std::get<TokenPrompt>(request.prompt).ids;
        std::int64_t ceiling = 0;
        for (const Ids& earlier : stored) ceiling = std::max(ceiling, CommonPrefix(earlier, prompt));
        ceiling = std::min(ceiling, static_cast<std::int64_t>(prompt.size()) - 1);

        const GenerateReply reply = tape.Ask(request);
        EXPECT_EQ(reply.reuse.prefix_tokens, ceiling);
        reused += reply.reuse.prefix_tokens;
        Ids sequence = prompt;
        sequence.insert(sequence.end(), reply.ids.begin(), reply.ids.end());
        source.Hear(sequence);
        // The last token has KV only if the model went on to say eos after it.
        if (reply.finish_reason == FinishReason::kLength) sequence.pop_back();
        stored.push_back(std::move(sequence));
      }
      EXPECT_GT(reused, 1000);
      tape.ExpectSound();
    }
  }
}

struct Company {
  std::int64_t in_flight;
  std::int64_t pool_pages;
  std::int64_t chunk;
  std::int64_t max_running;
};

TEST(EnginePropertyTest, AnswersDoNotDependOnCompanyPoolOrChunks) {
  // A context of 1024 tokens takes 16 pages: the smallest pools hold one request at a time and evict for each.
  const Company cases[] = {{1, 16, 512, 64}, {8, 16, 64, 8}, {8, 16, 1, 3},   {8, 40, 100, 64},
                           {8, 0, 512, 64},  {8, 40, 7, 64}, {20, 25, 200, 5}};
  for (const Company& c : cases) {
    SCOPED_TRACE(std::to_string(c.in_flight) + " in flight, " + std::to_string(c.pool_pages) + " pages, chunk " +
                 std::to_string(c.chunk) + ", KVSHARE_TEST_SEED=" + std::to_string(Seed()));
    agentd::ServiceOptions options;
    options.prefill_chunk_tokens = c.chunk;
    options.max_running = c.max_running;
    TapeService tape({.eos = 3}, c.pool_pages, options);
    PromptSource source(Seed(), 900, tape.model.vocab_size);
    struct Flight {
      GenerateRequest request;
      std::shared_ptr<Recorder> recorder;
      std::uint64_t id = 0;
      bool cancelled = false;
    };
    std::deque<Flight> flights;
    std::int64_t completed = 0;
    const auto land = [&] {
      Flight flight = std::move(flights.front());
      flights.pop_front();
      const Recorder::Outcome& outcome = flight.recorder->Wait();
      if (!outcome.reply.has_value()) {
        EXPECT_TRUE(flight.cancelled) << outcome.error.message();
        EXPECT_EQ(outcome.error.code(), StatusCode::kCancelled);
        return;
      }
      tape.CheckReply(flight.request, outcome);
      if (flight.request.reuse == ReuseMode::kOff) {
        EXPECT_EQ(outcome.reply->reuse.prefix_tokens, 0);
      }
      ++completed;
    };
    for (int i = 0; i < 150 && !::testing::Test::HasFailure(); ++i) {
      Flight flight;
      flight.request = IdsRequest(source.Next(), static_cast<int>(source.Uniform(1, 60)));
      if (source.Uniform(0, 9) == 0) flight.request.reuse = ReuseMode::kOff;
      flight.recorder = tape.Start(flight.request, &flight.id);
      ASSERT_NE(flight.recorder, nullptr);
      source.Hear(std::get<TokenPrompt>(flight.request.prompt).ids);
      if (source.Uniform(0, 9) == 0) {
        flight.cancelled = true;
        tape.service->Cancel(flight.id);
      }
      if (source.Uniform(0, 39) == 0) tape.service->ClearPool();
      flights.push_back(std::move(flight));
      if (static_cast<std::int64_t>(flights.size()) == c.in_flight) land();
      if (i % 10 == 0) tape.ExpectSound();
    }
    while (!flights.empty()) land();
    tape.ExpectSound();
    const Stats stats = tape.service->GetStats();
    EXPECT_EQ(stats.totals.requests, completed);
    EXPECT_EQ(stats.totals.requests + stats.requests_failed, 150);
    EXPECT_EQ(stats.pool.leases, 0);
    EXPECT_EQ(stats.requests_running, 0);
    EXPECT_EQ(stats.requests_waiting, 0);
    if (c.pool_pages == 16) {
      EXPECT_GT(stats.pool.evictions, 0);
    }
  }
}

}  // namespace
}  // namespace kvshare::testing

// On a real model: a reply computed with reuse, in company, in chunks and under eviction is, to the token, the reply
// that the request gets alone with reuse off. In float32 and bfloat16, greedy and sampled.
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "agentd/service.h"
#include "gtest/gtest.h"
#include "tests/agentd/service_harness.h"
#include "tests/agentd/tiny_service.h"

namespace kvshare::testing {
namespace {

using Ids = std::vector<TokenId>;

std::uint32_t Seed() {
  const char* given = std::getenv("KVSHARE_TEST_SEED");
  return given == nullptr ? 11u : static_cast<std::uint32_t>(std::strtoul(given, nullptr, 10));
}

class ServiceBitsTest : public ::testing::TestWithParam<kernels::DType> {
 protected:
  // Requests that share beginnings of every length, with what the service says to each alone, reuse off.
  struct Case {
    GenerateRequest request;
    GenerateReply alone;
  };

  void MakeCases(int count) {
    const std::unique_ptr<agentd::Service> off = NewTinyService(GetParam(), {.reuse = ReuseMode::kOff});
    ASSERT_NE(off, nullptr);
    std::mt19937 rng(Seed());
    const auto uniform = [&rng](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
    for (int i = 0; i < count; ++i) {
      Ids prompt;
      if (!cases_.empty() && uniform(0, 3) > 0) {
        const Case& earlier = cases_[static_cast<std::size_t>(uniform(0, static_cast<int>(cases_.size()) - 1))];
        prompt = std::get<TokenPrompt>(earlier.request.prompt).ids;
        prompt.insert(prompt.end(), earlier.alone.ids.begin(), earlier.alone.ids.end());
        if (uniform(0, 1) == 0) prompt.resize(static_cast<std::size_t>(uniform(1, static_cast<int>(prompt.size()))));
      }
      for (int more = uniform(1, 90); more > 0; --more) prompt.push_back(uniform(0, 255));
      if (prompt.size() > 700) prompt.resize(700);
      Case made;
      made.request = IdsRequest(prompt, uniform(1, 24), "a" + std::to_string(i % 3));
      if (uniform(0, 2) == 0) {
        made.request.sampling = {.temperature = 0.9f, .top_k = 40, .top_p = 0.95f, .seed = rng()};
      }
      made.alone = Ask(*off, made.request);
      cases_.push_back(std::move(made));
    }
  }

  // Runs all cases, `in_flight` at a time, and compares. Returns the prompt tokens that were reused.
  std::int64_t Run(agentd::Service& service, std::size_t in_flight) {
    std::int64_t reused = 0;
    std::deque<std::pair<const Case*, std::shared_ptr<Recorder>>> flights;
    const auto land = [&] {
      const auto [made, recorder] = flights.front();
      flights.pop_front();
      const Recorder::Outcome& outcome = recorder->Wait();
      ASSERT_TRUE(outcome.reply.has_value()) << outcome.error.message();
      EXPECT_EQ(outcome.reply->ids, made->alone.ids);
      EXPECT_EQ(outcome.reply->text, made->alone.text);
      EXPECT_EQ(outcome.chunk_text, made->alone.text);
      EXPECT_EQ(outcome.reply->finish_reason, made->alone.finish_reason);
      reused += outcome.reply->reuse.prefix_tokens;
    };
    for (const Case& made : cases_) {
      auto recorder = std::make_shared<Recorder>();
      const Result<std::uint64_t> id = service.Generate(made.request, recorder);
      EXPECT_TRUE(id.ok()) << id.status().message();
      if (!id.ok()) return reused;
      flights.emplace_back(&made, std::move(recorder));
      if (flights.size() == in_flight) land();
    }
    while (!flights.empty()) land();
    const Status sound = service.CheckIntegrity();
    EXPECT_TRUE(sound.ok()) << sound.message();
    return reused;
  }

  std::vector<Case> cases_;
};

TEST_P(ServiceBitsTest, ReuseAndCompanyChangeNoToken) {
  SCOPED_TRACE("KVSHARE_TEST_SEED=" + std::to_string(Seed()));
  MakeCases(60);
  struct Setting {
    std::size_t in_flight;
    std::int64_t pool_pages;  // a context takes 16
    std::int64_t chunk;
  };
  for (const Setting& s :
       {Setting{1, 0, 512}, Setting{1, 16, 64}, Setting{8, 0, 100}, Setting{8, 20, 512}, Setting{8, 40, 7}}) {
    SCOPED_TRACE(std::to_string(s.in_flight) + " in flight, " + std::to_string(s.pool_pages) + " pages, chunk " +
                 std::to_string(s.chunk));
    const auto service = NewTinyService(GetParam(), {.prefill_chunk_tokens = s.chunk}, s.pool_pages);
    ASSERT_NE(service, nullptr);
    EXPECT_GT(Run(*service, s.in_flight), 100);
    EXPECT_GT(Run(*service, s.in_flight), 100);  // again, with the pool as the first round left it
    if (s.pool_pages == 16) {
      EXPECT_GT(service->GetStats().pool.evictions, 0);
    }
  }
}

// Through the disk, at random pages of every prompt and after a restart, to the last bit: the cold tier is used
// whatever it costs, by a pool that holds one context.
TEST_P(ServiceBitsTest, TheDiskChangesNoToken) {
  SCOPED_TRACE("KVSHARE_TEST_SEED=" + std::to_string(Seed()));
  MakeCases(60);
  const TempDir dir;
  agentd::ServiceOptions options;
  options.cold_dir = (dir.path() / "cold").string();
  options.cold_bytes = std::int64_t{512} << 20;
  options.always_load = true;
  options.prefill_chunk_tokens = 100;
  for (const std::int64_t pool_pages : {16, 40, 0}) {
    SCOPED_TRACE(std::to_string(pool_pages) + " pages");
    const auto service = NewTinyService(GetParam(), options, pool_pages);
    ASSERT_NE(service, nullptr);
    EXPECT_GT(Run(*service, 8), 100);
    EXPECT_GT(Run(*service, 1), 100);
    service->Drain();
    const Stats stats = service->GetStats();
    EXPECT_GT(stats.cold.hits, 0);
    EXPECT_EQ(stats.cold.integrity_errors, 0);
    EXPECT_EQ(stats.pool.leases, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, ServiceBitsTest, ::testing::Values(kernels::DType::kF32, kernels::DType::kBf16),
                         [](const auto& dtype) { return std::string(kernels::DTypeName(dtype.param)); });

}  // namespace
}  // namespace kvshare::testing

// Prompts of real multi-agent traces, in shuffled orders, one at a time and 32 at once: whatever was reused, answers
// and stored KV are bit for bit those of each prompt computed alone from nothing. Skipped where ../shared/traces is
// absent; KVSHARE_SHARED says where it is otherwise, KVSHARE_TRACE_REQUESTS how many requests of each trace are asked.
#include <algorithm>
#include <cstdlib>
#include <deque>
#include <filesystem>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "agentd/in_process_client.h"
#include "agentd/service.h"
#include "gtest/gtest.h"
#include "kernels/paged_kv.h"
#include "libkvshare/core/hash.h"
#include "runtime/model.h"
#include "tests/agentd/service_harness.h"
#include "tools/trace/prompts.h"
#include "tools/trace/trace_reader.h"

namespace kvshare::testing {
namespace {

constexpr int kAnswerTokens = 4;

std::string Env(const char* name, const std::string& otherwise) {
  const char* const value = std::getenv(name);
  return value == nullptr ? otherwise : value;
}

struct Outcome {
  std::vector<TokenId> answer;
  Digest kv;  // of the prompt's rows but the last token's, page by page
};

class RealTracesKvTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    path_ = Env("KVSHARE_SHARED", "../shared") + "/traces/" + GetParam();
    if (!std::filesystem::exists(path_)) GTEST_SKIP() << path_ << " is absent";
  }

  std::unique_ptr<agentd::Service> Open(std::int64_t pool_bytes) const {
    auto model = runtime::LoadModel("models/notes-3m", {});
    EXPECT_TRUE(model.ok()) << model.status().message();
    agentd::ServiceOptions options;
    options.kv_pool_bytes = pool_bytes;
    options.max_running = 32;
    auto service = agentd::NewService(std::move(*model), options);
    EXPECT_TRUE(service.ok()) << service.status().message();
    return std::move(*service);
  }

  // The trace's first requests as the replayer would ask them.
  std::vector<GenerateRequest> Requests(agentd::Service& service) const {
    const auto trace = trace::ReadTrace(path_);
    EXPECT_TRUE(trace.ok()) << trace.status().message();
    const auto client = agentd::NewInProcessClient(&service);
    trace::PromptBuilder builder(client.get(), &*trace,
                                 {.window = service.Info().max_context_tokens, .max_output = kAnswerTokens});
    EXPECT_TRUE(builder.ProbeRoles().ok());
    const std::size_t limit = std::stoul(Env("KVSHARE_TRACE_REQUESTS", "24"));
    std::vector<GenerateRequest> requests;
    for (std::size_t i = 0; i < trace->requests.size() && i < limit; ++i) {
      auto prompt = builder.Build(i);
      EXPECT_TRUE(prompt.ok()) << prompt.status().message();
      requests.push_back(IdsRequest(std::move(prompt->ids), kAnswerTokens, trace->requests[i].agent));
      requests.back().ignore_eos = true;
    }
    return requests;
  }

  static Digest KvOf(agentd::Service& service, const GenerateRequest& request) {
    AcquireRequest acquire;
    acquire.prompt = request.prompt;
    const Result<LeaseInfo> lease = service.Acquire(acquire);
    EXPECT_TRUE(lease.ok()) << lease.status().message();
    std::int64_t left = static_cast<std::int64_t>(std::get<TokenPrompt>(request.prompt).ids.size()) - 1;
    EXPECT_GE(lease->tokens, left);
    const agentd::SharedPages shared = service.Shared();
    const KvLayoutInfo& layout = shared.layout;
    const std::size_t row_bytes = static_cast<std::size_t>(layout.head_dim) * 2;  // bfloat16
    const std::size_t slab_bytes = row_bytes * kernels::kPageTokens;
    DigestBuilder digest("kv of a prompt");
    for (const LeasePage& page : lease->pages) {
      const auto rows = static_cast<std::size_t>(std::min<std::int64_t>(left, kernels::kPageTokens));
      const auto slabs = static_cast<std::size_t>(layout.num_layers * 2 * layout.num_kv_heads);
      for (std::size_t slab = 0; slab < slabs; ++slab) {
        digest.Bytes({shared.memory + page.offset + slab * slab_bytes, rows * row_bytes});
      }
      left -= static_cast<std::int64_t>(rows);
    }
    EXPECT_EQ(left, 0);
    EXPECT_TRUE(service.Release(lease->id).ok());
    return digest.Finish();
  }

  static std::vector<TokenId> Answer(const std::shared_ptr<Recorder>& recorder) {
    const Recorder::Outcome& outcome = recorder->Wait();
    EXPECT_TRUE(outcome.reply.has_value()) << outcome.error.message();
    return outcome.reply.has_value() ? outcome.reply->ids : std::vector<TokenId>{};
  }
  static std::shared_ptr<Recorder> Start(agentd::Service& service, const GenerateRequest& request) {
    auto recorder = std::make_shared<Recorder>();
    const auto id = service.Generate(request, recorder);
    EXPECT_TRUE(id.ok()) << id.status().message();
    return recorder;
  }

  std::string path_;
};

TEST_P(RealTracesKvTest, AnyOrderAndCompanyGiveTheSameBits) {
  const auto service = Open(std::int64_t{6} << 30);
  const std::vector<GenerateRequest> requests = Requests(*service);
  ASSERT_FALSE(requests.empty());
  std::vector<Outcome> alone;
  for (const GenerateRequest& request : requests) {
    service->ClearPool();
    GenerateRequest off = request;
    off.reuse = ReuseMode::kOff;
    Outcome outcome = {.answer = Answer(Start(*service, off))};
    EXPECT_EQ(Answer(Start(*service, request)), outcome.answer);  // stores what was just computed from nothing
    outcome.kv = KvOf(*service, request);
    alone.push_back(std::move(outcome));
  }
  std::vector<std::size_t> order(requests.size());
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 rng(7);
  for (const std::size_t in_flight : {1, 32, 32}) {
    SCOPED_TRACE(in_flight);
    std::shuffle(order.begin(), order.end(), rng);
    service->ClearPool();
    const std::int64_t before = service->GetStats().totals.prefix_tokens;
    std::deque<std::pair<std::size_t, std::shared_ptr<Recorder>>> flights;
    const auto land = [&] {
      EXPECT_EQ(Answer(flights.front().second), alone[flights.front().first].answer);
      flights.pop_front();
    };
    for (const std::size_t i : order) {
      flights.emplace_back(i, Start(*service, requests[i]));
      if (flights.size() == in_flight) land();
    }
    while (!flights.empty()) land();
    EXPECT_GT(service->GetStats().totals.prefix_tokens, before);
    for (std::size_t i = 0; i < requests.size(); ++i) {
      EXPECT_EQ(KvOf(*service, requests[i]).Hex(), alone[i].kv.Hex()) << "request " << i;
    }
    EXPECT_TRUE(service->CheckIntegrity().ok());
  }
}

INSTANTIATE_TEST_SUITE_P(, RealTracesKvTest,
                         ::testing::Values("who-and-when/ag2_groupchat.ktr.jsonl.gz",
                                           "crewai-cassettes/crewai_multi.ktr.jsonl.gz",
                                           "tau-bench/tau_airline.ktr.jsonl.gz"),
                         [](const auto& trace) { return std::string(trace.param).substr(0, 3); });

}  // namespace
}  // namespace kvshare::testing

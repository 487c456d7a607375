// Mode kvcomm in a chain of agents and over restarts, on a trained model (random weights give values too small for the
// entropy gate to tell contents apart): what a session has taught is there for that session and no other, and changes
// no bit.
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "agentd/service.h"
#include "gtest/gtest.h"
#include "tests/agentd/service_harness.h"
#include "tests/testing/fixtures.h"
#include "tests/testing/ids.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"

namespace kvshare::testing {
namespace {

using Ids = std::vector<TokenId>;

class AnchorsServiceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!RefModelPath().has_value()) GTEST_SKIP() << "models/notes-3m is not here";
    for (int round = 0; round < 6; ++round) notes_.push_back(RandomIds(150));
  }

  Ids RandomIds(int count) { return testing::RandomIds(rng_, count); }

  std::unique_ptr<agentd::Service> Open(const std::string& cold, kernels::DType dtype = kernels::DType::kBf16,
                                        agentd::ServiceOptions options = {}) {
    runtime::LoadOptions load;
    load.dtype = dtype;
    load.threads = 1;
    Result<std::unique_ptr<runtime::Model>> model = runtime::LoadModel(RefModelPath()->string(), load);
    EXPECT_TRUE(model.ok()) << model.status().message();
    options.kv_pool_bytes = std::int64_t{128} << 20;
    options.cold_dir = cold;
    options.cold_bytes = std::int64_t{512} << 20;
    Result<std::unique_ptr<agentd::Service>> made = agentd::NewService(*std::move(model), options);
    EXPECT_TRUE(made.ok()) << made.status().message();
    return made.ok() ? *std::move(made) : nullptr;
  }

  static GenerateReply Ask(agentd::Service& service, const Ids& prompt, const std::string& agent,
                           const std::string& session, int max_tokens = 1) {
    GenerateRequest request = IdsRequest(prompt, max_tokens, agent);
    request.reuse = ReuseMode::kKvcomm;
    request.session = session;
    request.ignore_eos = true;
    return testing::Ask(service, request);
  }

  // Two agents read the same notes, one behind the other's first words.
  void Teach(agentd::Service& service, const std::string& session) {
    for (const Ids& note : notes_) {
      Ask(service, Join({head_, note, tail_}), "a", session);
      Ask(service, Join({other_, note, tail_}), "b", session);
    }
  }
  // The first to read a new note, which begins to bring back what the session has on disk; `loads`: and waits for it.
  void ReadNewNote(agentd::Service& service, const std::string& session, bool loads) {
    Ask(service, Join({head_, new_note_, tail_}), "a", session);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::minutes(2);
    while (loads && service.GetStats().anchors.loaded == 0) {
      ASSERT_LT(std::chrono::steady_clock::now(), deadline) << "nothing was read back";
      std::this_thread::yield();
    }
  }
  GenerateReply AskOfNewNote(agentd::Service& service, const std::string& session) {
    return Ask(service, Join({other_, new_note_, tail_}), "b", session, 40);
  }
  static bool NoAnchor(const GenerateReply& reply) { return MissTokens(reply.reuse, "no_anchor") > 0; }

  std::mt19937 rng_{11};
  const Ids head_ = RandomIds(30), other_ = RandomIds(40), tail_ = RandomIds(12), new_note_ = RandomIds(150);
  std::vector<Ids> notes_;
  const TempDir dir_;
};

TEST_F(AnchorsServiceTest, ARestartChangesNoBit) {
  GenerateReply want;
  {
    const auto steady = Open(dir_.File("steady"));
    ASSERT_NE(steady, nullptr);
    Teach(*steady, "s");
    ReadNewNote(*steady, "s", false);
    want = AskOfNewNote(*steady, "s");
    ASSERT_GT(want.reuse.moved_tokens, 100) << "the anchors of six notes are not enough";
  }
  auto service = Open(dir_.File("restarted"));
  ASSERT_NE(service, nullptr);
  Teach(*service, "s");
  EXPECT_GT(service->GetStats().anchors.bytes, 0);
  service->Drain();
  EXPECT_GT(service->GetStats().anchors.saved, 0);
  service.reset();

  service = Open(dir_.File("restarted"));
  ASSERT_NE(service, nullptr);
  EXPECT_EQ(service->GetStats().anchors.bytes, 0) << "nobody has asked yet";
  ReadNewNote(*service, "s", true);
  const GenerateReply reply = AskOfNewNote(*service, "s");
  EXPECT_EQ(reply.ids, want.ids);
  EXPECT_EQ(reply.reuse.moved_tokens, want.reuse.moved_tokens);
  EXPECT_TRUE(reply.reuse.approximate);
  const AnchorStats stats = service->GetStats().anchors;
  EXPECT_GT(stats.loaded, 0);
  for (const auto& [reason, times] : stats.misses) EXPECT_EQ(times, 0) << reason;
  EXPECT_LE(stats.disk_bytes, stats.disk_capacity_bytes);
}

TEST_F(AnchorsServiceTest, StrangersFindNothingAfterARestart) {
  auto service = Open(dir_.File("cold"));
  ASSERT_NE(service, nullptr);
  Teach(*service, "s");
  service->Drain();
  service.reset();
  service = Open(dir_.File("cold"));
  ASSERT_NE(service, nullptr);
  for (const std::string stranger : {"t", ""}) {
    ReadNewNote(*service, stranger, false);
    const GenerateReply reply = AskOfNewNote(*service, stranger);
    EXPECT_EQ(reply.reuse.moved_tokens, 0) << stranger;
    EXPECT_EQ(MissTokens(reply.reuse, "no_anchor") > 0, !stranger.empty());
    EXPECT_FALSE(reply.reuse.approximate);
  }
  service->Drain();  // whatever was to be read has been
  EXPECT_EQ(service->GetStats().anchors.loaded, 0);
}

TEST_F(AnchorsServiceTest, WithoutASessionNothingIsKept) {
  auto service = Open(dir_.File("cold"));
  ASSERT_NE(service, nullptr);
  Teach(*service, "");
  service->Drain();
  EXPECT_EQ(service->GetStats().anchors.bytes, 0);
  EXPECT_EQ(service->GetStats().anchors.disk_bytes, 0);
  EXPECT_FALSE(std::filesystem::exists(dir_.path() / "cold" / "anchors"));
}

TEST_F(AnchorsServiceTest, AnotherModelCountsWhyItFindsNothing) {
  auto service = Open(dir_.File("cold"));
  ASSERT_NE(service, nullptr);
  Teach(*service, "s");
  service->Drain();
  service.reset();
  service = Open(dir_.File("cold"), kernels::DType::kF32);
  ASSERT_NE(service, nullptr);
  ReadNewNote(*service, "s", false);
  const GenerateReply reply = AskOfNewNote(*service, "s");
  EXPECT_EQ(reply.reuse.moved_tokens, 0);
  service->Drain();
  const AnchorStats stats = service->GetStats().anchors;
  EXPECT_EQ(stats.loaded, 0);
  EXPECT_EQ(stats.misses.at("other_space"), 1);
}

TEST_F(AnchorsServiceTest, ForgettingForgetsTheDiskToo) {
  for (const bool clear : {false, true}) {
    auto service = Open(dir_.File("cold"));
    ASSERT_NE(service, nullptr);
    Teach(*service, "s");
    service->Drain();
    ASSERT_GT(service->GetStats().anchors.disk_bytes, 0);
    if (clear) {
      service->ClearPool();
    } else {
      KVS_ASSERT_OK(service->Evict({}));
    }
    EXPECT_EQ(service->GetStats().anchors.bytes, 0);
    EXPECT_EQ(service->GetStats().anchors.disk_bytes, 0);
    service->Drain();
    EXPECT_EQ(service->GetStats().anchors.disk_bytes, 0);
    service.reset();
    service = Open(dir_.File("cold"));
    ReadNewNote(*service, "s", false);
    EXPECT_EQ(AskOfNewNote(*service, "s").reuse.moved_tokens, 0);
    service->Drain();
    EXPECT_EQ(service->GetStats().anchors.loaded, 0);
    service->ClearPool();
  }
}

TEST_F(AnchorsServiceTest, LeavingMemoryIsNotForgetting) {
  const auto service = Open(dir_.File("cold"));
  ASSERT_NE(service, nullptr);
  Teach(*service, "s");
  EvictRequest memory;
  memory.cold = false;
  KVS_ASSERT_OK(service->Evict(memory));
  EXPECT_EQ(service->GetStats().anchors.bytes, 0);
  ReadNewNote(*service, "s", true);
  EXPECT_GT(AskOfNewNote(*service, "s").reuse.moved_tokens, 100);
}

// KVCOMM's own setting: agents that answer one after the other, each over its own role, a task and all answers so far.
// Two tasks teach those who read; from the third on they compute neither task nor answers.
// In fp32, so that the answers, and with them what the entropy gate says of each, are the same on every CPU.
TEST_F(AnchorsServiceTest, AChainOfAgentsSharesFromTheThirdTaskOn) {
  const auto service = Open("", kernels::DType::kF32);
  ASSERT_NE(service, nullptr);
  const Ids end = {2046}, header = RandomIds(4), reply_header = RandomIds(4);
  const std::vector<std::string> agents = {"a", "b", "c"};
  std::vector<Ids> roles, quotes;
  for (int agent = 0; agent < 3; ++agent) {
    roles.push_back(Join({header, RandomIds(60 + 9 * agent), end}));
    quotes.push_back(Join({header, RandomIds(4)}));
  }
  const Ids beginning = RandomIds(20);  // which all tasks have, and so their readers' stored prompts
  for (int task = 0; task < 5; ++task) {
    // Each a little shorter than the one before it but the last, which anchors do not reach the end of.
    Ids thread = Join({header, beginning, RandomIds(task < 4 ? 180 - 10 * task : 190), end});
    for (std::size_t a = 0; a < agents.size(); ++a) {
      SCOPED_TRACE("task " + std::to_string(task) + ", agent " + agents[a]);
      GenerateRequest request = IdsRequest(Join({roles[a], thread, reply_header}), 70, agents[a]);
      request.reuse = ReuseMode::kKvcomm;
      request.session = "team";
      request.ignore_eos = true;
      request.sampling.temperature = 1;
      const GenerateReply reply = testing::Ask(*service, request);
      Ids answer = reply.ids;
      // What ends a message must not stand in one.
      const auto ends = [](TokenId id) { return id == 2046 || id == 2044; };
      while (std::any_of(answer.begin(), answer.end(), ends)) {
        ASSERT_LT(++request.sampling.seed, 50u);
        answer = testing::Ask(*service, request).ids;
      }
      const auto quoted = static_cast<std::int64_t>(a) * (70 - 32);
      if (a == 0) {
        EXPECT_EQ(reply.reuse.moved_tokens + reply.reuse.recomputed_tokens, 0) << "nobody has read it before";
      } else if (task < 2) {
        EXPECT_FALSE(reply.reuse.approximate);
        EXPECT_GE(MissTokens(reply.reuse, "no_anchor"), 150 + quoted);
      } else {
        EXPECT_TRUE(reply.reuse.approximate);
        EXPECT_GE(reply.reuse.moved_tokens, 140 + quoted);
        EXPECT_EQ(MissTokens(reply.reuse, "no_anchor"), 0);
      }
      // The reader's own role; a task's beginning is found with the rest of it.
      const auto role = static_cast<std::int64_t>(roles[a].size());
      if (task > 0) {
        EXPECT_EQ(reply.reuse.prefix_tokens, role + (a == 0 ? 24 : 16));
      }
      thread = Join({thread, quotes[a], answer, end});
    }
  }
  // A stranger reads the same and finds nothing.
  GenerateRequest stranger = IdsRequest(Join({roles[1], RandomIds(150), end, reply_header}), 1, "b");
  stranger.reuse = ReuseMode::kKvcomm;
  stranger.session = "another team";
  EXPECT_EQ(testing::Ask(*service, stranger).reuse.moved_tokens, 0);
  KVS_EXPECT_OK(service->CheckIntegrity());
  EXPECT_EQ(service->GetStats().pool.leases, 0);
}

TEST_F(AnchorsServiceTest, WithoutMemoryNothingIsLearnt) {
  agentd::ServiceOptions options;
  options.anchor_memory = 1 << 20;  // six notes and their offsets take more
  const auto service = Open("", kernels::DType::kBf16, options);
  ASSERT_NE(service, nullptr);
  Teach(*service, "s");
  EXPECT_EQ(service->GetStats().anchors.bytes, 0);
  ReadNewNote(*service, "s", false);
  EXPECT_TRUE(NoAnchor(AskOfNewNote(*service, "s")));
}

}  // namespace
}  // namespace kvshare::testing

// Mode kvcomm over restarts, on a trained model (random weights give values too small for the entropy gate to tell
// contents apart): what a session has taught is there for that session and no other, and changes no bit.
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "agentd/service.h"
#include "gtest/gtest.h"
#include "tests/agentd/service_harness.h"
#include "tests/testing/fixtures.h"
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

  Ids RandomIds(int count) {
    Ids ids(static_cast<std::size_t>(count));
    for (TokenId& id : ids) id = std::uniform_int_distribution<int>(0, 255)(rng_);
    return ids;
  }
  static Ids Join(std::initializer_list<Ids> parts) {
    Ids all;
    for (const Ids& part : parts) all.insert(all.end(), part.begin(), part.end());
    return all;
  }

  std::unique_ptr<agentd::Service> Open(const std::string& cold, kernels::DType dtype = kernels::DType::kBf16) {
    runtime::LoadOptions load;
    load.dtype = dtype;
    load.threads = 1;
    Result<std::unique_ptr<runtime::Model>> model = runtime::LoadModel(RefModelPath()->string(), load);
    EXPECT_TRUE(model.ok()) << model.status().message();
    agentd::ServiceOptions options;
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
    LookupRequest lead;  // on disk after a restart: a prompt whose prefix is to be loaded moves nothing
    lead.prompt = TokenPrompt{other_};
    KVS_ASSERT_OK(service.Prefetch(lead));
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

}  // namespace
}  // namespace kvshare::testing

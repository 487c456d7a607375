// Approximate modes on a real tiny model: what is labelled exact is exact to the bit whatever ran before and beside it,
// what is labelled approximate is counted and explained, and nothing of it stays behind.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <deque>
#include <filesystem>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "agentd/service.h"
#include "anchors/confidence.h"
#include "gtest/gtest.h"
#include "tests/agentd/service_harness.h"
#include "tests/agentd/tiny_service.h"
#include "tests/testing/fixtures.h"
#include "tests/testing/ids.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::testing {
namespace {

using Ids = std::vector<TokenId>;

constexpr ReuseMode kApproximate[] = {ReuseMode::kRotate, ReuseMode::kEpic,   ReuseMode::kCacheBlend,
                                      ReuseMode::kDhd,    ReuseMode::kKvcomm, ReuseMode::kAuto};

std::uint32_t Seed() {
  const char* given = std::getenv("KVSHARE_TEST_SEED");
  return given == nullptr ? 7u : static_cast<std::uint32_t>(std::strtoul(given, nullptr, 10));
}

GenerateRequest Request(Ids prompt, ReuseMode mode, const std::string& agent, const std::string& session,
                        int max_tokens = 6) {
  GenerateRequest request = IdsRequest(std::move(prompt), max_tokens, agent);
  request.reuse = mode;
  request.session = session;
  request.ignore_eos = true;
  return request;
}

void ExpectSums(const GenerateReply& reply) {
  const ReuseReport& r = reply.reuse;
  EXPECT_EQ(r.prefix_tokens + r.moved_tokens + r.recomputed_tokens + r.fresh_tokens, reply.prompt_tokens);
  std::int64_t reasons = 0;
  for (const MissReason& miss : r.miss_reasons) reasons += miss.tokens;
  EXPECT_EQ(reasons, r.recomputed_tokens + r.fresh_tokens);
  EXPECT_TRUE(r.approximate || r.moved_tokens == 0);
}

std::int64_t TokensOfKind(const Explanation& explanation, const std::string& kind) {
  std::int64_t tokens = 0, at = 0;
  for (const ExplainSpan& span : explanation.spans) {
    EXPECT_EQ(span.start, at);
    EXPECT_GT(span.length, 0);
    at += span.length;
    if (span.kind == kind) tokens += span.length;
  }
  return tokens;
}

class MovedServiceTest : public ::testing::TestWithParam<kernels::DType> {
 protected:
  Ids Role(int tokens) { return testing::TinyRole(rng_, tokens); }

  std::mt19937 rng_{Seed()};
  const Ids note_ = RandomIds(rng_, 200);
  const Ids planner_ = Join({Role(30), note_, RandomIds(rng_, 20)});
  const Ids critic_ = Join({Role(45), note_, RandomIds(rng_, 25)});
};

TEST_P(MovedServiceTest, ANoteIsFoundUnderOtherFirstWords) {
  for (const ReuseMode mode : kApproximate) {
    SCOPED_TRACE(std::string(ReuseModeName(mode)));
    // Enough layers for the two that CacheBlend looks at in full to be a small part.
    const auto service = NewTinyService(GetParam(), {}, 0, 8);
    ASSERT_NE(service, nullptr);
    ExpectSums(Ask(*service, Request(planner_, mode, "planner", "s")));
    ExplainRequest explain;
    explain.prompt = TokenPrompt{critic_};
    explain.agent = "critic";
    explain.session = "s";
    explain.reuse = mode;
    const Result<Explanation> before = service->Explain(explain);
    KVS_ASSERT_OK(before);
    // KVCOMM's content begins behind its message's header.
    const std::int64_t found = mode == ReuseMode::kKvcomm ? 180 : 190;
    EXPECT_GE(TokensOfKind(*before, "moved"), found);
    for (const ExplainSpan& span : before->spans) {
      if (span.kind != "moved") continue;
      EXPECT_EQ(span.repair, ReuseModeName(mode));
      EXPECT_EQ(span.source, "planner");
    }
    const GenerateReply reply = Ask(*service, Request(critic_, mode, "critic", "s"));
    ExpectSums(reply);
    EXPECT_GE(reply.reuse.moved_tokens + reply.reuse.recomputed_tokens, found);
    if (mode == ReuseMode::kRotate) {
      EXPECT_EQ(reply.reuse.recomputed_tokens, 0);
    }
    ExplainRequest served;
    served.request_id = reply.request_id;
    const Result<Explanation> after = service->Explain(served);
    KVS_ASSERT_OK(after);
    EXPECT_EQ(TokensOfKind(*after, "moved") > 0, reply.reuse.moved_tokens > 0);
    EXPECT_EQ(service->GetStats().pool.leases, 0);
    KVS_EXPECT_OK(service->CheckIntegrity());
  }
}

TEST_P(MovedServiceTest, AStrangersSessionGivesNothing) {
  const auto service = NewTinyService(GetParam());
  ASSERT_NE(service, nullptr);
  Ask(*service, Request(planner_, ReuseMode::kRotate, "planner", "s"));
  for (const std::string session : {"", "t"}) {
    const GenerateReply reply = Ask(*service, Request(critic_, ReuseMode::kRotate, "critic", session));
    EXPECT_EQ(reply.reuse.moved_tokens, 0) << session;
    EXPECT_FALSE(reply.reuse.approximate) << session;
  }
}

TEST_P(MovedServiceTest, RatioOneIsTheExactAnswer) {
  const auto off = NewTinyService(GetParam(), {.reuse = ReuseMode::kOff});
  const auto blend = NewTinyService(GetParam(), {.blend_recompute = 1.0});
  ASSERT_NE(off, nullptr);
  ASSERT_NE(blend, nullptr);
  const GenerateReply want = Ask(*off, Request(critic_, ReuseMode::kOff, "c", "s", 24));
  for (const ReuseMode mode : {ReuseMode::kEpic, ReuseMode::kCacheBlend, ReuseMode::kDhd, ReuseMode::kAuto}) {
    SCOPED_TRACE(ReuseModeName(mode));
    const std::string session(ReuseModeName(mode));
    Ask(*blend, Request(planner_, mode, "p", session));
    const GenerateReply got = Ask(*blend, Request(critic_, mode, "c", session, 24));
    EXPECT_EQ(got.ids, want.ids);
    EXPECT_EQ(got.reuse.moved_tokens, 0);
    EXPECT_FALSE(got.reuse.approximate);
    ExpectSums(got);
    blend->ClearPool();  // the next mode shall not find the critic's prompt
  }
}

TEST_P(MovedServiceTest, TheShareIsTheDaemons) {
  for (const ReuseMode mode : {ReuseMode::kEpic, ReuseMode::kCacheBlend, ReuseMode::kDhd}) {
    SCOPED_TRACE(ReuseModeName(mode));
    std::int64_t moved = 0, repaired = 0;
    for (const double share : {0.0, 0.4}) {
      const auto service = NewTinyService(GetParam(), {.blend_recompute = share}, 0, 8);
      ASSERT_NE(service, nullptr);
      Ask(*service, Request(planner_, mode, "planner", "s"));
      const GenerateReply reply = Ask(*service, Request(critic_, mode, "critic", "s"));
      EXPECT_TRUE(reply.reuse.approximate);
      repaired = MissTokens(reply.reuse, "repaired");
      if (share == 0) {
        EXPECT_EQ(repaired, 0);
        moved = reply.reuse.moved_tokens;
      }
    }
    EXPECT_NEAR(static_cast<double>(repaired), 0.4 * static_cast<double>(moved), 1);
  }
}

// In eight layers both filters pay; in four, where more tokens go through most of them, one choice alone.
TEST_P(MovedServiceTest, TheFilterIsTheDaemons) {
  for (const int layers : {8, 4}) {
    for (const bool gradual : {false, true}) {
      SCOPED_TRACE(std::to_string(layers) + " layers" + (gradual ? ", gradual" : ""));
      const auto service = NewTinyService(
          GetParam(), {.reuse = ReuseMode::kCacheBlend, .blend_recompute = 0.27, .blend_gradual = gradual}, 0, layers);
      ASSERT_NE(service, nullptr);
      Ask(*service, Request(planner_, ReuseMode::kCacheBlend, "planner", "s"));
      const GenerateReply reply = Ask(*service, Request(critic_, ReuseMode::kCacheBlend, "critic", "s", 24));
      ExpectSums(reply);
      const bool pays = layers == 8 || !gradual;
      EXPECT_EQ(reply.reuse.approximate, pays);
      EXPECT_EQ(reply.reuse.moved_tokens > 0, pays);
      EXPECT_EQ(reply.ids.size(), 24u);
      KVS_EXPECT_OK(service->CheckIntegrity());
    }
  }
}

TEST_P(MovedServiceTest, KvcommLearnsAnchorsAndThenUsesThem) {
  // A trained model: random weights give values too small for the entropy gate to tell contents apart.
  KVS_FIXTURE_OR_SKIP(dir, RefModelPath());
  runtime::LoadOptions load;
  load.dtype = GetParam();
  Result<std::unique_ptr<runtime::Model>> model = runtime::LoadModel(dir.string(), load);
  KVS_ASSERT_OK(model);
  Result<std::unique_ptr<agentd::Service>> made =
      agentd::NewService(*std::move(model), {.kv_pool_bytes = std::int64_t{256} << 20});
  KVS_ASSERT_OK(made);
  const std::unique_ptr<agentd::Service>& service = *made;
  const Ids head = RandomIds(rng_, 30), other = RandomIds(rng_, 40), tail = RandomIds(rng_, 12);
  std::int64_t moved = 0, dense = 0;
  for (int round = 0; round < 6; ++round) {
    const Ids note = RandomIds(rng_, 150);
    Ask(*service, Request(Join({head, note, tail}), ReuseMode::kKvcomm, "a", "s", 1));
    const GenerateReply reply = Ask(*service, Request(Join({other, note, tail}), ReuseMode::kKvcomm, "b", "s", 1));
    ExpectSums(reply);
    moved += reply.reuse.moved_tokens > 0;
    for (const MissReason& miss : reply.reuse.miss_reasons) dense += miss.reason == "no_anchor";
  }
  EXPECT_GE(dense, 2);  // two anchors at least before one is used
  EXPECT_GT(moved, 0);
}

// In any order, mode, session and company, under eviction and cancellation: whoever is told that a reply is exact got
// what the request gets alone with reuse off.
TEST_P(MovedServiceTest, NothingApproximateReachesAnExactReply) {
  SCOPED_TRACE("KVSHARE_TEST_SEED=" + std::to_string(Seed()));
  const auto uniform = [this](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng_); };
  std::vector<Ids> blocks;
  for (int i = 0; i < 6; ++i) blocks.push_back(RandomIds(rng_, uniform(40, 150)));
  struct Case {
    GenerateRequest request;
    Ids alone;
  };
  std::vector<Case> cases;
  const auto off = NewTinyService(GetParam(), {.reuse = ReuseMode::kOff});
  ASSERT_NE(off, nullptr);
  for (int i = 0; i < 80; ++i) {
    Ids prompt = RandomIds(rng_, uniform(1, 60));
    for (int n = uniform(1, 4); n > 0; --n) {
      prompt = Join({prompt, blocks[static_cast<std::size_t>(uniform(0, 5))], RandomIds(rng_, uniform(0, 9))});
    }
    prompt.push_back(7);
    Case made;
    made.request = Request(std::move(prompt), ReuseMode::kOff, "a" + std::to_string(i % 3),
                           "s" + std::to_string(uniform(0, 1)), uniform(1, 12));
    made.alone = Ask(*off, made.request).ids;
    const int mode = uniform(0, 8);
    made.request.reuse = mode < 6 ? kApproximate[mode] : mode == 6 ? ReuseMode::kOff : ReuseMode::kExact;
    cases.push_back(std::move(made));
  }
  for (const std::size_t in_flight : {std::size_t{1}, std::size_t{8}}) {
    std::int64_t moved = 0, approximate = 0;  // of small pools and many in flight it is little, by the moment
    for (const std::int64_t pool_pages : {0, 24, 60}) {
      SCOPED_TRACE(std::to_string(pool_pages) + " pages, " + std::to_string(in_flight) + " in flight");
      const auto service = NewTinyService(GetParam(), {.prefill_chunk_tokens = 100}, pool_pages);
      ASSERT_NE(service, nullptr);
      std::deque<std::pair<const Case*, std::shared_ptr<Recorder>>> flights;
      const auto land = [&] {
        const auto [made, recorder] = flights.front();
        flights.pop_front();
        const Recorder::Outcome& outcome = recorder->Wait();
        if (!outcome.reply.has_value()) return;  // cancelled
        ExpectSums(*outcome.reply);
        const ReuseMode mode = *made->request.reuse;
        approximate += outcome.reply->reuse.approximate;
        moved += outcome.reply->reuse.moved_tokens;
        if (mode == ReuseMode::kOff || mode == ReuseMode::kExact) {
          EXPECT_FALSE(outcome.reply->reuse.approximate);
        }
        if (!outcome.reply->reuse.approximate) {
          EXPECT_EQ(outcome.reply->ids, made->alone);
        }
        EXPECT_EQ(outcome.reply->ids.size(), made->alone.size());
      };
      for (int round = 0; round < 2; ++round) {
        for (const Case& made : cases) {
          auto recorder = std::make_shared<Recorder>();
          const Result<std::uint64_t> id = service->Generate(made.request, recorder);
          ASSERT_TRUE(id.ok()) << id.status().message();
          if (uniform(0, 15) == 0) service->Cancel(*id);
          flights.emplace_back(&made, std::move(recorder));
          if (flights.size() == in_flight) land();
        }
      }
      while (!flights.empty()) land();
      KVS_EXPECT_OK(service->CheckIntegrity());
      EXPECT_EQ(service->GetStats().pool.leases, 0);
      service->ClearPool();
      EXPECT_EQ(service->GetStats().pool.pages, 0);
    }
    EXPECT_GT(moved, 1000);
    EXPECT_GT(approximate, 10);
  }
}

// Gate G8: until it is healed, nothing approximate is found under a key, by whomever.
TEST_P(MovedServiceTest, NothingApproximateHasAKey) {
  for (const ReuseMode mode : {ReuseMode::kRotate, ReuseMode::kEpic, ReuseMode::kCacheBlend, ReuseMode::kDhd}) {
    SCOPED_TRACE(std::string(ReuseModeName(mode)));
    const auto service = NewTinyService(GetParam(), {}, 0, 8);
    ASSERT_NE(service, nullptr);
    // Nothing is healed while somebody else's answer is written.
    const auto recorder = std::make_shared<Recorder>();
    const auto busy = service->Generate(Request(RandomIds(rng_, 20), ReuseMode::kOff, "other", "t", 450), recorder);
    KVS_ASSERT_OK(busy);
    Ask(*service, Request(planner_, mode, "planner", "s"));
    const GenerateReply reply = Ask(*service, Request(critic_, mode, "critic", "s", 70));
    ASSERT_TRUE(reply.reuse.approximate);
    LookupRequest lookup;
    lookup.prompt = TokenPrompt{Join({critic_, reply.ids})};
    const Result<Match> match = service->Lookup(lookup);
    KVS_ASSERT_OK(match);
    ASSERT_EQ(service->GetStats().requests_running, 1);
    EXPECT_LE(match->prefix_tokens, 45 + 2) << "more than the first words and the edge of the note";
    service->Cancel(*busy);
    recorder->Wait();
  }
}

// What was answered approximately is computed exactly when nobody asks: then it is an exact hit, for anybody.
TEST_P(MovedServiceTest, AnApproximateAnswerHeals) {
  const auto off = NewTinyService(GetParam(), {.reuse = ReuseMode::kOff});
  const auto service = NewTinyService(GetParam());
  ASSERT_NE(off, nullptr);
  ASSERT_NE(service, nullptr);
  Ask(*service, Request(planner_, ReuseMode::kRotate, "planner", "s"));
  const GenerateReply moved = Ask(*service, Request(critic_, ReuseMode::kRotate, "critic", "s", 30));
  ASSERT_TRUE(moved.reuse.approximate);
  const Ids next = Join({critic_, moved.ids, RandomIds(rng_, 10)});
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  const auto healed = static_cast<std::int64_t>(critic_.size() + moved.ids.size());
  std::int64_t found = 0;
  while (found < healed && std::chrono::steady_clock::now() < deadline) {
    LookupRequest lookup;
    lookup.prompt = TokenPrompt{next};
    const Result<Match> match = service->Lookup(lookup);
    KVS_ASSERT_OK(match);
    found = match->prefix_tokens;
  }
  EXPECT_EQ(found, healed);
  const GenerateReply exact = Ask(*service, Request(next, ReuseMode::kExact, "critic", "t", 20));
  EXPECT_EQ(exact.reuse.prefix_tokens, healed);
  const ApproximateStats stats = service->GetStats().approximate;
  EXPECT_EQ(stats.answers, 1);
  EXPECT_EQ(stats.healed, 1);
  EXPECT_EQ(stats.kept_bytes, 0) << "healed, and still kept";
  ASSERT_EQ(stats.audits.size(), 1u);
  EXPECT_EQ(stats.audits[0].audits, 1);
  EXPECT_GT(stats.audits[0].kl_sum, 0);
  ASSERT_EQ(stats.later_audits.size(), 1u);
  EXPECT_EQ(stats.later_audits[0].audits, 1);
  EXPECT_GT(stats.later_audits[0].kl_sum, 0);
  EXPECT_EQ(exact.ids, Ask(*off, Request(next, ReuseMode::kOff, "critic", "t", 20)).ids);
  EXPECT_EQ(service->GetStats().pool.leases, 0);
  KVS_EXPECT_OK(service->CheckIntegrity());
}

// Of chunks that stood behind other text nothing is known: answers over them are sent back.
// Each that is shows how far it was from exact. In this model, whose weights are random, all are far. Where
// nobody ever waits, the daemon does not spend more than a small share of its work on trying.
TEST_P(MovedServiceTest, OfUnknownChunksItLearnsAtASmallPrice) {
  const auto service = NewTinyService(GetParam(), {}, 0, 8);
  ASSERT_NE(service, nullptr);
  const auto ask = [&](int i) {
    const std::string session = std::to_string(i);  // which has one stored prompt, with fewer first words
    Ask(*service, Request(planner_, ReuseMode::kAuto, "planner", session));
    const Ids other = Join({RandomIds(rng_, 70), note_, RandomIds(rng_, 5)});
    ExpectSums(Ask(*service, Request(other, ReuseMode::kAuto, "critic", session)));
    const ApproximateStats stats = service->GetStats().approximate;
    EXPECT_EQ(stats.guard_margin_elsewhere, anchors::Guard::kNever);
    EXPECT_EQ(stats.answers, 0);
    return stats.sent_back;
  };
  // A trial computes 126 rows of 275: one of every 46 requests, less where nobody asks for 50 ms.
  std::int64_t sent_back = 0;
  for (int i = 0; i < 100; ++i) sent_back = ask(i);
  EXPECT_LE(sent_back, 100 / 46 + 1);
}

// In a model of one layer, where K and V depend on token and place alone, chunks are as good elsewhere as where they
// stood. Nobody knows; so what is asked is computed exactly, and once more over its chunks when nobody waits, until
// that has been seen often enough. No request pays for it.
TEST_P(MovedServiceTest, WhatIsGoodElsewhereIsLearntWhenNobodyWaits) {
  const auto service = NewTinyService(GetParam(), {}, 0, 1);
  const auto off = NewTinyService(GetParam(), {}, 0, 1);
  ASSERT_NE(service, nullptr);
  ASSERT_NE(off, nullptr);
  const auto wait = [&](auto there) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (!there()) {
      ASSERT_LT(std::chrono::steady_clock::now(), deadline) << "nothing was audited";
      std::this_thread::yield();
    }
  };
  std::int64_t audits = 0, answers = 0;
  for (int i = 0; i < 80 && answers == 0; ++i) {
    const std::string session = std::to_string(i);
    // Half of what follows is new, so that being sent back would not pay.
    const Ids other = Join({RandomIds(rng_, 70), note_, RandomIds(rng_, 150)});
    Ask(*service, Request(planner_, ReuseMode::kAuto, "planner", session));
    const GenerateReply reply = Ask(*service, Request(other, ReuseMode::kAuto, "critic", session));
    ExpectSums(reply);
    const ApproximateStats stats = service->GetStats().approximate;
    answers = stats.answers;
    if (answers > 0) {
      EXPECT_TRUE(reply.reuse.approximate);
      EXPECT_GT(reply.reuse.moved_tokens, 0);
      break;
    }
    EXPECT_FALSE(reply.reuse.approximate);
    EXPECT_GT(MissTokens(reply.reuse, "not_trusted"), 150);
    EXPECT_EQ(reply.ids, Ask(*off, Request(other, ReuseMode::kOff, "critic", "")).ids);
    wait([&] { return service->GetStats().approximate.shadow_audits.audits > audits || stats.sent_back > 0; });
    audits = service->GetStats().approximate.shadow_audits.audits;
  }
  const ApproximateStats stats = service->GetStats().approximate;
  EXPECT_EQ(answers, 1) << "after " << audits << " audits";
  EXPECT_EQ(stats.sent_back, 0);
  EXPECT_GE(audits, 29) << "less says nothing";
  EXPECT_EQ(stats.shadow_audits.failures, 0);
  EXPECT_LT(stats.guard_margin_elsewhere, 3.0);
  EXPECT_EQ(service->GetStats().pool.leases, 0);
  KVS_EXPECT_OK(service->CheckIntegrity());
}

// What was learnt is there after a restart, and damage to it costs no more than learning it again.
TEST_P(MovedServiceTest, WhatTheGuardHasLearntSurvivesARestart) {
  const TempDir dir;
  agentd::ServiceOptions options;
  options.cold_dir = dir.File("cold");
  options.cold_bytes = std::int64_t{64} << 20;
  double learnt = 0;
  {
    const auto service = NewTinyService(GetParam(), options, 0, 8);
    ASSERT_NE(service, nullptr);
    for (int i = 0; i < 20; ++i) {
      const std::string session = std::to_string(i);
      Ask(*service, Request(planner_, ReuseMode::kAuto, "planner", session));
      const Ids thread = Join({RandomIds(rng_, 30), note_, RandomIds(rng_, 20)});
      Ask(*service, Request(thread, ReuseMode::kAuto, "critic", session));
    }
    learnt = service->GetStats().approximate.guard_margin;
    ASSERT_NE(learnt, 0.7) << "nothing was learnt";
    service->Drain();
  }
  const auto margin = [&] {
    const auto service = NewTinyService(GetParam(), options, 0, 8);
    EXPECT_NE(service, nullptr);
    return service == nullptr ? -1 : service->GetStats().approximate.guard_margin;
  };
  EXPECT_EQ(margin(), learnt);
  options.blend_recompute = 0.3;
  EXPECT_EQ(margin(), 0.7) << "learnt of answers that were repaired otherwise";
  options.blend_recompute.reset();
  int files = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(dir.path())) {
    if (entry.path().extension() != ".guard") continue;
    ++files;
    std::filesystem::resize_file(entry.path(), std::filesystem::file_size(entry.path()) - 1);
  }
  ASSERT_EQ(files, 1);
  const auto service = NewTinyService(GetParam(), options, 0, 8);
  ASSERT_NE(service, nullptr);
  EXPECT_EQ(service->GetStats().approximate.guard_margin, 0.7);
  EXPECT_EQ(service->GetStats().anchors.misses.at("damaged"), 1);
}

// A note that was computed after another, which now comes after it, is computed again.
TEST_P(MovedServiceTest, WhatSawWhatComesLaterIsNotReused) {
  const auto service = NewTinyService(GetParam(), {}, 0, 8);
  ASSERT_NE(service, nullptr);
  const Ids second = RandomIds(rng_, 100), role = RandomIds(rng_, 30);
  Ask(*service, Request(Join({role, note_, second, RandomIds(rng_, 20)}), ReuseMode::kAuto, "planner", "s"));
  const auto moved_spans = [&](const Ids& prompt, std::int64_t* declined) {
    ExplainRequest explain;
    explain.prompt = TokenPrompt{prompt};
    explain.agent = "critic";
    explain.session = "s";
    explain.reuse = ReuseMode::kAuto;
    const Result<Explanation> explanation = service->Explain(explain);
    KVS_EXPECT_OK(explanation);
    *declined = 0;
    for (const ExplainSpan& span : explanation->spans) {
      if (span.miss_reason == "other_company") *declined += span.length;
    }
    return TokensOfKind(*explanation, "moved");
  };
  std::int64_t declined = 0;
  const Ids other_role = Role(35), question = RandomIds(rng_, 15);
  EXPECT_GE(moved_spans(Join({other_role, note_, second, question}), &declined), 290);
  EXPECT_EQ(declined, 0);
  // The second note saw the first, which now comes after it; the first saw nothing of the second.
  EXPECT_LE(moved_spans(Join({other_role, second, note_, question}), &declined), 200);
  EXPECT_GE(declined, 90);
}

// Of a prompt that ends with what was seen in other company, the last 32 tokens are computed, unless 16 are anyhow; in
// one thread none are.
TEST_P(MovedServiceTest, TheEndOfAPromptIsComputedInOtherCompany) {
  const auto service = NewTinyService(GetParam(), {}, 0, 8);
  ASSERT_NE(service, nullptr);
  const Ids text = RandomIds(rng_, 700);
  // What follows differs from its first token on.
  Ask(*service, Request(Join({RandomIds(rng_, 30), text, {1}, RandomIds(rng_, 20)}), ReuseMode::kAuto, "planner", "s"));
  struct Case {
    int head, tail;       // tokens before and after the text
    std::int64_t to_end;  // behind the last that is moved: an edge of two, what is fresh, and what is computed
  };
  for (const Case& c : {Case{100, 3, 32}, Case{100, 13, 32}, Case{100, 14, 16}, Case{100, 40, 42}, Case{30, 3, 5}}) {
    SCOPED_TRACE(std::to_string(c.head) + " " + std::to_string(c.tail));
    ExplainRequest explain;
    explain.prompt = TokenPrompt{Join({RandomIds(rng_, c.head), text, {2}, RandomIds(rng_, c.tail - 1)})};
    explain.session = "s";
    explain.reuse = ReuseMode::kAuto;
    const Result<Explanation> explanation = service->Explain(explain);
    KVS_ASSERT_OK(explanation);
    std::int64_t end = 0, declined = 0;
    for (const ExplainSpan& span : explanation->spans) {
      if (span.kind == "moved" || span.miss_reason == "not_trusted") end = span.start + span.length;
      if (span.miss_reason == "other_company") declined += span.length;
    }
    EXPECT_EQ(end, c.head + 700 + c.tail - c.to_end);
    EXPECT_EQ(declined, c.to_end - 2 - c.tail);
  }
}

// Agents that answer one after the other, each over the same note and the answers so far, with no time to heal: each
// finds all of them, and its own first words as well the next time.
TEST_P(MovedServiceTest, AChainOfAgentsFindsAnswersThatAreNotExact) {
  for (const ReuseMode mode : {ReuseMode::kRotate, ReuseMode::kCacheBlend}) {
    SCOPED_TRACE(std::string(ReuseModeName(mode)));
    const auto service = NewTinyService(GetParam(), {}, 0, 8);
    ASSERT_NE(service, nullptr);
    constexpr int kAnswer = 50;
    Ids shared = note_;
    std::vector<Ids> heads;
    for (int agent = 0; agent < 4; ++agent) {
      heads.push_back(RandomIds(rng_, 100));
      const GenerateReply reply =
          Ask(*service, Request(Join({heads.back(), shared, RandomIds(rng_, 8)}), mode, "a", "s", kAnswer));
      ExpectSums(reply);
      if (agent > 0) {
        EXPECT_TRUE(reply.reuse.approximate);
        // The note, and of each answer all but its edges and the token that was not computed any more.
        EXPECT_GE(reply.reuse.moved_tokens + reply.reuse.recomputed_tokens, 200 - 4 + agent * (kAnswer - 5)) << agent;
      }
      shared = Join({shared, RandomIds(rng_, 6), reply.ids});
    }
    for (const Ids& head : heads) {
      const GenerateReply reply =
          Ask(*service, Request(Join({head, RandomIds(rng_, 20)}), ReuseMode::kExact, "a", "s"));
      EXPECT_EQ(reply.reuse.prefix_tokens, 100);
    }
    KVS_EXPECT_OK(service->CheckIntegrity());
    EXPECT_EQ(service->GetStats().pool.leases, 0);
    // What another mode kept is not found, nor in another session.
    for (const std::string session : {"s", "t"}) {
      const ReuseMode other = session == "s" ? ReuseMode::kEpic : mode;
      const Ids answers(shared.begin() + 200, shared.end());
      const GenerateReply reply = Ask(*service, Request(Join({RandomIds(rng_, 9), answers}), other, "b", session));
      if (session == "t") {
        EXPECT_EQ(reply.reuse.moved_tokens, 0);
      }
      ExpectSums(reply);
    }
  }
}

// Eight chunks of a thousand tokens in pages that everybody shares: another agent takes what is its own, and no more.
TEST_P(MovedServiceTest, SharedChunksCostNoMemory) {
  constexpr int kChunk = 1024, kPrivate = 1024, kAnswer = 3000;
  const auto service = NewTinyService(GetParam(), {}, 1000, 2, 32768);
  ASSERT_NE(service, nullptr);
  std::vector<Ids> chunks;
  Ids base = RandomIds(rng_, 30);
  for (int i = 0; i < 8; ++i) {
    chunks.push_back(RandomIds(rng_, kChunk));
    base = Join({base, chunks.back(), RandomIds(rng_, 5)});
  }
  Ask(*service, Request(base, ReuseMode::kExact, "reader", "s", 1));
  std::int64_t pages = service->GetStats().pool.pages;
  // Both answer for longer than the test looks: an answer that has ended would be healed, which takes pages too.
  std::vector<std::uint64_t> agents;
  for (int agent = 0; agent < 2; ++agent) {
    // In another order, between words of its own.
    std::shuffle(chunks.begin(), chunks.end(), rng_);
    Ids prompt = RandomIds(rng_, kPrivate / 2);
    for (const Ids& chunk : chunks) prompt = Join({prompt, chunk, RandomIds(rng_, kPrivate / 16)});
    const auto recorder = std::make_shared<Recorder>();
    const Result<std::uint64_t> id =
        service->Generate(Request(prompt, ReuseMode::kRotate, "a", "s", kAnswer), recorder);
    KVS_ASSERT_OK(id);
    agents.push_back(*id);
    recorder->WaitForFirstChunk();
    KVS_EXPECT_OK(service->CheckIntegrity());  // after the step that the chunk came from, whose numbers are out then
    const std::int64_t now = service->GetStats().pool.pages;
    const std::int64_t own = kPrivate + 8 * 4 + kAnswer;  // with the chunks' edges
    EXPECT_LE((now - pages) * 64, own + 8 * kChunk / 20) << "agent " << agent;
    pages = now;
  }
  // The pages of the chunks are held by both; CheckIntegrity knows that such counts are right.
  EntriesRequest all;
  all.limit = 1000;
  const Result<std::vector<Entry>> entries = service->Entries(all);
  KVS_ASSERT_OK(entries);
  std::int64_t shared = 0;
  for (const Entry& entry : *entries) shared += entry.source == "reader" && entry.leases >= 2;
  EXPECT_GE(shared, 8 * kChunk / 64);
  KVS_EXPECT_OK(service->CheckIntegrity());
  for (const std::uint64_t agent : agents) {
    ExplainRequest served;
    served.request_id = agent;
    const Result<Explanation> explanation = service->Explain(served);
    KVS_ASSERT_OK(explanation);
    EXPECT_GE(TokensOfKind(*explanation, "moved"), 8 * (kChunk - 4));
    service->Cancel(agent);
  }
}

// What a neighbour put before the same text, in a session of its own, changes no bit of what another session is told.
TEST_P(MovedServiceTest, AnotherSessionsTextShapesNothing) {
  for (const ReuseMode mode : kApproximate) {
    SCOPED_TRACE(std::string(ReuseModeName(mode)));
    std::vector<GenerateReply> clean;
    for (const bool poisoned : {false, true}) {
      const auto service = NewTinyService(GetParam(), {}, 0, 8);
      ASSERT_NE(service, nullptr);
      if (poisoned) {
        for (const ReuseMode evil : {ReuseMode::kExact, mode}) {
          Ask(*service, Request(Join({RandomIds(rng_, 70), note_, RandomIds(rng_, 9)}), evil, "evil", "e", 20));
        }
      }
      std::vector<GenerateReply> replies;
      for (const Ids& prompt : {planner_, critic_}) {
        replies.push_back(Ask(*service, Request(prompt, mode, "agent", "s", 30)));
      }
      if (!poisoned) clean = replies;
      for (std::size_t i = 0; i < replies.size(); ++i) {
        // The guard is the daemon's: it may trust an answer less after what it saw of others, and say so.
        const auto sent_back = [](const GenerateReply& r) { return MissTokens(r.reuse, "quality_guard") > 0; };
        if (sent_back(replies[i]) || sent_back(clean[i])) continue;
        EXPECT_EQ(replies[i].ids, clean[i].ids);
        EXPECT_EQ(replies[i].reuse.moved_tokens, clean[i].reuse.moved_tokens);
      }
    }
  }
}

TEST_P(MovedServiceTest, ClearingForgetsWhatWasKept) {
  const auto service = NewTinyService(GetParam());
  ASSERT_NE(service, nullptr);
  Ask(*service, Request(planner_, ReuseMode::kRotate, "planner", "s"));
  ASSERT_TRUE(Ask(*service, Request(critic_, ReuseMode::kRotate, "critic", "s")).reuse.approximate);
  KVS_ASSERT_OK(service->Evict({}));
  EXPECT_EQ(service->GetStats().pool.pages, 0);
  EXPECT_EQ(service->GetStats().approximate.kept_bytes, 0);
  EXPECT_EQ(Ask(*service, Request(critic_, ReuseMode::kRotate, "critic", "s")).reuse.moved_tokens, 0);
}

// What is kept makes room for whoever needs it.
TEST_P(MovedServiceTest, KeptAnswersGiveWay) {
  const auto service = NewTinyService(GetParam(), {}, 20);
  ASSERT_NE(service, nullptr);
  Ask(*service, Request(planner_, ReuseMode::kRotate, "planner", "s"));
  for (int i = 0; i < 6; ++i) {
    EXPECT_TRUE(
        Ask(*service, Request(Join({RandomIds(rng_, 40), note_, RandomIds(rng_, 9)}), ReuseMode::kRotate, "a", "s", 40))
            .reuse.approximate);
  }
  const GenerateReply whole = Ask(*service, Request(RandomIds(rng_, 1000), ReuseMode::kExact, "b", "t", 24));
  EXPECT_EQ(whole.ids.size(), 24u);
  KVS_EXPECT_OK(service->CheckIntegrity());
  EXPECT_EQ(service->GetStats().pool.leases, 0);
}

// A reply's bits do not depend on who shares its steps, for approximate replies too.
TEST_P(MovedServiceTest, CompanyChangesNoToken) {
  for (const ReuseMode mode : {ReuseMode::kRotate, ReuseMode::kCacheBlend, ReuseMode::kAuto}) {
    SCOPED_TRACE(std::string(ReuseModeName(mode)));
    Ids alone;
    for (const int company : {0, 5}) {
      const auto service = NewTinyService(GetParam());
      ASSERT_NE(service, nullptr);
      Ask(*service, Request(planner_, ReuseMode::kExact, "planner", "s"));
      std::vector<std::shared_ptr<Recorder>> others;
      for (int i = 0; i < company; ++i) {
        others.push_back(std::make_shared<Recorder>());
        KVS_ASSERT_OK(service->Generate(
            Request(RandomIds(rng_, 50 + i), ReuseMode::kExact, "x", "s" + std::to_string(i), 60), others.back()));
      }
      const GenerateReply reply = Ask(*service, Request(critic_, mode, "critic", "s", 40));
      if (company == 0) {
        alone = reply.ids;
      } else {
        EXPECT_EQ(reply.ids, alone);
      }
      for (const auto& other : others) other->Wait();
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, MovedServiceTest, ::testing::Values(kernels::DType::kF32, kernels::DType::kBf16),
                         [](const auto& dtype) { return std::string(kernels::DTypeName(dtype.param)); });

}  // namespace
}  // namespace kvshare::testing

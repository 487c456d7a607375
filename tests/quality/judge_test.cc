// The whole pipe on the small model and on a tiny random one: exact prefill judged as a policy differs in nothing, a
// policy that is disturbed on purpose is seen, cases from files become prompts with chunks.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <random>

#include "bench/quality/exact_prefill.h"
#include "bench/quality/quality_run.h"
#include "bench/quality/report.h"
#include "bench/quality/suite.h"
#include "libkvshare/core/status_macros.h"
#include "tests/testing/fixtures.h"
#include "tests/testing/ids.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::quality {
namespace {

using nlohmann::json;

std::unique_ptr<runtime::Model> Load(const std::filesystem::path& path, kernels::DType dtype) {
  auto model = runtime::LoadModel(path.string(), {.dtype = dtype, .threads = 2, .max_batch_rows = 512});
  EXPECT_TRUE(model.ok()) << model.status().message();
  return model.ok() ? std::move(*model) : nullptr;
}

TEST(JudgeTest, OffAndExactDifferInNothing) {
  KVS_FIXTURE_OR_SKIP(path, testing::RefModelPath());
  const auto model = Load(path, kernels::DType::kBf16);
  const auto other = Load(path, kernels::DType::kF32);
  ASSERT_TRUE(model && other);
  const auto suite = WorldSuite(*model, {.seed = 3, .samples = 8});
  KVS_ASSERT_OK(suite);
  const auto run = Judge(model.get(), *suite,
                         {.policies = {{ReuseMode::kOff, {}}, {ReuseMode::kExact, {}}}, .floor_model = other.get()});
  KVS_ASSERT_OK(run);
  const QualityReport report = Summarise(*suite, *run, model->config().num_layers);
  ASSERT_EQ(report.policies.size(), 2u);
  for (const PolicySummary& policy : report.policies) {
    EXPECT_EQ(SpreadOf(policy.all.kl).max, 0);
    EXPECT_EQ(policy.top1, 1);
    EXPECT_EQ(policy.charged_budget, 1);
    EXPECT_EQ(policy.shared_budget, 1);
    EXPECT_EQ(policy.all.identical, policy.all.n);
    EXPECT_EQ(policy.all.n, static_cast<std::int64_t>(suite->judged.size()));
    EXPECT_EQ(policy.all.lost + policy.all.gained, 0);
    EXPECT_EQ(policy.guard.accepted, 0);
    EXPECT_EQ(policy.choices.as_exact, policy.choices.n);
  }
  ASSERT_EQ(run->floor.kl.size(), suite->judged.size());
  EXPECT_GT(Mean(report.floor.Tokens()), 0);
  EXPECT_EQ(report.floor.other_pieces_kl_max, 0);
  // The contract's fields.
  const json parsed = json::parse(ReportJson(report), nullptr, false);
  ASSERT_TRUE(parsed.is_object());
  EXPECT_TRUE(parsed["samples"].is_number_integer());
  EXPECT_TRUE(parsed["noise_floor"]["kl_mean"].is_number());
  for (const auto& policy : parsed["policies"]) {
    for (const char* field : {"charged_budget", "top1", "divergence_index"}) EXPECT_TRUE(policy[field].is_number());
    for (const char* field : {"mean", "p95", "max"}) EXPECT_TRUE(policy["kl"][field].is_number());
    for (const auto& task : policy["tasks"]) {
      EXPECT_TRUE(task["n"].is_number_integer());
      EXPECT_TRUE(task["accuracy"].is_number() && task["exact_accuracy"].is_number());
      EXPECT_EQ(task["ci"], json::array({0.0, 0.0}));
    }
  }
  const std::string html = ReportHtml(report);
  EXPECT_NE(html.find("</html>"), std::string::npos);
  EXPECT_EQ(html.find("http"), std::string::npos);  // self-contained
  EXPECT_NE(ReportText(report).find("one_hop"), std::string::npos);
}

// The other dtype as a policy is as far from exact as the noise floor is, by each kind's own cases.
TEST(JudgeTest, AKindIsHeldAgainstTheFloorOfItsOwnCases) {
  KVS_FIXTURE_OR_SKIP(path, testing::RefModelPath());
  const auto model = Load(path, kernels::DType::kBf16);
  const auto other = Load(path, kernels::DType::kF32);
  ASSERT_TRUE(model && other);
  auto suite = WorldSuite(*model, {.seed = 5, .samples = 15});
  KVS_ASSERT_OK(suite);
  ASSERT_GT(suite->judged.size(), kFloorCases + 2);
  for (JudgedCase& judged : suite->judged) judged.kind = "often";
  suite->judged.back().kind = "once";
  const auto run =
      JudgeWith(model.get(), *suite, {.policies = {{ReuseMode::kExact, {}}}, .floor_model = other.get()},
                [&](const Policy&, const PrefillLimits& limits) -> Result<std::unique_ptr<PrefillUnderTest>> {
                  KVS_ASSIGN_OR_RETURN(auto prefill, ExactPrefill::New(other.get(), limits, {}));
                  return std::unique_ptr<PrefillUnderTest>(std::move(prefill));
                });
  KVS_ASSERT_OK(run);
  EXPECT_EQ(run->floor.Cases(), static_cast<std::int64_t>(kFloorCases) + 1);
  const QualityReport report = Summarise(*suite, *run, model->config().num_layers);
  for (const auto& [kind, group] : report.policies[0].tasks) {
    double tokens = 0;  // of the KL that is held against the floor
    for (std::size_t i = 0; i < suite->judged.size(); ++i) {
      if (suite->judged[i].kind == kind) tokens += Sum(run->floor.kl[i]);
    }
    Quotient sums;
    for (const auto& [session, quotient] : group.floors) sums.Add(quotient);
    EXPECT_DOUBLE_EQ(sums.below, tokens);
    EXPECT_EQ(FloorsText(group), "1 [1, 1]") << kind;
    EXPECT_GT(Mean(group.kl), 0) << kind;
  }
  const json parsed = json::parse(ReportJson(report));
  EXPECT_EQ(parsed["policies"]["exact"]["tasks"]["once"]["kl"]["floors"], 1.0);
  EXPECT_EQ(parsed["policies"]["exact"]["kl"]["floors_ci"], json::array({1.0, 1.0}));
}

// Two conversations, of which one lost all its answers: what says as little as two answers do must not sound like 80.
TEST(JudgeTest, QuestionsOfOneConversationAreNotIndependent) {
  Suite suite;
  QualityRun run;
  run.policies.resize(1);
  for (int i = 0; i < 80; ++i) {
    JudgedCase judged{.c = {.session = i % 2 == 0 ? "lost" : "kept"}, .kind = "k", .answer = "x"};
    CaseResult result{.kl = {i % 2 == 0 ? 1.0 : 0.0}, .right = i % 2 == 1, .exact_right = true};
    result.chunks = {{.cached_tokens = 10, .computed_pairs = 0}};
    suite.judged.push_back(judged);
    run.policies[0].cases.push_back(result);
    run.floor.kl.push_back({0.5});
  }
  const json report = json::parse(ReportJson(Summarise(suite, run, 2)));
  const json& policy = *report["policies"].begin();
  EXPECT_EQ(policy["tasks"]["k"]["accuracy"], 0.5);
  EXPECT_EQ(policy["tasks"]["k"]["ci"], json::array({-1.0, 0.0}));
  EXPECT_EQ(policy["kl"]["floors"], 1.0);
  EXPECT_EQ(policy["kl"]["floors_ci"], json::array({0.0, 2.0}));
  EXPECT_EQ(policy["guard"]["accepted"], 80);
  EXPECT_EQ(policy["guard"]["above"], 40);
  EXPECT_EQ(policy["guard"]["sessions"], 2);
  EXPECT_EQ(policy["guard"]["sessions_above"], 1);
  EXPECT_NEAR(policy["guard"]["sessions_rate_upper"], std::sqrt(0.95), 1e-6);
  EXPECT_LT(policy["guard"]["rate_upper"], 0.6);
}

TEST(JudgeTest, WhatStandsBehindAnotherMessageIsFarFromExact) {
  KVS_FIXTURE_OR_SKIP(path, testing::RefModelPath());
  const auto model = Load(path, kernels::DType::kBf16);
  ASSERT_TRUE(model);
  const auto suite = WorldSuite(*model, {.seed = 5, .samples = 8});
  KVS_ASSERT_OK(suite);
  const auto run = Judge(model.get(), *suite,
                         {.policies = {{.mode = ReuseMode::kRotate, .stored_in = StoredIn::kThread},
                                       {.mode = ReuseMode::kRotate, .stored_in = StoredIn::kBehind}}});
  KVS_ASSERT_OK(run);
  const QualityReport report = Summarise(*suite, *run, model->config().num_layers);
  // Ten times as far, of few questions: a few tokens make most of either mean.
  EXPECT_GT(Mean(report.policies[1].all.kl), 3 * Mean(report.policies[0].all.kl));
  for (const CaseResult& result : run->policies[1].cases) EXPECT_EQ(result.chunks.front().cached_tokens, 0);
}

// Mode auto moves what another reader read, whose role differs, and computes what stands behind another message.
TEST(JudgeTest, AutoTellsThemApart) {
  KVS_FIXTURE_OR_SKIP(path, testing::RefModelPath());
  const auto model = Load(path, kernels::DType::kBf16);
  ASSERT_TRUE(model);
  const auto suite = WorldSuite(*model, {.seed = 5, .samples = 8});
  KVS_ASSERT_OK(suite);
  const auto run = Judge(model.get(), *suite,
                         {.policies = {{.mode = ReuseMode::kAuto, .stored_in = StoredIn::kThread},
                                       {.mode = ReuseMode::kAuto, .stored_in = StoredIn::kBehind},
                                       {.mode = ReuseMode::kAuto, .stored_in = StoredIn::kAmid}}});
  KVS_ASSERT_OK(run);
  const QualityReport report = Summarise(*suite, *run, model->config().num_layers);
  EXPECT_LT(report.policies[0].charged_budget, 0.5);
  EXPECT_GT(report.policies[1].charged_budget, 0.9);
  EXPECT_GT(report.policies[2].charged_budget, report.policies[0].charged_budget + 0.2) << "half of the chunks";
}

TEST(JudgeTest, EveryKindIsAskedOften) {
  KVS_FIXTURE_OR_SKIP(path, testing::RefModelPath());
  const auto model = Load(path, kernels::DType::kBf16);
  ASSERT_TRUE(model);
  for (const std::int64_t samples : {24, 75, 150}) {
    for (const std::uint64_t seed : {1ull, 7000001ull, 20000003ull}) {
      const auto suite = WorldSuite(*model, {.seed = seed, .samples = samples});
      KVS_ASSERT_OK(suite);
      EXPECT_EQ(suite->samples, samples);
      std::map<std::string, int> kinds;
      for (const JudgedCase& judged : suite->judged) ++kinds[judged.kind];
      EXPECT_EQ(kinds.size(), 8u);
      for (const auto& [kind, count] : kinds) EXPECT_GE(count, 10) << kind << " of " << samples << ", seed " << seed;
    }
  }
}

TEST(JudgeTest, ChunksAreTheMessagesTokens) {
  KVS_FIXTURE_OR_SKIP(path, testing::RefModelPath());
  const auto model = Load(path, kernels::DType::kBf16);
  ASSERT_TRUE(model);
  const auto suite = WorldSuite(*model, {.seed = 5, .samples = 16});
  KVS_ASSERT_OK(suite);
  std::map<std::string, std::string> prefix;  // reader -> text before the first chunk
  for (const JudgedCase& judged : suite->judged) {
    const Case& c = judged.c;
    ASSERT_FALSE(c.chunks.empty());
    std::int64_t at = 0;
    for (const Chunk& chunk : c.chunks) {
      EXPECT_LE(at, chunk.begin);
      EXPECT_LT(chunk.begin, chunk.end);
      at = chunk.end;
      const std::string text = model->tokenizer()->Decode(std::span(c.prompt).subspan(
          static_cast<std::size_t>(chunk.begin), static_cast<std::size_t>(chunk.end - chunk.begin)));
      EXPECT_EQ(text.find("<|im"), std::string::npos) << text;
      EXPECT_EQ(text.back(), '.') << text;
    }
    EXPECT_LE(at, c.suffix_begin);
    EXPECT_LT(c.suffix_begin, static_cast<std::int64_t>(c.prompt.size()));
    const std::string suffix =
        model->tokenizer()->Decode(std::span(c.prompt).subspan(static_cast<std::size_t>(c.suffix_begin)));
    EXPECT_TRUE(suffix.starts_with("<|im_start|>user\n")) << suffix;
    EXPECT_TRUE(suffix.ends_with("?<|im_end|>\n<|im_start|>assistant\n")) << suffix;
    const std::string before =
        model->tokenizer()->Decode(std::span(c.prompt).first(static_cast<std::size_t>(c.chunks[0].begin) - 2));
    const auto [known, added] = prefix.emplace(c.agent, before);
    if (!added) {
      EXPECT_TRUE(before.starts_with(known->second.substr(0, 40))) << before;
    }
  }
  // The team recurs, others are met once.
  EXPECT_EQ(prefix.size(), 2u + 4u);
}

// A policy that computes the prompt with one token of the first chunk replaced: an error whose place is known.
class Disturbed final : public PrefillUnderTest {
 public:
  explicit Disturbed(std::unique_ptr<ExactPrefill> exact) : exact_(std::move(exact)) {}

  Result<PrefillOutcome> Prefill(const Case& c) override {
    Case other = c;
    if (!other.chunks.empty()) other.prompt[static_cast<std::size_t>(other.chunks[0].begin)] ^= 1;
    return exact_->Prefill(other);
  }
  Status Extend(std::span<const TokenId> ids, float* logits) override { return exact_->Extend(ids, logits); }
  void Rewind() override { exact_->Rewind(); }
  std::vector<ChunkCost> Costs() const override { return exact_->Costs(); }

 private:
  std::unique_ptr<ExactPrefill> exact_;
};

class TinyTest : public ::testing::Test {
 protected:
  void SetUp() override {
    KVS_ASSERT_OK(testing::WriteTinyModel(dir_.path()));
    model_ = Load(dir_.path(), kernels::DType::kF32);
    ASSERT_NE(model_, nullptr);
  }

  testing::TempDir dir_;
  std::unique_ptr<runtime::Model> model_;
};

using CaseFileTest = TinyTest;

constexpr const char* kCase =
    R"({"id":"a","kind":"lookup","messages":[{"role":"system","content":"You read."},)"
    R"({"role":"user","name":"scout","content":"  The lamp is in the attic.\n"},)"
    R"({"role":"user","content":"The rope is in the cellar."}],"shared":[1],"question":"Where is the lamp?",)"
    R"("answer":"attic"})";

TEST_F(CaseFileTest, ACaseBecomesAPromptWithItsChunk) {
  const auto suite = FileSuite(*model_, std::string(kCase) + "\n\n" + kCase, 0);
  KVS_ASSERT_OK(suite);
  ASSERT_EQ(suite->judged.size(), 2u);
  EXPECT_EQ(suite->samples, 2);
  const JudgedCase& judged = suite->judged[0];
  EXPECT_EQ(judged.c.id, "a");
  EXPECT_EQ(judged.kind, "lookup");
  EXPECT_EQ(judged.answer, "attic");
  ASSERT_EQ(judged.c.chunks.size(), 1u);
  const Chunk& chunk = judged.c.chunks[0];
  EXPECT_EQ(chunk.producer, "scout");
  const auto text = [&](std::int64_t begin, std::int64_t end) {
    return model_->tokenizer()->Decode(
        std::span(judged.c.prompt).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin)));
  };
  EXPECT_EQ(text(chunk.begin, chunk.end), "The lamp is in the attic.");
  const auto size = static_cast<std::int64_t>(judged.c.prompt.size());
  EXPECT_TRUE(text(judged.c.suffix_begin, size).starts_with("Where is the lamp?"));
  EXPECT_EQ(suite->judged[1].c.chunks[0].id, chunk.id);
}

TEST_F(CaseFileTest, LinesMayOnlyWarmUpAndLimitCountsTheOthers) {
  const std::string warm = R"({"messages":[{"role":"user","content":"x"}],"warm_up":true})";
  const std::string plain = R"({"messages":[{"role":"user","content":"y"}]})";
  const auto suite = FileSuite(*model_, warm + "\n" + plain + "\n" + plain + "\n", 1);
  KVS_ASSERT_OK(suite);
  EXPECT_EQ(suite->warm_up.size(), 1u);
  ASSERT_EQ(suite->judged.size(), 1u);
  EXPECT_EQ(suite->judged[0].c.id, "line 2");
  EXPECT_FALSE(suite->judged[0].answer.has_value());
}

TEST_F(CaseFileTest, DamageIsNamedWithItsLine) {
  const auto fails = [&](const std::string& line, const char* text) {
    KVS_EXPECT_FAILS(FileSuite(*model_, "\n" + line, 0), StatusCode::kInvalidArgument, text);
    KVS_EXPECT_FAILS(FileSuite(*model_, "\n" + line, 0), StatusCode::kInvalidArgument, "line 2");
  };
  fails("{", "not JSON");
  fails("[]", "expected a JSON object");
  fails("{}", "'messages'");
  fails(R"({"messages":[]})", "'messages'");
  fails(R"({"messages":[{"role":"user"}]})", "message 0 needs a string 'content'");
  fails(R"({"messages":[7]})", "message 0");
  fails(R"({"messages":[{"role":"user","content":"x"}],"shared":[1]})", "'shared' holds 1");
  fails(R"({"messages":[{"role":"user","content":"x"}],"shared":[-1]})", "'shared' holds -1");
  fails(R"({"messages":[{"role":"user","content":"x"}],"shared":{}})", "'shared' must be");
  fails(R"({"messages":[{"role":"user","content":"x"}],"question":5})", "question");
  fails(R"({"messages":[{"role":"user","content":"x"}],"answer":" ?! "})", "holds no word");
  fails(R"({"messages":[{"role":"user","content":")" + std::string(5000, 'x') + R"("}]})", "tokens");
  KVS_EXPECT_FAILS(FileSuite(*model_, "\n", 0), StatusCode::kInvalidArgument, "no case");
}

using ComparisonTest = TinyTest;

TEST_F(ComparisonTest, ADisturbedPolicyIsSeen) {
  const auto suite = FileSuite(*model_, kCase, 0);
  KVS_ASSERT_OK(suite);
  auto exact = ExactPrefill::New(model_.get(), {.max_tokens = suite->LongestPrompt() + 32}, {});
  KVS_ASSERT_OK(exact);
  Suite copy = *suite;
  const auto run = JudgeWith(model_.get(), copy, {.policies = {{ReuseMode::kAuto, {}}}},
                             [&](const Policy&, const PrefillLimits&) -> Result<std::unique_ptr<PrefillUnderTest>> {
                               return std::unique_ptr<PrefillUnderTest>(new Disturbed(std::move(*exact)));
                             });
  KVS_ASSERT_OK(run);
  const CaseResult& result = run->policies[0].cases[0];
  ASSERT_FALSE(result.kl.empty());
  EXPECT_GT(*std::max_element(result.kl.begin(), result.kl.end()), 0);
  EXPECT_EQ(result.identical,
            result.text == result.exact_text && result.same == static_cast<std::int64_t>(result.kl.size()));
}

TEST_F(ComparisonTest, AnUnknownPolicyIsRefusedBeforeAnythingIsComputed) {
  const auto suite = FileSuite(*model_, kCase, 0);
  KVS_ASSERT_OK(suite);
  int calls = 0;
  const auto run = JudgeWith(
      model_.get(), *suite, {.policies = {{ReuseMode::kAuto, {}}}, .progress = [&](auto, auto) { return ++calls > 0; }},
      [](const Policy&, const PrefillLimits&) -> Result<std::unique_ptr<PrefillUnderTest>> {
        return Unimplemented("policy 'auto' cannot be judged");
      });
  KVS_EXPECT_FAILS(run, StatusCode::kUnimplemented, "auto");
  EXPECT_EQ(calls, 0);
}

TEST_F(ComparisonTest, ProgressCanEndTheRun) {
  const auto suite = FileSuite(*model_, std::string(kCase) + "\n" + kCase, 0);
  KVS_ASSERT_OK(suite);
  const auto run = Judge(model_.get(), *suite,
                         {.policies = {{ReuseMode::kExact, {}}}, .progress = [](auto, auto) { return false; }});
  KVS_EXPECT_FAILS(run, StatusCode::kCancelled, "interrupted");
}

// As in the daemon, of a prompt that ends with what was found in other company the last 32 tokens are computed. They
// were at hand, so they are charged.
TEST_F(ComparisonTest, APromptsEndThatIsComputedIsCharged) {
  std::mt19937 rng(3);
  Case c{.id = "c", .session = "s", .agent = "a", .prompt = testing::RandomIds(rng, 260)};
  c.suffix_begin = 257;
  c.chunks = {{.begin = 50, .end = 257, .id = "note", .slot = "0"}};
  const auto auto_alone = NewPrefill(model_.get(), {.mode = ReuseMode::kAuto, .stored_in = StoredIn::kAlone}, {300});
  KVS_ASSERT_OK(auto_alone);
  const auto outcome = (*auto_alone)->Prefill(c);
  KVS_ASSERT_OK(outcome);
  EXPECT_EQ(outcome->chunks[0].cached_tokens, 207 - 4);
  EXPECT_GE(outcome->chunks[0].computed_pairs, (32 - 3 - 2) * model_->config().num_layers);
}

// Its stored chunks are more than the memory of one case; judging the last case as if it were the only one changes
// nothing.
TEST_F(ComparisonTest, ALongSessionIsJudgedLikeAShortOne) {
  const auto line = [](char letter) {
    return R"({"session":"s","agent":")" + std::string(1, letter) + R"(","messages":[{"role":"user","content":"I am )" +
           letter + R"(."},{"role":"user","content":")" + std::string(200, letter) + R"( and )" +
           std::string(100, letter) + R"("}],"shared":[1],"question":"What?"})" + "\n";
  };
  std::string session;
  for (char letter = 'a'; letter < 'k'; ++letter) session += line(letter);
  const auto long_session = FileSuite(*model_, session, 0);
  const auto short_session = FileSuite(*model_, line('i') + line('j'), 0);
  KVS_ASSERT_OK(long_session);
  KVS_ASSERT_OK(short_session);
  for (const StoredIn where :
       {StoredIn::kAlone, StoredIn::kThread, StoredIn::kReversed, StoredIn::kBehind, StoredIn::kAmid}) {
    const QualityOptions options{.policies = {{.mode = ReuseMode::kRotate, .stored_in = where},
                                              {.mode = ReuseMode::kCacheBlend, .budget = 1.0, .stored_in = where}}};
    const auto run = Judge(model_.get(), *long_session, options);
    KVS_ASSERT_OK(run);
    const auto alone = Judge(model_.get(), *short_session, options);
    KVS_ASSERT_OK(alone);
    for (std::size_t p = 0; p < 2; ++p) {
      ASSERT_EQ(run->policies[p].cases.size(), 10u);
      const std::vector<double>& kl = run->policies[p].cases[9].kl;
      if (where == StoredIn::kAlone) {
        EXPECT_EQ(kl, alone->policies[p].cases[1].kl);
      }
      if (p == 1) {  // all is computed
        EXPECT_EQ(kl, std::vector<double>(kl.size()));
      }
    }
  }
}

TEST(IsRightTest, WorldsAnswersAreTheWholeReplyOthersMayStandWithin) {
  EXPECT_TRUE(IsRight("Paris", "Paris", false));
  EXPECT_TRUE(IsRight(" paris.\n", "Paris", false));
  EXPECT_FALSE(IsRight("Paris Rome", "Paris", false));
  EXPECT_FALSE(IsRight("", "Paris", false));
  EXPECT_TRUE(IsRight("It is in the \"attic\", I think.", "attic", true));
  EXPECT_TRUE(IsRight("in the old attic", "old attic", true));
  EXPECT_FALSE(IsRight("in the attics", "attic", true));
  EXPECT_FALSE(IsRight("012", "12", true));
}

}  // namespace
}  // namespace kvshare::quality

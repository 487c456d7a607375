// Agents that mode auto answers exactly, by their names (ServiceOptions::exact_agents).
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "agentd/service.h"
#include "tests/agentd/service_harness.h"
#include "tests/agentd/tiny_service.h"
#include "tests/testing/ids.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::testing {
namespace {

using Ids = std::vector<TokenId>;

class ExactAgentsTest : public ::testing::Test {
 protected:
  GenerateReply Asked(agentd::Service& service, const std::string& agent, ReuseMode mode, int role) {
    GenerateRequest request = IdsRequest(Prompt(role), 4, agent);
    request.reuse = mode;
    request.session = "s";
    request.ignore_eos = true;
    return Ask(service, request);
  }
  // Of a prompt that nobody has asked yet: tokens that would be moved for this agent in mode auto.
  std::int64_t WouldMove(agentd::Service& service, const std::string& agent) {
    const Result<Explanation> explanation =
        service.Explain({.prompt = TokenPrompt{Prompt(45)}, .agent = agent, .session = "s", .reuse = ReuseMode::kAuto});
    KVS_EXPECT_OK(explanation);
    std::int64_t tokens = 0;
    if (!explanation.ok()) return -1;
    for (const ExplainSpan& span : explanation->spans) tokens += span.kind == "moved" ? span.length : 0;
    return tokens;
  }
  // Everybody reads one note, behind first words of their own.
  Ids Prompt(int role) { return Join({TinyRole(rng_, role), note_, RandomIds(rng_, 25)}); }

  std::mt19937 rng_{7};
  const Ids note_ = RandomIds(rng_, 200);
};

TEST_F(ExactAgentsTest, AJudgesChunksAreComputed) {
  const auto service = NewTinyService(kernels::DType::kBf16, {}, 0, 8);
  ASSERT_NE(service, nullptr);
  Asked(*service, "planner", ReuseMode::kAuto, 30);
  for (const std::string judge : {"judge", "LLM-Judge 2", "CodeVerifier"}) {
    SCOPED_TRACE(judge);
    EXPECT_EQ(WouldMove(*service, judge), 0);
    const GenerateReply reply = Asked(*service, judge, ReuseMode::kAuto, 45);
    EXPECT_EQ(reply.reuse.moved_tokens, 0);
    EXPECT_FALSE(reply.reuse.approximate);
    EXPECT_GE(MissTokens(reply.reuse, "exact_agent"), 190);
  }
  EXPECT_GE(WouldMove(*service, "critic"), 190);
  EXPECT_GE(WouldMove(*service, ""), 190);
  // A mode that is asked for by name is what is meant.
  EXPECT_GE(Asked(*service, "judge", ReuseMode::kRotate, 50).reuse.moved_tokens, 190);
}

TEST_F(ExactAgentsTest, WhoTheyAreIsASetting) {
  const auto service = NewTinyService(kernels::DType::kBf16, {.exact_agents = {"critic"}}, 0, 8);
  ASSERT_NE(service, nullptr);
  Asked(*service, "planner", ReuseMode::kAuto, 30);
  EXPECT_EQ(WouldMove(*service, "critic"), 0);
  EXPECT_GE(WouldMove(*service, "judge"), 190);
}

}  // namespace
}  // namespace kvshare::testing

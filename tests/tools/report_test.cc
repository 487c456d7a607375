// A replay's report: read back as it was written, escaped where it must be, refused with the cause.
#include "tools/trace/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sstream>
#include <string>
#include <vector>

#include "tools/trace/csv.h"

namespace kvshare::trace {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// Three requests of two agents: B's prompt begins as A's, then A asks again.
class ReportTest : public ::testing::Test {
 protected:
  ReportTest() {
    trace_.header.name = "t<script>&\"";
    for (const char* agent : {"A", "=B", "A"}) {
      TraceRequest request;
      request.id = "r" + std::to_string(trace_.requests.size());
      request.agent = agent;
      trace_.requests.push_back(request);
    }
    prompts_.push_back({.request = 0, .ids = {1, 2, 3, 4}, .max_tokens = 2});
    prompts_.push_back({.request = 1, .ids = {1, 2, 5}, .max_tokens = 2, .truncated = true});
    prompts_.push_back({.request = 2, .ids = {1, 2, 3, 4, 9}, .max_tokens = 2});
    ModeResult off{.mode = ReuseMode::kOff, .wall_s = 0.5};
    ModeResult exact{
        .mode = ReuseMode::kExact, .wall_s = 0.25, .peak_rss_bytes = 1000, .pool_pages = 10, .pool_bytes = 640};
    const std::vector<std::int64_t> hits = {0, 2, 4};
    for (std::size_t r = 0; r < 3; ++r) {
      const auto n = static_cast<std::int64_t>(prompts_[r].ids.size());
      RequestResult result{.output_ids = {7, 8}, .ttft_ms = 10.0 * static_cast<double>(r + 1)};
      result.start_ms = 100.0 * static_cast<double>(r);
      result.end_ms = result.start_ms + 50;
      result.reuse = {.fresh_tokens = n, .miss_reasons = {{"reuse_off", n}}};
      off.requests.push_back(result);
      result.reuse = {.prefix_tokens = hits[r], .fresh_tokens = n - hits[r], .miss_reasons = {{"new", n - hits[r]}}};
      exact.requests.push_back(result);
    }
    modes_ = {off, exact};
  }

  Replay Parts() const { return {trace_, trace_.header.name, "model", "float32", "scalar", prompts_, modes_}; }

  Trace trace_;
  std::vector<PreparedPrompt> prompts_;
  std::vector<ModeResult> modes_;
};

TEST_F(ReportTest, CountsTokensByKindAgentAndTime) {
  const Report report = MakeReport(Parts());
  const ModeReport* exact = report.Find("exact");
  ASSERT_NE(exact, nullptr);
  EXPECT_EQ(exact->tokens.prompt, 12);
  EXPECT_EQ(exact->tokens.prefix, 6);
  EXPECT_EQ(exact->cross_agent_tokens, 2) << "B's two tokens were A's first; A's own are not another agent's";
  EXPECT_EQ(exact->truncated_requests, 1);
  EXPECT_EQ(exact->generated_tokens, 6);
  EXPECT_EQ(exact->miss_reasons.at("new"), 6);
  EXPECT_DOUBLE_EQ(exact->ttft_ms.mean, 20);
  EXPECT_DOUBLE_EQ(exact->ttft_ms.p50, 20);
  ASSERT_EQ(exact->windows.size(), 3u);
  EXPECT_DOUBLE_EQ(exact->windows[2].end_s, 0.25);
  EXPECT_EQ(exact->windows[2].reused_tokens, 4);
  ASSERT_EQ(exact->agents.size(), 2u);
  EXPECT_EQ(exact->agents[0].requests, 2);
  EXPECT_EQ(exact->agents[1].agent, "=B");
  ASSERT_TRUE(report.ceilings.has_value());
  EXPECT_EQ(report.ceilings->unlimited_tokens, 6);
  EXPECT_EQ(report.ceilings->pool_pages, 10);
}

TEST_F(ReportTest, ReadBackItIsTheSameInEveryForm) {
  const std::string json = ReportJson(MakeReport(Parts()));
  const auto read = ParseReport(json);
  ASSERT_TRUE(read.ok()) << read.status().message();
  EXPECT_EQ(ReportJson(*read), json);
  EXPECT_EQ(ReportText(*read), ReportText(MakeReport(Parts())));
  EXPECT_EQ(read->Find("exact")->peak_rss_bytes, 1000);
  EXPECT_EQ(read->Find("off")->peak_rss_bytes, std::nullopt);
}

TEST_F(ReportTest, TheContractsFieldsAloneAreEnough) {
  const auto read = ParseReport(
      R"({"trace":"t","model":"m","requests":2,"modes":{"off":{"prompt_tokens":9,"prefix_tokens":0,"moved_tokens":0,)"
      R"("recomputed_tokens":0,"fresh_tokens":9,"truncated_requests":0,"ttft_ms":{"mean":1,"p50":1,"p95":1,"p99":1},)"
      R"("wall_s":1,"outputs_sha256":"00","peak_rss_bytes":null}}})");
  ASSERT_TRUE(read.ok()) << read.status().message();
  EXPECT_THAT(ReportHtml(*read), HasSubstr("</html>"));
  EXPECT_THAT(ReportText(*read), HasSubstr("off"));
}

TEST_F(ReportTest, RefusalsNameTheField) {
  const std::string good = ReportJson(MakeReport(Parts()));
  const auto expect = [](const std::string& json, const std::string& cause) {
    const auto read = ParseReport(json);
    ASSERT_FALSE(read.ok()) << json;
    EXPECT_THAT(read.status().message(), HasSubstr(cause));
  };
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string json = good;
    const std::size_t at = json.find(from);
    EXPECT_NE(at, json.npos) << from;
    return json.replace(at, from.size(), to);
  };
  expect("", "not a JSON object");
  expect("[]", "not a JSON object");
  expect("{}", "\"trace\" is missing");
  expect(R"({"trace":"t","model":"m","requests":1,"modes":{}})", "no mode");
  expect(with("\"prefix_tokens\":0", "\"prefix_tokens\":-1"), "\"prefix_tokens\" is not a count");
  expect(with("\"wall_s\":0.5", "\"wall_s\":\"long\""), "\"wall_s\" is not a number");
  expect(with("\"outputs_sha256\":\"", "\"outputs\":\""), "\"outputs_sha256\" is missing");
  expect(with("\"ttft_ms\":{", "\"ttft_ms\":3,\"x\":{"), "\"ttft_ms\" has another type");
  expect(with("\"lru\":{", "\"mru\":{"), "\"lru\" is missing");
}

TEST_F(ReportTest, ThePageIsWholeAndEscaped) {
  const std::string html = ReportHtml(MakeReport(Parts()));
  EXPECT_THAT(html, HasSubstr("t&lt;script&gt;&amp;&quot;"));
  EXPECT_THAT(html, Not(HasSubstr("<script")));
  EXPECT_THAT(html, Not(HasSubstr("http")));
  EXPECT_THAT(html, Not(HasSubstr("nan")));
  EXPECT_THAT(html, HasSubstr("prefers-color-scheme:dark"));
  std::size_t plots = 0;
  for (std::size_t at = 0; (at = html.find("<svg", at)) != html.npos; ++at) ++plots;
  EXPECT_EQ(plots, 4u) << "tokens by kind, time to first token, hit rate over time, agents";
}

TEST_F(ReportTest, CsvFieldsAreSafeInASpreadsheet) {
  EXPECT_EQ(CsvField("a"), "a");
  EXPECT_EQ(CsvField("a,\"b\""), "\"a,\"\"b\"\"\"");
  EXPECT_EQ(CsvField("=1+1"), "'=1+1");
  std::ostringstream rows;
  WriteRequestsCsv(Parts(), rows);
  EXPECT_THAT(rows.str(), HasSubstr("\nexact,r1,,'=B,1,3,2,0,0,1,2,100.000,20.000,150.000\n"));
  EXPECT_THAT(ReportCsv(MakeReport(Parts())), HasSubstr("\nexact,3,12,6,2,0,0,6,0.500,1,20.000,"));
}

}  // namespace
}  // namespace kvshare::trace

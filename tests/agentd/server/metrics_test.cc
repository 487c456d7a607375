// Metrics: every series from the first second, the same ones later, counts where they belong; the documents name all.
#include "agentd/server/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <set>
#include <sstream>

#include "agentd/engine/stats_book.h"

namespace kvshare::agentd {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

// Names with labels, and names alone of the families.
std::set<std::string> Series(const std::string& text) {
  std::set<std::string> series;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with('#')) series.insert(line.substr(0, line.rfind(' ')));
  }
  return series;
}

std::set<std::string> Families(const std::string& text) {
  std::set<std::string> families;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("# TYPE ")) families.insert(line.substr(7, line.find(' ', 7) - 7));
  }
  return families;
}

std::string FileText(const char* path) {
  std::ifstream file(std::string(KVS_SOURCE_DIR) + "/" + path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

GenerateReply Reply() {
  GenerateReply reply;
  reply.ids = {1, 2, 3};
  reply.prompt_tokens = 10;
  reply.reuse.prefix_tokens = 6;
  reply.reuse.moved_tokens = 1;
  reply.reuse.fresh_tokens = 3;
  reply.reuse.miss_reasons = {{"evicted", 3}};
  reply.timings = {.queue_ms = 2, .ttft_ms = 30, .prompt_ms = 20, .predicted_ms = 14};
  return reply;
}

TEST(MetricsTest, SeriesAreThereBeforeTheModelIsAndStay) {
  const std::set<std::string> before = Series(MetricsText({.version = "1"}));
  StatsBook book;
  book.Completed(book.Intern("planner"), Reply());
  const std::set<std::string> after = Series(MetricsText({.version = "1", .ready = true, .stats = book.Snapshot()}));
  EXPECT_EQ(before, after);
  EXPECT_THAT(before, ::testing::Contains("kvshare_miss_total{reason=\"never_stored\"}"));
  EXPECT_THAT(before, ::testing::Contains("kvshare_time_to_first_token_seconds_bucket{le=\"+Inf\"}"));
}

TEST(MetricsTest, CountsStandWhereTheyBelong) {
  StatsBook book;
  book.Completed(book.Intern("planner"), Reply());
  book.Failed();
  Stats stats = book.Snapshot();
  stats.pool.used_bytes = 123456789012;
  stats.cold.integrity_errors = 7;
  stats.cold.state = "the disk is full";
  ServerInfo info;
  info.model = "a \"quoted\\\nname";
  const std::string text = MetricsText({.version = "1", .ready = true, .info = info, .stats = stats});
  for (const char* line :
       {"kvshare_requests_total{code=\"ok\"} 1\n", "kvshare_requests_total{code=\"failed\"} 1\n",
        "kvshare_prompt_tokens_total 10\n", "kvshare_reused_tokens_total{method=\"prefix\"} 6\n",
        "kvshare_reused_tokens_total{method=\"moved\"} 1\n", "kvshare_fresh_tokens_total 3\n",
        "kvshare_miss_total{reason=\"evicted\"} 3\n", "kvshare_generation_tokens_total 3\n",
        "kvshare_pool_bytes{tier=\"host\"} 123456789012\n", "kvshare_integrity_errors_total 7\n",
        "kvshare_cold_degraded 1\n", "model=\"a \\\"quoted\\\\\\nname\"",
        "kvshare_time_to_first_token_seconds_bucket{le=\"0.025\"} 0\n",
        "kvshare_time_to_first_token_seconds_bucket{le=\"0.05\"} 1\n",
        "kvshare_time_to_first_token_seconds_bucket{le=\"+Inf\"} 1\n", "kvshare_time_to_first_token_seconds_sum 0.03\n",
        "kvshare_time_to_first_token_seconds_count 1\n", "kvshare_inter_token_seconds_sum 0.007\n"}) {
    EXPECT_THAT(text, HasSubstr(line));
  }
  // Agents are for kvctl: their names come from outside, and would make as many series.
  EXPECT_EQ(text.find("planner"), std::string::npos);
}

TEST(MetricsTest, TheDocumentsNameEveryFamilyAndEveryReasonIsKnown) {
  const std::string reference = FileText("docs/reference/metrics.md");
  for (const std::string& family : Families(MetricsText({.version = "1", .info = ServerInfo()}))) {
    EXPECT_THAT(reference, HasSubstr("`" + family));
  }
  const std::string reasons = FileText("docs/miss-reasons.md");
  std::set<std::string> documented;
  std::istringstream lines(reasons);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("| `")) documented.insert(line.substr(3, line.find('`', 3) - 3));
  }
  ASSERT_FALSE(documented.empty());
  for (const std::string_view reason : KnownMissReasons()) documented.erase(std::string(reason));
  EXPECT_THAT(documented, IsEmpty()) << "docs/miss-reasons.md has reasons that metrics.cc does not know";
}

}  // namespace
}  // namespace kvshare::agentd

// The simulator by hand, against exhaustive search, and against the numbers of the reference tool on real traces.
#include "tools/trace/simulate.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace kvshare::trace {
namespace {

std::uint32_t Seed() {
  const char* given = std::getenv("KVSHARE_TEST_SEED");
  return given == nullptr ? 20240607u : static_cast<std::uint32_t>(std::strtoul(given, nullptr, 10));
}

BlockTrace TraceOf(const std::vector<std::vector<int>>& requests, std::int64_t tokens_per_block = 10) {
  BlockTraceParser parser;
  std::int64_t timestamp = 0;
  for (const auto& blocks : requests) {
    std::string ids;
    for (int block : blocks) ids += (ids.empty() ? "" : ",") + std::to_string(block);
    const auto tokens = tokens_per_block * static_cast<std::int64_t>(blocks.size());
    const Status status =
        parser.AddLine("{\"timestamp\":" + std::to_string(timestamp++) + ",\"input_length\":" + std::to_string(tokens) +
                       ",\"hash_ids\":[" + ids + "]}");
    EXPECT_TRUE(status.ok()) << status.message();
  }
  return std::move(*parser.Finish());
}

std::int64_t Hits(const BlockTrace& trace, std::string_view policy, std::int64_t capacity) {
  if (policy == "belady") return SimulateBelady(trace, capacity).hit_tokens;
  const auto instance = agentd::NewEvictionPolicy(policy, static_cast<std::size_t>(capacity));
  return Simulate(trace, **instance, capacity).hit_tokens;
}

TEST(SimulateTest, ATraceByHand) {
  // Two conversations with one beginning, and something else in between. Three blocks fit.
  //   request      LRU before it, oldest first     hits    MIN keeps
  //   1 2          -                               0       1 2        (2 is used again)
  //   1 3          2 1                             1       1 2        (3 is not)
  //   1 2          2 3 1                           1 2     1 2
  //   9            3 2 1                           -       1 2
  //   1 2          2 1 9                           1 2     -
  const BlockTrace trace = TraceOf({{1, 2}, {1, 3}, {1, 2}, {9}, {1, 2}});
  EXPECT_EQ(trace.unique_blocks, 4u);
  EXPECT_EQ(trace.tokens, 90);
  EXPECT_EQ(Hits(trace, "lru", 3), 50);
  EXPECT_EQ(Hits(trace, "belady", 3), 50);
  // Two fit: 3 drives 2 out of the LRU (the prefix 1 alone hits), 9 drives it out again.
  EXPECT_EQ(Hits(trace, "lru", 2), 30);
  EXPECT_EQ(Hits(trace, "belady", 2), 50);
  EXPECT_EQ(Hits(trace, "lru", 1), 20);
  EXPECT_EQ(Hits(trace, "belady", 1), 30);
}

TEST(SimulateTest, OnlyALeadingRunOfBlocksCounts) {
  const BlockTrace trace = TraceOf({{1, 2, 3}, {7, 2, 3}, {1, 2, 3}});
  EXPECT_EQ(Hits(trace, "belady", 4), 30);  // 2 and 3 after 7 are no hit
  EXPECT_EQ(Simulate(trace, "belady", 1.0)->capacity_blocks, 4);
}

// Random forests of prompts: chained ids, as traces have them.
BlockTrace RandomTrace(std::mt19937& rng, int num_requests, int fan_out, int depth) {
  const auto uniform = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
  std::map<std::vector<int>, int> id_of;
  std::vector<std::vector<int>> requests;
  for (int r = 0; r < num_requests; ++r) {
    std::vector<int> path, blocks;
    for (int d = uniform(1, depth); d > 0; --d) {
      path.push_back(uniform(0, fan_out - 1));
      blocks.push_back(id_of.emplace(path, static_cast<int>(id_of.size())).first->second);
    }
    requests.push_back(blocks);
  }
  return TraceOf(requests);
}

// LRU as the reference has it: one list of all blocks, the deepest of a request the oldest.
std::int64_t ListLru(const BlockTrace& trace, std::size_t capacity) {
  std::vector<std::uint32_t> list;
  std::int64_t hits = 0;
  for (const auto& request : trace.requests) {
    const auto blocks = trace.BlocksOf(request);
    for (std::uint32_t block : blocks) {
      if (std::find(list.begin(), list.end(), block) == list.end()) break;
      hits += 10;
    }
    for (std::size_t i = blocks.size(); i-- > 0;) {
      std::erase(list, blocks[i]);
      list.push_back(blocks[i]);
    }
    if (list.size() > capacity) list.erase(list.begin(), list.end() - static_cast<std::ptrdiff_t>(capacity));
  }
  return hits;
}

// The best that any choice of what to keep can reach: every subset is tried.
std::int64_t BestOfAll(const BlockTrace& trace, std::size_t capacity) {
  std::map<std::set<std::uint32_t>, std::int64_t> best = {{{}, 0}};
  for (const auto& request : trace.requests) {
    const auto blocks = trace.BlocksOf(request);
    std::map<std::set<std::uint32_t>, std::int64_t> next;
    for (const auto& [kept, hits] : best) {
      std::int64_t now = hits;
      for (std::uint32_t block : blocks) {
        if (!kept.contains(block)) break;
        now += 10;
      }
      std::vector<std::uint32_t> all(kept.begin(), kept.end());
      for (std::uint32_t block : blocks) {
        if (!kept.contains(block)) all.push_back(block);
      }
      for (std::uint32_t subset = 0; subset < (1u << all.size()); ++subset) {
        std::set<std::uint32_t> chosen;
        for (std::size_t i = 0; i < all.size(); ++i) {
          if ((subset >> i & 1u) != 0) chosen.insert(all[i]);
        }
        if (chosen.size() > capacity) continue;
        std::int64_t& value = next[chosen];
        value = std::max(value, now);
      }
    }
    best = std::move(next);
  }
  std::int64_t most = 0;
  for (const auto& [kept, hits] : best) most = std::max(most, hits);
  return most;
}

TEST(SimulatePropertyTest, LruIsAListsAndNoPolicyBeatsBelady) {
  for (std::uint32_t round = 0; round < 30; ++round) {
    SCOPED_TRACE("KVSHARE_TEST_SEED=" + std::to_string(Seed() + round));
    std::mt19937 rng(Seed() + round);
    const BlockTrace trace = RandomTrace(rng, 200, 3, 6);
    for (const std::int64_t capacity : {1, 3, 10, 40}) {
      EXPECT_EQ(Hits(trace, "lru", capacity), ListLru(trace, static_cast<std::size_t>(capacity)));
      for (const std::string_view policy : agentd::EvictionPolicyNames()) {
        EXPECT_LE(Hits(trace, policy, capacity), Hits(trace, "belady", capacity)) << policy;
        EXPECT_EQ(Hits(trace, policy, trace.unique_blocks), Hits(trace, "belady", trace.unique_blocks)) << policy;
      }
    }
  }
}

TEST(SimulatePropertyTest, BeladyIsWhatTryingEverythingFinds) {
  std::int64_t hits = 0;
  for (std::uint32_t round = 0; round < 40; ++round) {
    SCOPED_TRACE("KVSHARE_TEST_SEED=" + std::to_string(Seed() + round));
    std::mt19937 rng(Seed() + round);
    const BlockTrace trace = RandomTrace(rng, 10, 2, 3);
    for (const std::int64_t capacity : {1, 2, 3, 4}) {
      const std::int64_t belady = Hits(trace, "belady", capacity);
      EXPECT_EQ(belady, BestOfAll(trace, static_cast<std::size_t>(capacity))) << "capacity " << capacity;
      hits += belady;
    }
  }
  EXPECT_GT(hits, 0);
}

TEST(SimulateTest, WrongArgumentsAreNamed) {
  const BlockTrace trace = TraceOf({{1}});
  EXPECT_EQ(Simulate(trace, "fifo", 0.5).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(Simulate(trace, "lru", 0).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(Simulate(trace, "belady", 1.5).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(Simulate(trace, "lru", 0.01)->capacity_blocks, 1);
}

TEST(BlockTraceTest, DeltaCodedRequestsContinueTheirBase) {
  BlockTraceParser parser;
  for (const char* line :
       {R"({"schema":"ktr","version":1,"time_base":"session","name":"x","block_size":64})",
        R"({"request_id":"a","session_id":"s","input_length":30,"hash_ids":[5,6,7]})", "",
        R"({"request_id":"b","session_id":"s","input_length":40,"base":"a","keep":2,"hash_ids":[9]})"}) {
    const Status status = parser.AddLine(line);
    ASSERT_TRUE(status.ok()) << status.message();
  }
  const BlockTrace trace = *parser.Finish();
  EXPECT_EQ(trace.name, "x");
  EXPECT_EQ(trace.block_tokens, 64);
  ASSERT_EQ(trace.requests.size(), 2u);
  const auto blocks = trace.BlocksOf(trace.requests[1]);
  EXPECT_EQ(std::vector<std::uint32_t>(blocks.begin(), blocks.end()), (std::vector<std::uint32_t>{0, 1, 3}));
}

TEST(BlockTraceTest, BadLinesAreNamedWithTheirNumberAndCause) {
  const std::map<std::string, std::string> cases = {
      {"[1]", "not a JSON object"},
      {"{", "not JSON"},
      {R"({"hash_ids":[1]})", "\"input_length\" is missing"},
      {R"({"hash_ids":[1],"input_length":-3})", "\"input_length\" is not a count"},
      {R"({"hash_ids":[1.5],"input_length":3})", "holds something that is no integer"},
      {R"({"hash_ids":7,"input_length":3})", "\"hash_ids\" is not an array"},
      {R"({"hash_ids":[1],"input_length":3,"base":"q","keep":1})", "\"base\" names no earlier request"},
      {R"({"hash_ids":[1],"input_length":3,"timestamp":"noon"})", "\"timestamp\" is not a number"},
      {R"({"hash_ids":[1],"input_length":3,"session_id":4})", "\"session_id\" is not a string"},
      {R"({"request_id":"r","segments":[]})", "has texts and no \"hash_ids\""},
      {R"({"schema":"ktr","version":2})", "KTR version 2"},
      {R"({"schema":"csv"})", "\"schema\" is not \"ktr\""}};
  for (const auto& [line, cause] : cases) {
    BlockTraceParser parser;
    ASSERT_TRUE(parser.AddLine("").ok());
    const Status status = parser.AddLine(line);
    ASSERT_FALSE(status.ok()) << line;
    EXPECT_EQ(status.message().find("line 2: "), 0u) << status.message();
    EXPECT_NE(status.message().find(cause), std::string::npos) << status.message();
  }
  EXPECT_FALSE(BlockTraceParser().Finish().ok());
  EXPECT_EQ(ReadBlockTrace("no/such/file").status().code(), StatusCode::kNotFound);
}

std::string Shared(const std::string& path) {
  const char* given = std::getenv("KVSHARE_SHARED");
  return (std::filesystem::path(given != nullptr ? given : "../shared") / "traces" / path).string();
}

TEST(RealTracesTest, MooncakeGivesTheReferencesNumbersAndTheDefaultIsWorthIt) {
  const std::string path = Shared("mooncake-fast25/conversation_trace.jsonl.gz");
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is not there; set KVSHARE_SHARED";
  const auto trace = ReadBlockTrace(path);
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->requests.size(), 12031u);
  EXPECT_EQ(trace->unique_blocks, 182790u);
  // ceilings.py, rounded to four places.
  const std::map<double, std::pair<double, double>> reference = {{0.01, {0.0509, 0.2456}},
                                                                 {0.05, {0.1948, 0.3663}},
                                                                 {0.10, {0.2783, 0.3663}},
                                                                 {0.25, {0.3533, 0.3663}},
                                                                 {0.5, {0.3630, 0.3663}}};
  for (const auto& [fraction, expected] : reference) {
    EXPECT_NEAR(Simulate(*trace, "lru", fraction)->hit_ratio, expected.first, 0.0001) << fraction;
    EXPECT_NEAR(Simulate(*trace, "belady", fraction)->hit_ratio, expected.second, 0.0001) << fraction;
  }
  EXPECT_GE(Simulate(*trace, "default", 0.05)->hit_ratio, 0.24);
}

TEST(RealTracesTest, TheDefaultIsNowhereWorseThanLru) {
  for (const char* name : {"mooncake-fast25/conversation_trace.jsonl.gz", "mooncake-fast25/synthetic_trace.jsonl.gz"}) {
    const std::string path = Shared(name);
    if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is not there; set KVSHARE_SHARED";
    const auto trace = ReadBlockTrace(path);
    ASSERT_TRUE(trace.ok()) << trace.status().message();
    for (const double fraction : {0.01, 0.05, 0.10, 0.25, 0.5}) {
      EXPECT_GE(Simulate(*trace, "default", fraction)->hit_tokens, Simulate(*trace, "lru", fraction)->hit_tokens)
          << name << " at " << fraction;
    }
  }
}

// Sessions with their own clocks: the order, too, must be the reference's.
TEST(RealTracesTest, ClaudeCodeSessionsComeInTheReferencesOrder) {
  const std::string path = Shared("claude-code-weka/weka_dev.ktr.jsonl.gz");
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is not there; set KVSHARE_SHARED";
  const auto trace = ReadBlockTrace(path);
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->unique_blocks, 1527025u);
  const double lru = Simulate(*trace, "lru", 0.01)->hit_ratio;
  EXPECT_NEAR(lru, 0.7556, 0.0001);
  EXPECT_GE(Simulate(*trace, "default", 0.01)->hit_ratio, lru);
}

}  // namespace
}  // namespace kvshare::trace

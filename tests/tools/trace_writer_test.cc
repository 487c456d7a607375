// Traces written out: KTR-1 comes back as it was, Mooncake's blocks say what is equal and what is not.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "tools/trace/ktr_writer.h"
#include "tools/trace/mooncake_writer.h"
#include "tools/trace/trace_reader.h"

namespace kvshare::trace {
namespace {

Trace Parse(const std::string& text) {
  TraceParser parser;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const Status status = parser.AddLine(line);
    EXPECT_TRUE(status.ok()) << status.message();
  }
  auto trace = parser.Finish();
  EXPECT_TRUE(trace.ok()) << trace.status().message();
  return std::move(*trace);
}

void ExpectSame(const Trace& a, const Trace& b) {
  EXPECT_EQ(a.header.name, b.header.name);
  EXPECT_EQ(a.header.time_base, b.header.time_base);
  EXPECT_EQ(a.header.block_tokens, b.header.block_tokens);
  EXPECT_EQ(a.header.hash_ids_per_session, b.header.hash_ids_per_session);
  EXPECT_EQ(a.segments, b.segments);
  ASSERT_EQ(a.requests.size(), b.requests.size());
  for (std::size_t r = 0; r < a.requests.size(); ++r) {
    const TraceRequest& x = a.requests[r];
    const TraceRequest& y = b.requests[r];
    EXPECT_EQ(x.id, y.id);
    EXPECT_EQ(x.session, y.session);
    EXPECT_EQ(x.agent, y.agent);
    EXPECT_EQ(x.model, y.model);
    EXPECT_EQ(x.timestamp_ms, y.timestamp_ms);
    EXPECT_EQ(x.delay_ms, y.delay_ms);
    EXPECT_EQ(x.api_ms, y.api_ms);
    EXPECT_EQ(x.wait_for, y.wait_for);
    EXPECT_EQ(x.output, y.output);
    EXPECT_EQ(x.input_length, y.input_length);
    EXPECT_EQ(x.output_length, y.output_length);
    EXPECT_EQ(a.Blocks(r), b.Blocks(r));
    ASSERT_EQ(x.messages.size(), y.messages.size());
    for (std::size_t m = 0; m < x.messages.size(); ++m) {
      EXPECT_EQ(x.messages[m].role, y.messages[m].role);
      ASSERT_EQ(x.messages[m].segments.size(), y.messages[m].segments.size());
      for (std::size_t s = 0; s < x.messages[m].segments.size(); ++s) {
        EXPECT_EQ(x.messages[m].segments[s].segment, y.messages[m].segments[s].segment);
        EXPECT_EQ(x.messages[m].segments[s].source, y.messages[m].segments[s].source);
      }
    }
  }
}

constexpr const char* kAllKinds =
    R"({"schema":"ktr","version":1,"name":"t","time_base":"session","block_size":64,"hash_id_scope":"session"}
{"seg":"s","text":"You are \"A\".\nüber"}
{"seg":"n","n_tokens":7}
{"seg":"t","tokens":[1,2,3]}
{"request_id":"a","agent_id":"A","timestamp":5.5,"segments":[["system","s"],["user","n"],["+","t"]],"output":"s"}
{"request_id":"b","session_id":"w","wait_for":["a"],"delay":3,"api_ms":9,"segments":[["user","t"],["+","@a"]]}
{"request_id":"c","input_length":250,"output_length":4,"hash_ids":[1,2,3,18446744073709551615]}
{"request_id":"d","model":"m","input_length":300,"hash_ids":[5],"base":"c","keep":2}
{"request_id":"e","input_length":400,"hash_ids":[6],"base":"d","keep":1}
{"request_id":"f","input_length":12})";

TEST(KtrWriterTest, WhatWasWrittenIsReadBackAsItWas) {
  const Trace trace = Parse(kAllKinds);
  const std::string text = KtrText(trace);
  const Trace again = Parse(text);
  ExpectSame(trace, again);
  EXPECT_EQ(KtrText(again), text);
}

TEST(KtrWriterTest, AChatLogKeepsItsHandOffs) {
  const std::string reply(80, 'x');
  const Trace trace =
      Parse(R"({"session":"s","messages":[{"role":"user","content":"q"}],"output":")" + reply + "\"}\n" +
            R"({"session":"s","messages":[{"role":"user","content":"See: )" + reply + R"("}]})");
  const std::string text = KtrText(trace);
  EXPECT_NE(text.find(R"(["user",")" + trace.segments[2].name + R"("],["+","@s/0"])"), std::string::npos) << text;
  ExpectSame(trace, Parse(text));
}

std::vector<std::vector<std::uint64_t>> Rows(const Trace& trace, std::int64_t block_tokens,
                                             const std::vector<std::vector<TokenId>>& ids = {}) {
  MooncakeWriter writer(&trace, block_tokens);
  std::vector<std::vector<std::uint64_t>> rows;
  for (std::size_t r = 0; r < trace.requests.size(); ++r) {
    std::optional<std::span<const TokenId>> own;
    if (!ids.empty()) own = ids[r];
    const auto json = nlohmann::json::parse(writer.Row(r, own, 1));
    rows.push_back(json["hash_ids"].get<std::vector<std::uint64_t>>());
  }
  return rows;
}

TEST(MooncakeWriterTest, BlocksAreSplitAndJoinedWithoutChangingWhatIsEqual) {
  const Trace trace = Parse(R"({"timestamp":0,"input_length":1000,"hash_ids":[7,9]}
{"timestamp":1,"input_length":1024,"hash_ids":[7,8]}
{"timestamp":2,"input_length":1000,"hash_ids":[7,9]})");
  EXPECT_EQ(Rows(trace, 512), (std::vector<std::vector<std::uint64_t>>{{0, 1}, {0, 2}, {0, 1}}));
  EXPECT_EQ(Rows(trace, 256), (std::vector<std::vector<std::uint64_t>>{{0, 1, 2, 3}, {0, 1, 4, 5}, {0, 1, 2, 3}}));
  EXPECT_EQ(Rows(trace, 1024), (std::vector<std::vector<std::uint64_t>>{{0}, {1}, {0}}));
}

TEST(MooncakeWriterTest, TheSameIdElsewhereOrInAnotherSessionIsAnotherBlock) {
  const Trace trace = Parse(R"({"schema":"ktr","version":1,"block_size":64,"hash_id_scope":"session"}
{"request_id":"a","session_id":"x","input_length":128,"hash_ids":[1,2]}
{"request_id":"b","session_id":"y","input_length":128,"hash_ids":[1,2]}
{"request_id":"c","session_id":"x","input_length":128,"hash_ids":[2,1]}
{"request_id":"d","session_id":"x","input_length":100,"hash_ids":[1]}
{"request_id":"e","session_id":"x","input_length":100,"hash_ids":[1]})");
  EXPECT_EQ(Rows(trace, 64), (std::vector<std::vector<std::uint64_t>>{{0, 1}, {2, 3}, {4, 5}, {0, 6}, {0, 7}}))
      << "what lies beyond the recorded blocks is nobody else's";
}

TEST(MooncakeWriterTest, TokensAreChainedToTheLastPartOfABlock) {
  const Trace trace = Parse(R"({"input_length":1,"hash_ids":[1],"timestamp":0}
{"input_length":1,"hash_ids":[1],"timestamp":0}
{"input_length":1,"hash_ids":[1],"timestamp":0})");
  EXPECT_EQ(Rows(trace, 2, {{1, 2, 3}, {1, 2, 3, 4}, {3, 4, 1, 2}}),
            (std::vector<std::vector<std::uint64_t>>{{0, 1}, {0, 2}, {3, 4}}));
}

}  // namespace
}  // namespace kvshare::trace

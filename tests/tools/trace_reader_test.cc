// What the KTR-1 reader accepts, how it resolves references, and that every damaged line is named with its cause.
#include "tools/trace/trace_reader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>
#include <zlib.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace kvshare::trace {
namespace {

using ::testing::HasSubstr;

constexpr const char* kHeader = R"({"schema":"ktr","version":1,"name":"t","time_base":"session","license":"x"})";

// The status of feeding `lines` and finishing.
Result<Trace> Parse(const std::vector<std::string>& lines) {
  TraceParser parser;
  for (const std::string& line : lines) {
    const Status status = parser.AddLine(line);
    if (!status.ok()) return status;
  }
  return parser.Finish();
}

void ExpectError(const std::vector<std::string>& lines, StatusCode code, const std::string& text) {
  const auto trace = Parse(lines);
  ASSERT_FALSE(trace.ok()) << lines.back();
  EXPECT_EQ(trace.status().code(), code) << trace.status().message();
  EXPECT_THAT(trace.status().message(), HasSubstr("line " + std::to_string(lines.size()) + ": "));
  EXPECT_THAT(trace.status().message(), HasSubstr(text));
}

const std::vector<std::string> kSmall = {
    kHeader,
    R"({"seg":"s","text":"You are A."})",
    R"({"seg":"q","text":"Question"})",
    R"({"seg":"o","text":"Answer of A"})",
    R"({"request_id":"a","session_id":"w","agent_id":"A","timestamp":5,)"
    R"("segments":[["system","s"],["user","q"]],"output":"o"})",
    "",
    R"({"seg":"t","text":" and more"})",
    R"({"request_id":"b","session_id":"w","agent_id":"B","delay":7,"output_length":9,"wait_for":["a"],)"
    R"("segments":[["user","q"],["+","@a"],["+","t"]],"extra":[1]})",
};

TEST(TraceReaderTest, ResolvesSegmentsHandOffsAndContinuations) {
  const auto trace = Parse(kSmall);
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->header.name, "t");
  EXPECT_EQ(trace->header.time_base, TimeBase::kSession);
  ASSERT_EQ(trace->requests.size(), 2u);
  const TraceRequest& a = trace->requests[0];
  ASSERT_EQ(a.messages.size(), 2u);
  EXPECT_EQ(a.messages[0].role, "system");
  EXPECT_EQ(trace->MessageText(a.messages[1]), "Question");
  EXPECT_EQ(a.timestamp_ms, 5);
  const TraceRequest& b = trace->requests[1];
  ASSERT_EQ(b.messages.size(), 1u);
  EXPECT_EQ(trace->MessageText(b.messages[0]), "QuestionAnswer of A and more");
  EXPECT_EQ(b.wait_for, std::vector<std::size_t>{0});
  EXPECT_EQ(b.delay_ms, 7);
  EXPECT_EQ(b.output_length, 9);
  EXPECT_EQ(trace->Handoffs(b), 1);
  EXPECT_EQ(b.messages[0].segments[1].source, std::size_t{0});
  EXPECT_FALSE(b.timestamp_ms);
}

TEST(TraceReaderTest, ReadsMooncakeRowsAsTheyAre) {
  const auto trace = Parse({R"({"timestamp":0,"input_length":1000,"output_length":5,"hash_ids":[1,2]})",
                            R"({"timestamp":9,"input_length":1026,"output_length":6,"hash_ids":[1,3,4]})"});
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->header.format, TraceFormat::kMooncake);
  EXPECT_EQ(trace->header.time_base, TimeBase::kArrival);
  EXPECT_EQ(trace->header.block_tokens, 512);
  EXPECT_EQ(trace->requests[0].id, "0");
  EXPECT_EQ(trace->requests[1].output_length, 6);
  EXPECT_EQ(trace->Blocks(1), (std::vector<std::uint64_t>{1, 3, 4}));
  EXPECT_FALSE(trace->HasText(0));
}

TEST(TraceReaderTest, LengthsTellTheBlockSizeOfAHeaderlessFile) {
  const auto trace = Parse({R"({"timestamp":0,"input_length":180,"hash_ids":[1,2,3]})",
                            R"({"timestamp":0,"input_length":129,"hash_ids":[1,2,4]})"});
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->header.block_tokens, 64);
}

TEST(TraceReaderTest, ExpandsDeltaCodedBlocks) {
  const auto trace = Parse({R"({"schema":"ktr","version":1,"block_size":64,"hash_id_scope":"session","delta":true})",
                            R"({"request_id":"a","session_id":"x","input_length":256,"hash_ids":[1,2,3,4]})",
                            R"({"request_id":"b","session_id":"x","hash_ids":[9],"base":"a","keep":3})",
                            R"({"request_id":"c","session_id":"x","hash_ids":[7,8],"base":"b","keep":2})",
                            R"({"request_id":"d","session_id":"y","hash_ids":[],"base":"c","keep":4})"});
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->Blocks(1), (std::vector<std::uint64_t>{1, 2, 3, 9}));
  EXPECT_EQ(trace->Blocks(2), (std::vector<std::uint64_t>{1, 2, 7, 8}));
  EXPECT_EQ(trace->Blocks(3), (std::vector<std::uint64_t>{1, 2, 7, 8}));
  EXPECT_EQ(trace->block_ids.size(), 7u) << "stays as it was written";
  EXPECT_EQ(PromptTokens(*trace, trace->requests[2]), 256);
  EXPECT_EQ(trace->BlockSpace(trace->requests[0]), trace->BlockSpace(trace->requests[1]));
  EXPECT_NE(trace->BlockSpace(trace->requests[0]), trace->BlockSpace(trace->requests[3])) << "another session";
}

TEST(TraceReaderTest, SegmentsMayBeTokensOrWithheld) {
  const auto trace = Parse({kHeader, R"({"seg":"w","n_tokens":50})", R"({"seg":"t","tokens":[3,1,2]})",
                            R"({"request_id":"a","segments":[["user","w"],["user","t"]],"output":"t"})"});
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->segments[0].kind, TraceSegment::Kind::kWithheld);
  EXPECT_EQ(trace->segments[0].withheld_tokens, 50);
  EXPECT_EQ(trace->segments[1].tokens, (std::vector<TokenId>{3, 1, 2}));
}

TEST(TraceReaderTest, ReadsRequestLogsInTheShapesThatToolsWrite) {
  const std::string long_reply =
      "The lamp stands in the cellar, behind the second barrel from the left, said the cook.";
  // clang-format off
  const auto trace = Parse({
      R"({"session":"s","date":"Thu, 27 Nov 2025 05:51:54 GMT","messages":[)"
      R"({"role":"system","content":"You are the cook. Be brief."},{"role":"user","content":"Where?"}],)"
      R"("usage":{"prompt_tokens":12,"completion_tokens":20},"response":{"role":"assistant","content":")" + long_reply +
      R"("}})",
      R"({"custom_id":"b1","body":{"model":"m","messages":[{"role":"user","content":[)"
      R"({"type":"text","text":"He said: )" + long_reply + R"( Right?"},{"type":"image_url","image_url":{}}]}],)"
      R"("tools":[{"type":"function"}],"metadata":{"session_id":"s","agent":"judge"}},)"
      R"("response":{"status_code":200,"body":{"created":1764222715,"choices":[{"message":{"role":"assistant",)"
      R"("content":null,"tool_calls":[{"id":"1","function":{"name":"look","arguments":"{}"}}]}}]}}})",
      R"({"request":{"prompt":"Once upon"},"response":{"choices":[{"text":" a time"}]},)"
      R"("timestamp":"2025-11-27T06:51:54.250+01:00"})",
      R"({"prompt":[5,6,7],"session_id":"s","output":"x","timestamp":65000})",
  });
  // clang-format on
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->header.format, TraceFormat::kOpenAi);
  EXPECT_EQ(trace->header.time_base, TimeBase::kSession);
  ASSERT_EQ(trace->requests.size(), 4u);
  const auto& cook = trace->requests[0];
  EXPECT_EQ(cook.agent, "cook");
  EXPECT_EQ(cook.id, "s/0");
  EXPECT_EQ(cook.timestamp_ms, 1764222714000.0);
  EXPECT_EQ(cook.output_length, 20);
  EXPECT_EQ(trace->segments[*cook.output].text, long_reply);
  const auto& judge = trace->requests[1];
  EXPECT_EQ(judge.id, "b1");
  EXPECT_EQ(judge.agent, "judge");
  EXPECT_EQ(judge.session, "s");
  EXPECT_EQ(judge.timestamp_ms, 1764222715000.0);
  EXPECT_EQ(judge.messages[0].role, "tools");
  ASSERT_EQ(judge.messages[1].segments.size(), 3u) << "cut before and after the quotation";
  EXPECT_EQ(judge.messages[1].segments[1].source, std::size_t{0});
  EXPECT_EQ(trace->MessageText(judge.messages[1]), "He said: " + long_reply + " Right?");
  EXPECT_EQ(judge.wait_for, std::vector<std::size_t>{0});
  EXPECT_THAT(trace->segments[*judge.output].text, HasSubstr("\"look\""));
  const auto& plain = trace->requests[2];
  EXPECT_EQ(plain.session, "0");
  EXPECT_EQ(plain.messages[0].role, kRawRole);
  EXPECT_EQ(plain.timestamp_ms, 1764222714250.0);
  EXPECT_EQ(trace->segments[*plain.output].text, "a time");
  EXPECT_EQ(trace->requests[3].timestamp_ms, 65000);
  EXPECT_EQ(trace->segments[trace->requests[3].messages[0].segments[0].segment].tokens,
            (std::vector<TokenId>{5, 6, 7}));
}

TEST(TraceReaderTest, ReadsDatesAsProgramsWriteThem) {
  for (const std::string date : {"Thu, 27 Nov 2025 05:51:54 GMT", "2025-11-27T05:51:54Z", "2025-11-27 05:51:54",
                                 "2025-11-27T05:51:54+00:00", "2025-11-27T11:21:54+05:30", "2025-11-27T11:21:54+0530",
                                 "2025-11-27T02:51:54-03", "2025-11-26T22:21:54-0730"}) {
    const auto trace = Parse({R"({"messages":[{"role":"user","content":"x"}],"timestamp":")" + date + "\"}"});
    ASSERT_TRUE(trace.ok()) << date;
    EXPECT_EQ(trace->requests[0].timestamp_ms, 1764222714000.0) << date;
  }
  for (const std::string date : {"2025-11-27T05:51:54.250Z", "2025-11-27 05:51:54,250"}) {
    const auto trace = Parse({R"({"messages":[{"role":"user","content":"x"}],"timestamp":")" + date + "\"}"});
    ASSERT_TRUE(trace.ok()) << date;
    EXPECT_EQ(trace->requests[0].timestamp_ms, 1764222714250.0) << date;
  }
}

TEST(TraceReaderTest, NamesTheCauseOfEveryBadLogLine) {
  const std::string good = R"({"messages":[{"role":"user","content":"x"}]})";
  const auto wrong = [&](const std::string& line, const std::string& cause) {
    ExpectError({good, line}, StatusCode::kInvalidArgument, cause);
  };
  wrong(R"({"messages":[]})", "\"messages\" is not a list");
  wrong(R"({"messages":"x"})", "\"messages\" is not a list");
  wrong(R"({"messages":[{"content":"x"}]})", "no message with a role");
  wrong(R"({"messages":[{"role":"+","content":"x"}]})", "kept for KTR");
  wrong(R"({"messages":[{"role":"user","content":"x"}],"response":{"a":1}})", "neither text nor a chat reply");
  wrong(R"({"messages":[{"role":"user","content":"x"}],"timestamp":"soon"})", "a date that cannot be read");
  wrong(R"({"messages":[{"role":"user","content":"x"}],"timestamp":-1})", "neither a time nor a date");
  wrong(R"({"messages":[{"role":"user","content":"x"}],"tools":{"a":1}})", "\"tools\" is not a list");
  wrong(R"({"prompt":{"a":1}})", "neither text nor a list of token ids");
  wrong(R"({"prompt":[1,-2]})", "neither text nor a list of token ids");
  wrong(R"({"hash_ids":[1]})", "another kind");
  wrong(kHeader, "a header after other lines");
  wrong(R"({"custom_id":"0/0","messages":[{"role":"user","content":"x"}]})", "appears twice");
  ExpectError({R"({"hash_ids":[1],"timestamp":0})", good}, StatusCode::kInvalidArgument, "after lines of another kind");
  ExpectError({kHeader, good}, StatusCode::kInvalidArgument, "neither a header");
  wrong(std::string(300, '[') + std::string(300, ']'), "nested deeper");
}

TEST(TraceReaderTest, NamesLineAndCauseOfEveryDamage) {
  const auto after = [](const std::string& line) {
    return std::vector<std::string>{kSmall[0], kSmall[1], kSmall[2], kSmall[3], kSmall[4], line};
  };
  const auto wrong = [&](const std::string& line, const std::string& cause) {
    ExpectError(after(line), StatusCode::kInvalidArgument, cause);
  };
  wrong("{", "not JSON");
  wrong("[1]", "not a JSON object");
  wrong("{}", "neither a header");
  wrong("\"\xff\"", "not JSON");
  wrong(kHeader, "header after other lines");
  wrong(R"({"seg":5,"text":"x"})", "\"seg\" is not a string");
  wrong(R"({"seg":"","text":"x"})", "not a segment's name");
  wrong(R"({"seg":"@a","text":"x"})", "not a segment's name");
  wrong(R"({"seg":"s","text":"x"})", "segment s appears twice");
  wrong(R"({"seg":"n"})", "neither \"text\" nor");
  wrong(R"({"seg":"n","tokens":5})", "\"tokens\" is not a list");
  wrong(R"({"seg":"n","tokens":[1,"x"]})", "other than token ids");
  wrong(R"({"seg":"n","tokens":[1e12]})", "other than token ids");
  wrong(R"({"seg":"n","text":1})", "\"text\" is not a string");
  wrong(R"({"seg":"n","n_tokens":-1})", "\"n_tokens\" is not a whole number");
  wrong(R"({"request_id":"a","segments":[["user","q"]]})", "request a appears twice");
  wrong(R"({"request_id":1,"segments":[["user","q"]]})", "\"request_id\" is not a string");
  wrong(R"({"request_id":"c"})", "neither \"segments\" nor");
  wrong(R"({"request_id":"c","segments":[]})", "not a list with something in it");
  wrong(R"({"request_id":"c","segments":[["user"]]})", "other than [role, reference]");
  wrong(R"({"request_id":"c","segments":[["user",3]]})", "other than [role, reference]");
  wrong(R"({"request_id":"c","segments":[["","q"]]})", "empty role");
  wrong(R"({"request_id":"c","segments":[["+","q"]]})", "continues no message");
  wrong(R"({"request_id":"c","segments":[["user","later"]]})", "segment later was not given before its use");
  wrong(R"({"request_id":"c","segments":[["user","@c"]]})", "@c is no earlier request");
  wrong(R"({"request_id":"c","segments":[["user","q"]],"output":"none"})", "names no earlier segment: none");
  wrong(R"({"request_id":"c","segments":[["user","q"]],"wait_for":["d"]})", "names no earlier request");
  wrong(R"({"request_id":"c","segments":[["user","q"]],"wait_for":"a"})", "\"wait_for\" is not a list");
  wrong(R"({"request_id":"c","segments":[["user","q"]],"timestamp":"now"})", "\"timestamp\" is not a time");
  wrong(R"({"request_id":"c","segments":[["user","q"]],"timestamp":1e300})", "\"timestamp\" is not a time");
  wrong(R"({"request_id":"c","segments":[["user","q"]],"output_length":2.5})",
        "\"output_length\" is not a whole number");
  wrong(R"({"request_id":"c","input_length":1,"hash_ids":3})", "\"hash_ids\" is not a list");
  wrong(R"({"request_id":"c","input_length":1,"hash_ids":[1],"base":"z"})", "\"base\" names no earlier request");
  wrong(R"({"request_id":"c","input_length":1,"hash_ids":[1],"base":"a","keep":1})",
        "\"keep\" is not a whole number from 0 to 0");
  wrong(R"({"request_id":"c","segments":[["raw","q"],["user","q"]]})", "has other messages too");
  wrong(R"({"request_id":"c","input_length":1,"hash_ids":[1,-1]})", "other than whole numbers");
  wrong(R"({"request_id":"c","input_length":1,"hash_ids":[1.5]})", "other than whole numbers");
  ExpectError({R"({"schema":"ktr","version":1,"block_size":0})"}, StatusCode::kInvalidArgument, "block_size");
  ExpectError({R"({"schema":"ktr","version":1,"hash_kind":"odd"})"}, StatusCode::kInvalidArgument, "hash_kind");
  ExpectError({R"({"schema":"ktr","version":1,"hash_id_scope":"odd"})"}, StatusCode::kInvalidArgument, "hash_id_scope");
  ExpectError({R"({"schema":"ktr","version":2})"}, StatusCode::kFailedPrecondition, "version 1");
  ExpectError({R"({"schema":"other"})"}, StatusCode::kInvalidArgument, "\"schema\" is not");
  ExpectError({R"({"schema":"ktr","version":1,"time_base":"lunar"})"}, StatusCode::kInvalidArgument, "time_base");
}

TEST(TraceReaderTest, HandOffNeedsARecordedOutput) {
  ExpectError({kSmall[2], R"({"request_id":"a","segments":[["user","q"]]})",
               R"({"request_id":"b","segments":[["user","@a"]]})"},
              StatusCode::kInvalidArgument, "@a has no recorded output");
}

TEST(TraceReaderTest, AnEmptyTraceIsAnError) {
  const auto trace = Parse({kHeader});
  ASSERT_FALSE(trace.ok());
  EXPECT_THAT(trace.status().message(), HasSubstr("no request"));
}

class TraceFileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = std::filesystem::temp_directory_path() / ("kvshare-trace-" + std::to_string(::getpid()));
    std::filesystem::create_directories(dir_);
    for (const std::string& line : kSmall) text_ += line + "\n";
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  std::string Write(const std::string& name, const std::string& bytes) {
    const std::string path = dir_ / name;
    std::ofstream(path, std::ios::binary) << bytes;
    return path;
  }
  // Of more than one block of what the reader takes at a time.
  std::string LongGzip(const std::string& name) {
    std::string many = std::string(kHeader) + "\n";
    for (int i = 0; i < 3000; ++i)
      many += R"({"seg":"s)" + std::to_string(i * 7919) + R"(","text":"t)" + std::to_string(i * 104729) + "\"}\n";
    return Gzip(name, many + R"({"request_id":"a","segments":[["user","s0"]]})"
                             "\n");
  }
  std::string Gzip(const std::string& name, const std::string& text) {
    const std::string path = dir_ / name;
    gzFile file = gzopen(path.c_str(), "wb");
    gzwrite(file, text.data(), static_cast<unsigned>(text.size()));
    gzclose(file);
    return path;
  }

  std::filesystem::path dir_;
  std::string text_;
};

TEST_F(TraceFileTest, PlainAndGzipAreTheSame) {
  const auto plain = ReadTrace(Write("a.jsonl", text_));
  const auto packed = ReadTrace(Gzip("a.jsonl.gz", text_));
  ASSERT_TRUE(plain.ok()) << plain.status().message();
  ASSERT_TRUE(packed.ok()) << packed.status().message();
  EXPECT_EQ(plain->segments, packed->segments);
  EXPECT_EQ(plain->requests.size(), packed->requests.size());
}

TEST_F(TraceFileTest, LimitStopsReadingEvenBeforeDamage) {
  const std::string path = Write("a.jsonl", text_ + "{broken\n");
  EXPECT_FALSE(ReadTrace(path).ok());
  const auto first = ReadTrace(path, 1);
  ASSERT_TRUE(first.ok()) << first.status().message();
  EXPECT_EQ(first->requests.size(), 1u);
}

TEST_F(TraceFileTest, TheLastLineNeedsNoNewline) {
  const auto trace = ReadTrace(Write("a.jsonl", text_.substr(0, text_.size() - 1)));
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->requests.size(), 2u);
}

TEST_F(TraceFileTest, ErrorsNameThePath) {
  const auto missing = ReadTrace(dir_ / "none.jsonl");
  ASSERT_FALSE(missing.ok());
  EXPECT_EQ(missing.status().code(), StatusCode::kNotFound);
  EXPECT_THAT(missing.status().message(), HasSubstr("none.jsonl"));
  const auto directory = ReadTrace(dir_);
  EXPECT_EQ(directory.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(directory.status().message(), HasSubstr("is a directory"));
  const auto broken = ReadTrace(Write("broken.jsonl", text_ + "{\n"));
  ASSERT_FALSE(broken.ok());
  EXPECT_THAT(broken.status().message(), HasSubstr("broken.jsonl: line 9: not JSON"));
}

// Whether or not the damage is seen first in a line that makes no sense.
TEST_F(TraceFileTest, ADamagedGzipStreamIsDataLoss) {
  const std::string path = LongGzip("c.gz");
  const auto size = static_cast<std::streamoff>(std::filesystem::file_size(path));
  for (int i = 1; i < 40; ++i) {
    const std::string damaged = (dir_ / "damaged.gz").string();
    std::filesystem::copy_file(path, damaged, std::filesystem::copy_options::overwrite_existing);
    std::fstream file(damaged, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(size * i / 40);
    const char byte = static_cast<char>(file.get() ^ 0x10);
    file.seekp(size * i / 40);
    file.put(byte);
    file.close();
    EXPECT_EQ(ReadTrace(damaged).status().code(), StatusCode::kDataLoss) << i;
  }
}

TEST_F(TraceFileTest, ACutGzipStreamIsDataLoss) {
  const std::string path = LongGzip("b.gz");
  ASSERT_TRUE(ReadTrace(path).ok());
  std::filesystem::resize_file(path, std::filesystem::file_size(path) / 2);
  const auto cut = ReadTrace(path);
  ASSERT_FALSE(cut.ok());
  EXPECT_EQ(cut.status().code(), StatusCode::kDataLoss) << cut.status().message();
}

}  // namespace
}  // namespace kvshare::trace

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
  EXPECT_EQ(b.handoffs, 1);
  EXPECT_FALSE(b.timestamp_ms);
}

TEST(TraceReaderTest, ReadsMooncakeRowsAndDeltaBlocks) {
  const auto trace = Parse({R"({"timestamp":0,"input_length":1000,"output_length":5,"hash_ids":[1,2]})",
                            R"({"request_id":"x","input_length":2000,"hash_ids":[9],"base":"0","keep":2})"});
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->requests[0].id, "0");
  EXPECT_EQ(trace->requests[1].blocks, 3);
  EXPECT_TRUE(trace->requests[1].messages.empty());
}

TEST(TraceReaderTest, SynthesisesWithheldTextTheSameWayEveryTime) {
  const std::vector<std::string> lines = {kHeader, R"({"seg":"w","n_tokens":50})",
                                          R"({"request_id":"a","segments":[["user","w"]]})"};
  const auto one = Parse(lines);
  const auto two = Parse(lines);
  ASSERT_TRUE(one.ok() && two.ok());
  EXPECT_EQ(one->segments, two->segments);
  EXPECT_GE(one->segments[0].size(), 250u);
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
  ExpectError(after(R"({"seg":"n","tokens":[1,2]})"), StatusCode::kUnimplemented, "token ids");
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
  const auto broken = ReadTrace(Write("broken.jsonl", text_ + "{\n"));
  ASSERT_FALSE(broken.ok());
  EXPECT_THAT(broken.status().message(), HasSubstr("broken.jsonl: line 9: not JSON"));
}

TEST_F(TraceFileTest, ACutGzipStreamIsDataLoss) {
  std::string many = std::string(kHeader) + "\n";
  for (int i = 0; i < 3000; ++i)
    many += R"({"seg":"s)" + std::to_string(i * 7919) + R"(","text":"t)" + std::to_string(i * 104729) + "\"}\n";
  const std::string path = Gzip("b.gz", many + R"({"request_id":"a","segments":[["user","s0"]]})"
                                               "\n");
  ASSERT_TRUE(ReadTrace(path).ok());
  std::filesystem::resize_file(path, std::filesystem::file_size(path) / 2);
  const auto cut = ReadTrace(path);
  ASSERT_FALSE(cut.ok());
  EXPECT_EQ(cut.status().code(), StatusCode::kDataLoss) << cut.status().message();
}

}  // namespace
}  // namespace kvshare::trace

// The codec: every field of every message survives the wire, and no bytes whatever do worse than an error.
#include "libkvshare/codec/codec.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <random>

#include "protocol/kvshare_generated.h"
#include "tests/testing/random_messages.h"

namespace kvshare::codec {
namespace {

using kvshare::testing::Describe;
using kvshare::testing::kReplyKinds;
using kvshare::testing::kRequestKinds;
using kvshare::testing::RandomReply;
using kvshare::testing::RandomRequest;

constexpr std::uint64_t kSeed = 20240607;

Result<Request> RequestOf(std::span<const std::uint8_t> frame) {
  wire::ReceivedFrame received;
  const wire::FrameFault fault = received.Load(frame, wire::FrameKind::kRequest);
  if (fault != wire::FrameFault::kNone) return FaultStatus(fault, received.header(), "client");
  return DecodeRequest(*received.request());
}

Result<Reply> ReplyOf(std::span<const std::uint8_t> frame) {
  wire::ReceivedFrame received;
  const wire::FrameFault fault = received.Load(frame, wire::FrameKind::kReply);
  if (fault != wire::FrameFault::kNone) return FaultStatus(fault, received.header(), "daemon");
  return DecodeReply(*received.reply());
}

// Copies to the heap at its exact size, so that AddressSanitizer sees a read past the end.
Frame Prefix(const Frame& frame, std::size_t size) { return Frame(frame.begin(), frame.begin() + size); }

template <typename Encode, typename Decode, typename Random>
void RoundTripEvery(std::size_t kinds, Encode encode, Decode decode, Random random) {
  std::mt19937_64 rng(kSeed);
  for (std::size_t kind = 0; kind < kinds; ++kind) {
    for (int i = 0; i < 200; ++i) {
      const auto message = random(rng, kind);
      ASSERT_EQ(message.index(), kind);
      const Result<Frame> frame = encode(5, message);
      ASSERT_TRUE(frame.ok()) << frame.status().message();
      const auto back = decode(*frame);
      ASSERT_TRUE(back.ok()) << back.status().message();
      ASSERT_EQ(Describe(*back), Describe(message)) << "seed " << kSeed << " kind " << kind;
    }
  }
}

TEST(CodecTest, EveryFieldOfEveryRequestSurvives) {
  RoundTripEvery(kRequestKinds, EncodeRequest, RequestOf, RandomRequest);
}

TEST(CodecTest, EveryFieldOfEveryReplySurvives) { RoundTripEvery(kReplyKinds, EncodeReply, ReplyOf, RandomReply); }

// A damaged frame is refused, or is another valid message: then it encodes again. Both without reading where it may
// not.
template <typename Encode, typename Decode>
void Damage(const Frame& frame, Encode encode, Decode decode) {
  for (std::size_t size = 0; size < frame.size(); ++size) {
    ASSERT_FALSE(decode(Prefix(frame, size)).ok()) << "cut at " << size;
    // A header that agrees with the cut.
    if (size < wire::kHeaderBytes) continue;
    Frame cut = Prefix(frame, size);
    const auto body_bytes = static_cast<std::uint32_t>(size - wire::kHeaderBytes);
    std::memcpy(cut.data() + 16, &body_bytes, sizeof body_bytes);
    const auto message = decode(cut);
    if (message.ok()) {
      ASSERT_TRUE(encode(1, *message).ok()) << "cut at " << size;
    }
  }
  Frame damaged = frame;
  for (std::size_t at = 0; at < frame.size(); ++at) {
    for (int flip : {0x01, 0x80, 0xFF, 0x7F}) {
      damaged[at] = static_cast<std::uint8_t>(frame[at] ^ flip);
      const auto message = decode(damaged);
      if (message.ok()) {
        ASSERT_TRUE(encode(1, *message).ok()) << "byte " << at;
      } else {
        ASSERT_FALSE(message.status().message().empty());
      }
    }
    damaged[at] = frame[at];
  }
}

TEST(CodecTest, NoDamageToARequestDoesWorseThanAnError) {
  std::mt19937_64 rng(kSeed);
  for (std::size_t kind = 0; kind < kRequestKinds; ++kind) {
    for (int i = 0; i < 5; ++i) {
      const Result<Frame> frame = EncodeRequest(1, RandomRequest(rng, kind));
      ASSERT_TRUE(frame.ok());
      Damage(*frame, EncodeRequest, RequestOf);
    }
  }
}

TEST(CodecTest, NoDamageToAReplyDoesWorseThanAnError) {
  std::mt19937_64 rng(kSeed);
  for (std::size_t kind = 0; kind < kReplyKinds; ++kind) {
    for (int i = 0; i < 5; ++i) {
      const Result<Frame> frame = EncodeReply(1, RandomReply(rng, kind));
      ASSERT_TRUE(frame.ok());
      Damage(*frame, EncodeReply, ReplyOf);
    }
  }
}

// ---- limits ----

Status EncodingOf(const Request& request) { return EncodeRequest(1, request).status(); }

void ExpectRefused(const Request& request, std::string_view what) {
  const Status status = EncodingOf(request);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << what;
  EXPECT_NE(status.message().find(what), std::string::npos) << status.message();
}

Generate GenerateOf(GenerateRequest request) { return {.request = std::move(request)}; }

TEST(CodecLimitsTest, WritersRefuseWhatReadersWould) {
  EXPECT_TRUE(EncodingOf(Tokenize{std::string(wire::kMaxTextBytes, 'a')}).ok());
  ExpectRefused(Tokenize{std::string(wire::kMaxTextBytes + 1, 'a')}, "text");
  EXPECT_TRUE(EncodingOf(Detokenize{std::vector<TokenId>(wire::kMaxTokens)}).ok());
  ExpectRefused(Detokenize{std::vector<TokenId>(wire::kMaxTokens + 1)}, "tokens");
  ExpectRefused(RenderRequest{{.tools_json = std::string(wire::kMaxToolsBytes + 1, ' ')}}, "tools");
  ExpectRefused(GenerateOf({.agent = std::string(wire::kMaxNameBytes + 1, 'a')}), "agent");
  ExpectRefused(GenerateOf({.session = std::string(wire::kMaxNameBytes + 1, 'a')}), "session");
  ExpectRefused(GenerateOf({.stop = std::vector<std::string>(wire::kMaxStops + 1, "x")}), "stop");
  ExpectRefused(GenerateOf({.stop = {std::string(wire::kMaxStopBytes + 1, 'x')}}), "stop");
  ExpectRefused(GenerateOf({.timeout = std::chrono::milliseconds(-1)}), "timeout");
  ExpectRefused(GenerateOf({.timeout = std::chrono::milliseconds::max()}), "timeout");
  ExpectRefused(GenerateOf({.sampling = {.temperature = std::numeric_limits<float>::quiet_NaN()}}), "temperature");
  ExpectRefused(GenerateOf({.sampling = {.top_p = std::numeric_limits<float>::infinity()}}), "top_p");
  ExpectRefused(Credit{.target = 1, .chunks = wire::kMaxCredit + 1}, "credit");
}

TEST(CodecLimitsTest, TheLargestMessagesFitAFrame) {
  const ChatPrompt chat{.messages_json = std::string(wire::kMaxTextBytes, 'a'),
                        .tools_json = std::string(wire::kMaxToolsBytes, 'b')};
  EXPECT_TRUE(EncodingOf(RenderRequest{chat}).ok());
  RenderReply rendered{.prompt = std::string(wire::kMaxTextBytes, 'a'), .ids = std::vector<TokenId>(wire::kMaxTokens)};
  const Result<Frame> frame = EncodeReply(1, rendered);
  ASSERT_TRUE(frame.ok()) << frame.status().message();
  EXPECT_TRUE(ReplyOf(*frame).ok());
}

TEST(CodecLimitsTest, AnAnswerTooLargeSaysSo) {
  Explanation explanation;
  explanation.spans.resize(wire::kMaxSpans + 1);
  EXPECT_EQ(EncodeReply(1, explanation).status().code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(EncodeReply(1, TokenChunk{.text = std::string(wire::kMaxTextBytes + 1, 'a')}).status().code(),
            StatusCode::kResourceExhausted);
}

TEST(CodecLimitsTest, ReadersRefuseByThemselves) {
  // As another program would send it: one stop string, named more often than a request may.
  flatbuffers::FlatBufferBuilder builder;
  const auto stop = builder.CreateString(std::string(wire::kMaxStopBytes, 'x'));
  const auto stops =
      builder.CreateVector(std::vector<flatbuffers::Offset<flatbuffers::String>>(wire::kMaxStops + 1, stop));
  const auto prompt = wire::CreateTextPrompt(builder);
  wire::GenerateBuilder generate(builder);
  generate.add_prompt_type(wire::Prompt::TextPrompt);
  generate.add_prompt(prompt.Union());
  generate.add_stop(stops);
  const auto body = generate.Finish();
  builder.Finish(wire::CreateRequest(builder, wire::RequestBody::Generate, body.Union()));
  const Result<Request> request = DecodeRequest(*flatbuffers::GetRoot<wire::Request>(builder.GetBufferPointer()));
  ASSERT_FALSE(request.ok());
  EXPECT_EQ(request.status().code(), StatusCode::kInvalidArgument);
}

TEST(CodecTest, NumbersOfEightBytesThatAreNotAlignedAreRefused) {
  // A 4-byte number and what lies behind it passed off as a page: 4 bytes further on with one number more behind it.
  int refused = 0;
  for (const std::size_t behind : {8, 9}) {
    flatbuffers::FlatBufferBuilder builder;
    static_cast<void>(builder.CreateVector(std::vector<std::uint32_t>(behind)));
    const auto pages = builder.CreateVector(std::vector<std::uint32_t>{0});
    const flatbuffers::Offset<flatbuffers::Vector<const wire::LeasePage*>> as_pages(pages.o);
    const auto body = wire::CreateLeased(builder, 1, 64, 1000, 0, as_pages);
    builder.Finish(wire::CreateReply(builder, wire::ReplyBody::Leased, body.Union()));
    Frame frame(wire::kHeaderBytes + builder.GetSize());
    wire::WriteHeader({.kind = wire::FrameKind::kReply, .body_bytes = builder.GetSize()}, frame.data());
    std::memcpy(frame.data() + wire::kHeaderBytes, builder.GetBufferPointer(), builder.GetSize());
    wire::ReceivedFrame received;
    ASSERT_EQ(received.Load(frame, wire::FrameKind::kReply), wire::FrameFault::kNone);
    const Status status = DecodeReply(*received.reply()).status();
    refused += status.message().find("lie where") != std::string::npos;
  }
  EXPECT_EQ(refused, 1);
}

TEST(CodecLimitsTest, LongErrorsAreCutBetweenCharacters) {
  // "a", then two-byte characters: the limit falls within one.
  std::string text = "a";
  while (text.size() < 2 * wire::kMaxErrorBytes) text += "\xC3\xA9";
  const Result<Reply> reply = ReplyOf(EncodeError(1, Internal(text)));
  ASSERT_TRUE(reply.ok());
  const std::string& cut = std::get<Status>(*reply).message();
  EXPECT_EQ(cut.size(), wire::kMaxErrorBytes - 1);
  EXPECT_EQ(cut, text.substr(0, cut.size()));
}

TEST(CodecLimitsTest, LongNamesOfTheDaemonsAreCutAndKeepNobodyWithoutAnAnswer) {
  std::string name = "a";
  while (name.size() < 2 * wire::kMaxNameBytes) name += "\xC3\xA9";
  const std::string cut = name.substr(0, wire::kMaxNameBytes - 1);
  const Result<Frame> pong = EncodeReply(1, Pong{.info = ServerInfo{.model = name, .reuse = ReuseMode::kExact}});
  ASSERT_TRUE(pong.ok()) << pong.status().message();
  const Result<Reply> info = ReplyOf(*pong);
  ASSERT_TRUE(info.ok()) << info.status().message();
  EXPECT_EQ(std::get<Pong>(*info).info->model, cut);
  Stats full;
  full.cold.state = name;
  const Result<Frame> stats = EncodeReply(1, full);
  ASSERT_TRUE(stats.ok()) << stats.status().message();
  const Result<Reply> read = ReplyOf(*stats);
  ASSERT_TRUE(read.ok()) << read.status().message();
  EXPECT_EQ(std::get<Stats>(*read).cold.state, cut);
}

// ---- unions ----

Result<Request> Bare(wire::RequestBody type) {
  flatbuffers::FlatBufferBuilder builder;
  builder.Finish(wire::CreateRequest(builder, type, 0));
  return DecodeRequest(*flatbuffers::GetRoot<wire::Request>(builder.GetBufferPointer()));
}

TEST(CodecTest, ANullBodyIsRefusedWhateverItsType) {
  for (int type = 0; type < 256; ++type) {
    EXPECT_EQ(Bare(static_cast<wire::RequestBody>(type)).status().code(), StatusCode::kInvalidArgument) << type;
  }
}

TEST(CodecTest, AMessageOfTheFutureIsNamedUnimplemented) {
  flatbuffers::FlatBufferBuilder builder;
  const auto body = wire::CreatePing(builder);
  builder.Finish(wire::CreateRequest(builder, static_cast<wire::RequestBody>(200), body.Union()));
  const auto* data = builder.GetBufferPointer();
  Frame frame(wire::kHeaderBytes + builder.GetSize());
  wire::WriteHeader({.body_bytes = builder.GetSize()}, frame.data());
  std::memcpy(frame.data() + wire::kHeaderBytes, data, builder.GetSize());
  EXPECT_EQ(RequestOf(frame).status().code(), StatusCode::kUnimplemented);
}

TEST(CodecTest, AnotherVersionIsNamedWithBothNumbers) {
  const Status status = FaultStatus(wire::FrameFault::kOtherVersion, {.version = 7}, "client");
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("version 7"), std::string::npos) << status.message();
  EXPECT_NE(status.message().find("version 1"), std::string::npos) << status.message();
}

}  // namespace
}  // namespace kvshare::codec

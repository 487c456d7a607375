// Frames: every header fault is named, and nothing but a well-formed body within the limits is ever handed out.
#include "protocol/frame.h"

#include <gtest/gtest.h>

#include <cstring>

#include "protocol/kvshare_generated.h"

namespace kvshare::wire {
namespace {

using Bytes = std::vector<std::uint8_t>;

Bytes FrameOf(FrameKind kind, const flatbuffers::FlatBufferBuilder& builder) {
  Bytes frame(kHeaderBytes + builder.GetSize());
  WriteHeader({.kind = kind, .correlation = 77, .body_bytes = builder.GetSize()}, frame.data());
  std::memcpy(frame.data() + kHeaderBytes, builder.GetBufferPointer(), builder.GetSize());
  return frame;
}

Bytes TokenizeFrame(const std::string& text) {
  flatbuffers::FlatBufferBuilder builder;
  const auto body = CreateTokenize(builder, builder.CreateString(text));
  builder.Finish(CreateRequest(builder, RequestBody::Tokenize, body.Union()));
  return FrameOf(FrameKind::kRequest, builder);
}

TEST(FrameTest, HeaderBytesAreAsDocumented) {
  std::uint8_t header[kHeaderBytes];
  WriteHeader({.version = 1, .kind = FrameKind::kReply, .correlation = 0x1122334455667788, .body_bytes = 0xAABBCC},
              header);
  const std::uint8_t expected[kHeaderBytes] = {'K',  'V',  'S',  'H',  1,    0,    2,    0,    0x88, 0x77, 0x66, 0x55,
                                               0x44, 0x33, 0x22, 0x11, 0xCC, 0xBB, 0xAA, 0x00, 0,    0,    0,    0};
  EXPECT_EQ(std::memcmp(header, expected, kHeaderBytes), 0);
}

TEST(FrameTest, LoadHandsOutTheBodyWhereverTheFrameLies) {
  const Bytes frame = TokenizeFrame("some text");
  for (std::size_t shift = 0; shift < 16; ++shift) {
    Bytes shifted(shift);
    shifted.insert(shifted.end(), frame.begin(), frame.end());
    ReceivedFrame received;
    ASSERT_EQ(received.Load({shifted.data() + shift, frame.size()}, FrameKind::kRequest), FrameFault::kNone);
    EXPECT_EQ(received.header().correlation, 77u);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(received.request()) % alignof(std::uint32_t), 0u);
    EXPECT_EQ(received.request()->body_as_Tokenize()->text()->str(), "some text");
  }
}

TEST(FrameTest, EveryHeaderFaultHasItsName) {
  const Bytes good = TokenizeFrame("x");
  const auto fault_with = [&good](std::size_t at, std::uint8_t value) {
    Bytes frame = good;
    frame[at] = value;
    ReceivedFrame received;
    return received.Load(frame, FrameKind::kRequest);
  };
  EXPECT_EQ(fault_with(0, 'X'), FrameFault::kBadMagic);
  EXPECT_EQ(fault_with(4, 2), FrameFault::kOtherVersion);
  EXPECT_EQ(fault_with(6, 0), FrameFault::kWrongKind);
  EXPECT_EQ(fault_with(6, 2), FrameFault::kWrongKind) << "a reply where a request belongs";
  EXPECT_EQ(fault_with(7, 1), FrameFault::kReserved);
  EXPECT_EQ(fault_with(16, 0), FrameFault::kBadLength);
  EXPECT_EQ(fault_with(23, 1), FrameFault::kReserved);

  ReceivedFrame received;
  EXPECT_EQ(received.Load({}, FrameKind::kRequest), FrameFault::kTooShort);
  EXPECT_EQ(received.Load({good.data(), kHeaderBytes - 1}, FrameKind::kRequest), FrameFault::kTooShort);
  EXPECT_EQ(received.Load({good.data(), good.size() - 1}, FrameKind::kRequest), FrameFault::kBadLength);
  EXPECT_EQ(received.Load(Bytes(kMaxFrameBytes + 1), FrameKind::kRequest), FrameFault::kTooLarge);
}

TEST(FrameTest, OtherVersionsKeepTheirCorrelationReadable) {
  Bytes frame = TokenizeFrame("x");
  frame[4] = 9;
  frame[6] = 200;  // a kind of that version's
  FrameHeader header;
  EXPECT_EQ(ReadHeader(frame, &header), FrameFault::kOtherVersion);
  EXPECT_TRUE(CorrelationReadable(FrameFault::kOtherVersion));
  EXPECT_EQ(header.version, 9);
  EXPECT_EQ(header.correlation, 77u);
}

TEST(FrameTest, AnEmptyBodyIsNoBody) {
  Bytes frame(kHeaderBytes);
  WriteHeader({.kind = FrameKind::kRequest}, frame.data());
  ReceivedFrame received;
  EXPECT_EQ(received.Load(frame, FrameKind::kRequest), FrameFault::kBadBody);
}

// A frame may not make the reader visit more tables than a message of ours can have: here the same few bytes, over and
// over.
TEST(FrameTest, MoreTablesThanAMessageHasAreRefused) {
  const auto frame_with_agents = [](std::size_t count) {
    flatbuffers::FlatBufferBuilder builder;
    const auto agent = CreateAgentTotals(builder, builder.CreateString("a"), CreateTotals(builder));
    const auto agents = builder.CreateVector(std::vector<flatbuffers::Offset<AgentTotals>>(count, agent));
    StatsBuilder stats(builder);
    stats.add_agents(agents);
    const auto body = stats.Finish();
    builder.Finish(CreateReply(builder, ReplyBody::Stats, body.Union()));
    return FrameOf(FrameKind::kReply, builder);
  };
  ReceivedFrame received;
  EXPECT_EQ(received.Load(frame_with_agents(kMaxAgents), FrameKind::kReply), FrameFault::kNone);
  EXPECT_EQ(received.Load(frame_with_agents(kMaxReplyTables), FrameKind::kReply), FrameFault::kBadBody);
}

TEST(FrameTest, AReusedReaderReadsSmallAfterLarge) {
  ReceivedFrame received;
  ASSERT_EQ(received.Load(TokenizeFrame(std::string(3 << 20, 'a')), FrameKind::kRequest), FrameFault::kNone);
  EXPECT_EQ(received.request()->body_as_Tokenize()->text()->size(), 3u << 20);
  ASSERT_EQ(received.Load(TokenizeFrame("b"), FrameKind::kRequest), FrameFault::kNone);
  EXPECT_EQ(received.request()->body_as_Tokenize()->text()->str(), "b");
}

}  // namespace
}  // namespace kvshare::wire

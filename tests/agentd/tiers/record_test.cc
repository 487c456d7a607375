#include "agentd/tiers/record.h"

#include <cstring>
#include <vector>

#include "gtest/gtest.h"
#include "tests/agentd/tiers/tier_harness.h"
#include "tests/testing/status_matchers.h"

namespace kvshare::agentd {
namespace {

RecordHeader SomeRecord(std::size_t tokens) {
  RecordHeader record = {
      .generation = 42, .page_bytes = 5000, .space = TestSpace(), .page = TestPartialPage(3, tokens)};
  for (std::size_t i = 0; i < kMaxPayloadParts; ++i) record.parts[i] = {.low = i + 1, .high = 2};
  return record;
}

TEST(Record, HeaderRoundTrip) {
  for (const std::size_t tokens : {1, 7, 64}) {
    const RecordHeader record = SomeRecord(tokens);
    std::vector<std::byte> bytes(kRecordHeaderBytes);
    EncodeRecordHeader(record, bytes);
    const auto decoded = DecodeRecordHeader(bytes);
    ASSERT_TRUE(decoded.ok()) << decoded.status().message();
    EXPECT_EQ(decoded->generation, record.generation);
    EXPECT_EQ(decoded->page_bytes, record.page_bytes);
    EXPECT_EQ(decoded->space, record.space);
    EXPECT_EQ(decoded->parts, record.parts);
    EXPECT_TRUE(SamePage(decoded->page, record.page));
  }
}

TEST(Record, NoFlippedBitOfAHeaderIsOverlooked) {
  std::vector<std::byte> bytes(kRecordHeaderBytes);
  EncodeRecordHeader(SomeRecord(64), bytes);
  for (std::size_t at = 0; at < bytes.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      bytes[at] ^= std::byte{1} << bit;
      ASSERT_EQ(DecodeRecordHeader(bytes).status().code(), StatusCode::kDataLoss) << "byte " << at << " bit " << bit;
      bytes[at] ^= std::byte{1} << bit;
    }
  }
  EXPECT_TRUE(DecodeRecordHeader(bytes).ok());
}

TEST(Record, AHeaderWithTheNameOfOtherTokensIsRefusedAlthoughItsChecksumHolds) {
  RecordHeader record = SomeRecord(64);
  record.page.tokens[5] ^= 1;
  std::vector<std::byte> bytes(kRecordHeaderBytes);
  EncodeRecordHeader(record, bytes);
  EXPECT_EQ(DecodeRecordHeader(bytes).status().code(), StatusCode::kDataLoss);
}

TEST(Record, CopyingAndSummingIsCopyingThenSumming) {
  for (const std::size_t size : {1, 4096, 16384, 16385, 50000}) {
    const std::vector<std::byte> from = TestKv(TestPage(1).context, size);
    std::vector<std::byte> to(PayloadBytes(size), std::byte{7});
    const Checksum sum = CopyAndSum(from, to);
    EXPECT_TRUE(std::equal(from.begin(), from.end(), to.begin()));
    EXPECT_EQ(std::count(to.begin() + static_cast<std::ptrdiff_t>(size), to.end(), std::byte{0}),
              static_cast<std::ptrdiff_t>(to.size() - size));
    EXPECT_EQ(sum, ChecksumOf(to));
  }
}

TEST(Record, LabelsAreCut) {
  RecordHeader record = SomeRecord(64);
  record.page.source = std::string(1000, 's');
  std::vector<std::byte> bytes(kRecordHeaderBytes);
  EncodeRecordHeader(record, bytes);
  const auto decoded = DecodeRecordHeader(bytes);
  ASSERT_TRUE(decoded.ok());
  EXPECT_EQ(decoded->page.source, std::string(kMaxLabelBytes, 's'));
}

TEST(Record, LabelsAreCutBetweenCharacters) {
  for (const std::string character : {"s", "\u00e9", "\u20ac", "\U0001f600"}) {
    for (std::size_t ahead = 0; ahead < 4; ++ahead) {
      RecordHeader record = SomeRecord(64);
      record.page.session = std::string(ahead, 'x');
      while (record.page.session.size() < 200) record.page.session += character;
      std::vector<std::byte> bytes(kRecordHeaderBytes);
      EncodeRecordHeader(record, bytes);
      const auto decoded = DecodeRecordHeader(bytes);
      ASSERT_TRUE(decoded.ok());
      const std::string& kept = decoded->page.session;
      EXPECT_EQ(kept, record.page.session.substr(0, kept.size()));
      EXPECT_EQ((kept.size() - ahead) % character.size(), 0u);
      EXPECT_GT(kept.size() + character.size(), kMaxLabelBytes);
    }
  }
}

TEST(Record, IndexValueRoundTrip) {
  for (const std::size_t tokens : {1, 7, 64}) {
    const IndexValue value = {.slot = 7, .generation = 8, .last_used = 9, .page = TestPartialPage(3, tokens)};
    const std::string text = EncodeIndexValue(value);
    const auto decoded = DecodeIndexValue(KeyOf(value.page.context), text);
    ASSERT_TRUE(decoded.ok()) << decoded.status().message();
    EXPECT_EQ(decoded->slot, 7u);
    EXPECT_EQ(decoded->generation, 8u);
    EXPECT_EQ(decoded->last_used, 9u);
    EXPECT_TRUE(SamePage(decoded->page, value.page));
    for (std::size_t size = 0; size < text.size(); ++size) {
      ASSERT_FALSE(DecodeIndexValue(KeyOf(value.page.context), text.substr(0, size)).ok()) << size;
    }
    EXPECT_FALSE(DecodeIndexValue(KeyOf(value.page.context), text + "x").ok());
    EXPECT_FALSE(DecodeIndexValue(KeyOf(value.page.parent), text).ok());
  }
}

}  // namespace
}  // namespace kvshare::agentd

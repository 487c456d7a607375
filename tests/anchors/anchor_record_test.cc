// Saved anchors: what comes back is what was written, to the bit, and nothing else comes back at all.
#include "anchors/anchor_record.h"

#include <gtest/gtest.h>

#include <cstring>

#include "tests/anchors/anchor_samples.h"

namespace kvshare::anchors {
namespace {

Anchor Sample() {
  AnchorPool pool;
  TeachSamples(&pool, 0, 4);
  return pool.Snapshot().front();
}

std::vector<ListedAnchor> SampleList() {
  return {{.serial = 1, .version = 7, .used = 2, .bytes = 100, .checksum = ScopeOf("a")},
          {.serial = 5, .version = 6, .used = 0, .bytes = 90, .checksum = ScopeOf("b")}};
}

TEST(AnchorRecordTest, ComesBackToTheBit) {
  Anchor anchor = Sample();
  const std::vector<std::byte> bytes = EncodeAnchor(anchor, SampleOwner());
  EXPECT_EQ(bytes.size(), AnchorRecordBytes(anchor));
  Anchor read;
  ASSERT_EQ(DecodeAnchor(bytes, SampleOwner(), &read), AnchorFault::kNone);
  anchor.used = 0;  // the list has it
  EXPECT_EQ(Describe(read), Describe(anchor));
}

// One more agent than a record holds: whoever taught last is there, as many as fit with it.
TEST(AnchorRecordTest, APoolKeepsNoMoreAgentsThanARecordHolds) {
  AnchorPool pool;
  const KvBlock base = SampleBlock(1, 1);
  const auto teach = [&](AnchorPool& to, std::size_t from, std::size_t agents) {
    for (std::size_t i = from; i < from + agents; ++i) {
      to.Register("slot", "agent" + std::to_string(i), "text", RowsOf(base), RowsOf(base));
    }
  };
  teach(pool, 0, kMaxAnchorAgents + 1);
  const auto expect_full = [&] {
    const Anchor anchor = pool.Snapshot().front();
    EXPECT_EQ(anchor.offsets.size(), kMaxAnchorAgents);
    EXPECT_TRUE(anchor.offsets.contains("agent" + std::to_string(kMaxAnchorAgents)));
    EXPECT_EQ(pool.bytes(), anchor.bytes());
    Anchor read;
    EXPECT_EQ(DecodeAnchor(EncodeAnchor(anchor, SampleOwner()), SampleOwner(), &read), AnchorFault::kNone);
  };
  expect_full();
  AnchorPool earlier;
  teach(earlier, 2 * kMaxAnchorAgents, 3);
  pool.Restore(earlier.Snapshot());
  expect_full();
}

TEST(AnchorRecordTest, EveryFlippedBitIsNoticed) {
  const AnchorOwner owner = SampleOwner();
  std::vector<std::byte> record = EncodeAnchor(Sample(), owner), list = EncodeAnchorList(SampleList(), owner);
  for (std::vector<std::byte>* bytes : {&record, &list}) {
    for (std::size_t i = 0; i < bytes->size() * 8; ++i) {
      const std::byte bit{static_cast<unsigned char>(1u << (i % 8))};
      (*bytes)[i / 8] ^= bit;
      Anchor anchor;
      std::vector<ListedAnchor> listed;
      const AnchorFault fault =
          bytes == &record ? DecodeAnchor(*bytes, owner, &anchor) : DecodeAnchorList(*bytes, owner, &listed);
      ASSERT_TRUE(fault == AnchorFault::kDamaged || fault == AnchorFault::kOtherVersion) << "bit " << i;
      ASSERT_EQ(anchor.base, nullptr);
      (*bytes)[i / 8] ^= bit;
    }
  }
}

TEST(AnchorRecordTest, NoPieceOfARecordIsOne) {
  const AnchorOwner owner = SampleOwner();
  const std::vector<std::byte> record = EncodeAnchor(Sample(), owner), list = EncodeAnchorList(SampleList(), owner);
  Anchor anchor;
  std::vector<ListedAnchor> listed;
  for (std::size_t size = 0; size < record.size(); ++size) {
    ASSERT_EQ(DecodeAnchor(std::span(record).first(size), owner, &anchor), AnchorFault::kDamaged) << size;
  }
  for (std::size_t size = 0; size < list.size(); ++size) {
    ASSERT_EQ(DecodeAnchorList(std::span(list).first(size), owner, &listed), AnchorFault::kDamaged) << size;
  }
  EXPECT_EQ(DecodeAnchor(list, owner, &anchor), AnchorFault::kDamaged);
  EXPECT_EQ(DecodeAnchorList(record, owner, &listed), AnchorFault::kDamaged);
}

TEST(AnchorRecordTest, StrangersGetAReason) {
  const std::vector<std::byte> record = EncodeAnchor(Sample(), SampleOwner());
  const std::vector<std::byte> list = EncodeAnchorList(SampleList(), SampleOwner());
  AnchorOwner narrow = SampleOwner(), deep = SampleOwner();
  narrow.width = 2;
  deep.layers = 4;
  Anchor anchor;
  std::vector<ListedAnchor> listed;
  for (const auto& [owner, fault] :
       {std::pair(SampleOwner("t"), AnchorFault::kOtherScope),
        std::pair(SampleOwner("s", "other weights"), AnchorFault::kOtherSpace),
        std::pair(narrow, AnchorFault::kOtherSpace), std::pair(deep, AnchorFault::kOtherSpace)}) {
    EXPECT_EQ(DecodeAnchor(record, owner, &anchor), fault);
    EXPECT_EQ(DecodeAnchorList(list, owner, &listed), fault);
  }
  EXPECT_EQ(anchor.base, nullptr);
  EXPECT_TRUE(listed.empty());
}

// A right checksum over wrong counts: bounds are what is left.
TEST(AnchorRecordTest, BoundsHoldUnderARightChecksum) {
  const AnchorOwner owner = SampleOwner();
  const auto sealed = [](std::vector<std::byte> bytes, std::size_t at, std::uint64_t value) {
    std::memcpy(bytes.data() + at, &value, sizeof value);
    const Digest sum = PlainSha256(std::span(bytes).first(bytes.size() - sizeof(Digest)));
    std::memcpy(bytes.data() + bytes.size() - sizeof sum, &sum, sizeof sum);
    return bytes;
  };
  constexpr std::size_t kAfterBeginning = 88;
  Anchor anchor;
  const std::vector<std::byte> record = EncodeAnchor(Sample(), owner);
  for (const std::uint64_t tokens : {std::uint64_t{0}, std::uint64_t{7}, std::uint64_t{1} << 24, ~std::uint64_t{0}}) {
    EXPECT_EQ(DecodeAnchor(sealed(record, kAfterBeginning + 16, tokens), owner, &anchor), AnchorFault::kDamaged);
    EXPECT_EQ(DecodeAnchor(sealed(record, kAfterBeginning + 24, tokens), owner, &anchor), AnchorFault::kDamaged);
  }
  // A scale that is no number: that of the record's last block.
  EXPECT_EQ(DecodeAnchor(sealed(record, record.size() - sizeof(Digest) - sizeof(Q8Block), 0x7fc0), owner, &anchor),
            AnchorFault::kDamaged);
  std::vector<ListedAnchor> listed;
  const std::vector<std::byte> list = EncodeAnchorList(SampleList(), owner);
  for (const std::uint64_t count : {std::uint64_t{1}, std::uint64_t{3}, ~std::uint64_t{0}}) {
    EXPECT_EQ(DecodeAnchorList(sealed(list, kAfterBeginning, count), owner, &listed), AnchorFault::kDamaged);
  }
  // Serials that do not ascend.
  EXPECT_EQ(DecodeAnchorList(sealed(list, kAfterBeginning + 8, 5), owner, &listed), AnchorFault::kDamaged);
  EXPECT_EQ(DecodeAnchorList(list, owner, &listed), AnchorFault::kNone);
  EXPECT_EQ(listed.size(), 2u);
}

}  // namespace
}  // namespace kvshare::anchors

// What the guards have learnt, saved: it comes back whole for the model it was learnt with, or not at all.
#include "anchors/guard_record.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "tests/anchors/anchor_samples.h"

namespace kvshare::anchors {
namespace {

Guard Taught(std::uint32_t seed, int answers) {
  Guard guard({.margin = 3, .doubts = 0.6});
  std::mt19937 rng(seed);
  std::exponential_distribution<double> margin(1.5);
  for (int i = 0; i < answers; ++i) {
    const double seen = margin(rng);
    guard.Answered(i % 9 == 0 ? std::numeric_limits<double>::infinity() : seen);
    guard.Audited(seen, i % 40 == 0 ? 0.2 : 0.01);
  }
  return guard;
}

GuardStates Sample() { return {Taught(1, 30).Snapshot(), Taught(2, 700).Snapshot()}; }

const Digest kSpace = SampleOwner().space;

TEST(GuardRecordTest, AGuardGoesOnWhereAnotherStopped) {
  for (const int answers : {0, 1, 30, 64, 100, 700}) {
    Guard before = Taught(5, answers);
    const GuardStates written = {before.Snapshot(), Guard::State()};
    const std::vector<std::byte> bytes = EncodeGuards(written, kSpace);
    EXPECT_LE(bytes.size(), static_cast<std::size_t>(kMaxGuardRecordBytes));
    GuardStates read;
    ASSERT_EQ(DecodeGuards(bytes, kSpace, &read), AnchorFault::kNone);
    EXPECT_EQ(EncodeGuards(read, kSpace), bytes);
    Guard after({.margin = 3, .doubts = 0.6});
    after.Restore(read[0]);
    std::mt19937 rng(6);
    std::exponential_distribution<double> margin(1.5);
    for (int i = 0; i < 600; ++i) {
      ASSERT_EQ(after.margin(), before.margin()) << answers << " answers, " << i << " later";
      ASSERT_EQ(after.DoubtRate(), before.DoubtRate());
      const double seen = margin(rng);
      for (Guard* guard : {&before, &after}) {
        guard->Answered(seen);
        guard->Audited(seen, i % 50 == 0 ? 1.0 : 0.001);
      }
    }
  }
}

TEST(GuardRecordTest, EveryFlippedBitAndEveryCutIsNoticed) {
  std::vector<std::byte> bytes = EncodeGuards({Taught(1, 5).Snapshot(), Taught(2, 7).Snapshot()}, kSpace);
  GuardStates read;
  for (std::size_t i = 0; i < bytes.size() * 8; ++i) {
    const std::byte bit{static_cast<unsigned char>(1u << (i % 8))};
    bytes[i / 8] ^= bit;
    ASSERT_NE(DecodeGuards(bytes, kSpace, &read), AnchorFault::kNone) << i;
    bytes[i / 8] ^= bit;
  }
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    ASSERT_NE(DecodeGuards(std::span(bytes).first(size), kSpace, &read), AnchorFault::kNone) << size;
  }
  bytes.push_back(std::byte{0});
  EXPECT_EQ(DecodeGuards(bytes, kSpace, &read), AnchorFault::kDamaged);
}

TEST(GuardRecordTest, AnotherModelsKnowledgeIsNotUsed) {
  const std::vector<std::byte> bytes = EncodeGuards(Sample(), kSpace);
  GuardStates read;
  EXPECT_EQ(DecodeGuards(bytes, ScopeOf("another model"), &read), AnchorFault::kOtherSpace);
}

// A right checksum does not make nonsense sense.
TEST(GuardRecordTest, NonsenseWithARightChecksumIsDamage) {
  const auto decode = [](const GuardStates& guards) {
    GuardStates read;
    return DecodeGuards(EncodeGuards(guards, kSpace), kSpace, &read);
  };
  ASSERT_EQ(decode(Sample()), AnchorFault::kNone);
  GuardStates nan = Sample(), negative = Sample(), quantile = Sample();
  nan[0].least[3] = std::nan("");
  negative[1].audits[5].margin = -1;
  quantile[1].quantile = std::nan("");
  for (const GuardStates& guards : {nan, negative, quantile}) EXPECT_EQ(decode(guards), AnchorFault::kDamaged);

  // A count that the bytes do not hold.
  std::vector<std::byte> bytes = EncodeGuards({Guard::State(), Guard::State()}, kSpace);
  const std::uint64_t many = std::uint64_t{1} << 61;
  std::memcpy(bytes.data() + 8 + 8 + sizeof(Digest) + 8, &many, sizeof many);
  const Digest sum = PlainSha256(std::span(bytes).first(bytes.size() - sizeof(Digest)));
  std::memcpy(bytes.data() + bytes.size() - sizeof(Digest), &sum, sizeof sum);
  GuardStates read;
  EXPECT_EQ(DecodeGuards(bytes, kSpace, &read), AnchorFault::kDamaged);
}

}  // namespace
}  // namespace kvshare::anchors

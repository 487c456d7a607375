// What is learned of classes of blocks, where the right answer is known.
#include "agentd/pool/reuse_statistics.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <deque>
#include <random>
#include <string>
#include <utility>

#include "gtest/gtest.h"

namespace kvshare::agentd {
namespace {

constexpr std::size_t kCapacity = 240;
constexpr std::uint64_t kSlotUses = kCapacity / ReuseStatistics::kSlotsPerTurnover;

std::uint32_t Seed() {
  const char* given = std::getenv("KVSHARE_TEST_SEED");
  return given == nullptr ? 20240607u : static_cast<std::uint32_t>(std::strtoul(given, nullptr, 10));
}

// Uses one at a time; each begins an interval of a class that ends so many slots later, or never.
class World {
 public:
  explicit World(std::span<const double> odds) : statistics(kCapacity, odds) {}

  ReuseStatistics::Interval Use(std::uint8_t klass, int ends_after) {
    statistics.Advance();
    const bool turned = ++uses_ % kSlotUses == 0;
    const ReuseStatistics::Interval interval = statistics.Begin(klass, 1);
    if (ends_after >= 0) due_.emplace_back(ends_after, interval);
    if (turned) Turn();
    return interval;
  }
  ReuseStatistics statistics;

 private:
  void Turn() {
    std::deque<std::pair<int, ReuseStatistics::Interval>> later;
    for (const auto& [slots, interval] : due_) {
      if (statistics.Age(interval) >= slots) {
        statistics.End(interval);
      } else {
        later.emplace_back(slots, interval);
      }
    }
    due_ = std::move(later);
  }

  std::uint64_t uses_ = 0;
  std::deque<std::pair<int, ReuseStatistics::Interval>> due_;
};

TEST(ReuseStatisticsTest, WithoutEvidenceTheOlderIsWorthLessAndTheOddsDecide) {
  const std::array<double, 3> odds = {1, 2, 0.5};
  World world(odds);
  const auto first = world.Use(0, -1);
  double last = world.statistics.Worth(first);
  EXPECT_GT(last, 0);
  EXPECT_GT(world.statistics.Worth(world.Use(1, -1)), last);
  EXPECT_LT(world.statistics.Worth(world.Use(2, -1)), last);
  EXPECT_EQ(world.statistics.Worth({}), 0);
  ReuseStatistics fresh(1u << 20, odds);
  const auto interval = fresh.Begin(0, 1);
  for (int age = 0; age < 300; ++age) {
    const double worth = fresh.Worth(interval);
    EXPECT_TRUE(age == 0 || worth <= last) << age;
    last = worth;
    for (std::uint64_t i = 0; i < (1u << 20) / ReuseStatistics::kSlotsPerTurnover; ++i) fresh.Advance();
  }
  EXPECT_EQ(fresh.Age(interval), ReuseStatistics::kMaxAge);
}

TEST(ReuseStatisticsTest, EvidenceOverrulesWhatWasAssumed) {
  const std::array<double, 2> odds = {0.1, 10};  // the wrong way round
  World world(odds);
  std::mt19937 rng(Seed());
  for (int i = 0; i < 20000; ++i) {
    const bool first = rng() % 2 == 0;
    world.Use(first ? 0 : 1, first && rng() % 4 > 0 ? 10 : -1);
  }
  const auto good = world.Use(0, -1), bad = world.Use(1, -1);
  EXPECT_GT(world.statistics.Worth(good), 20 * world.statistics.Worth(bad));
}

TEST(ReuseStatisticsTest, WhatComesBackAfterAWhileIsWorthMoreTheNearerThatIsAndNothingAfterwards) {
  const std::array<double, 1> odds = {1};
  World world(odds);
  std::mt19937 rng(Seed());
  for (int i = 0; i < 20000; ++i) world.Use(0, rng() % 2 == 0 ? 12 : -1);
  const auto interval = world.Use(0, -1);
  std::array<double, 20> worth{};
  for (int age = 0; age < 20; ++age) {
    while (world.statistics.Age(interval) < age) world.Use(0, rng() % 2 == 0 ? 12 : -1);
    worth[static_cast<std::size_t>(age)] = world.statistics.Worth(interval);
  }
  EXPECT_TRUE(std::is_sorted(worth.begin(), worth.begin() + 12));
  EXPECT_GT(worth[11], 3 * worth[0]);
  EXPECT_LT(worth[15], worth[0] / 10);
}

// Intervals that end with a constant chance a slot are worth that chance at every age: Gittins' index of a memoryless
// thing.
TEST(ReuseStatisticsTest, AConstantChanceIsFound) {
  const std::array<double, 2> odds = {1, 1};
  World world(odds);
  std::mt19937 rng(Seed());
  const std::array<double, 2> chance = {0.10, 0.02};
  for (int i = 0; i < 60000; ++i) {
    const auto klass = static_cast<std::uint8_t>(i % 2);
    std::exponential_distribution<double> slots(chance[klass]);
    world.Use(klass, static_cast<int>(std::ceil(slots(rng))));
  }
  for (std::uint8_t klass : {0, 1}) {
    EXPECT_NEAR(world.statistics.Worth(world.Use(klass, -1)), chance[klass], 0.3 * chance[klass]) << int{klass};
  }
}

}  // namespace
}  // namespace kvshare::agentd

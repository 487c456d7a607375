// When blocks are used again, learned while the pool runs: for each class of blocks, how likely a use is to follow and
// how soon, and from that what a block of a class and an age is worth keeping (docs/design/eviction.md).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvshare::agentd {

// Time is counted in block uses, in slots of 1/24 of a turnover (as many uses as the pool has blocks). An
// interval begins with a use of a block and ends with its next one, whether it was still stored then or not; how many
// intervals of a class and age went on and how many ended gives the odds of ending (Kaplan and Meier's estimate), with
// old evidence fading. Classes with little evidence are judged like all blocks together, times what was said of the
// class at construction; and without any evidence a next use is the less likely the longer it is in coming.
class ReuseStatistics {
 public:
  // An interval that runs. Its age in slots is what Age() says.
  struct Interval {
    std::uint64_t begin = 0;  // slot
    std::uint8_t klass = kNone;
    float weight = 0;
  };
  static constexpr std::uint8_t kNone = 255;
  static constexpr std::uint64_t kSlotsPerTurnover = 24;
  static constexpr int kMaxAge = 256;  // slots; longer intervals count as never ended

  // `capacity`: blocks in the pool. `odds`: by class, how much likelier its blocks are to be used again than others.
  ReuseStatistics(std::size_t capacity, std::span<const double> odds);

  // One block was used.
  void Advance();
  Interval Begin(std::uint8_t klass, float weight);
  void End(const Interval& interval);
  int Age(const Interval& interval) const;

  // The most uses per block and slot that keeping it for any time from now on is expected to bring.
  double Worth(const Interval& interval) const;

 private:
  static constexpr int kBins = 33;  // of ages: single slots up to 16, then four to the octave
  using Bins = std::array<double, kBins>;
  struct Class {
    double odds = 1;
    Bins ended{}, slots{};  // intervals that ended at an age, and slots that intervals spent there; by weight
    std::array<double, kMaxAge> running{};  // by slot of begin, modulo
    Bins worth{};
  };
  static int BinOf(int age);
  void TurnSlot();
  void Learn();

  std::uint64_t slot_uses_;
  std::uint64_t uses_ = 0;
  std::uint64_t slot_ = 0;
  double capacity_;
  double weight_ = 0;  // of all intervals begun
  std::array<std::uint8_t, kMaxAge> bin_of_{};
  Bins width_{};  // slots
  Bins assumed_{};
  Bins all_ended_{}, all_slots_{};
  std::vector<Class> classes_;
};

}  // namespace kvshare::agentd

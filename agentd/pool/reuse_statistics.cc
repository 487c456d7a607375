#include "agentd/pool/reuse_statistics.h"

#include <algorithm>
#include <cmath>

namespace kvshare::agentd {
namespace {

constexpr std::uint64_t kSlotsPerTurnover = ReuseStatistics::kSlotsPerTurnover;
constexpr std::uint64_t kLeastSlotUses = 16;  // a tiny pool learns at a bearable price
constexpr double kFade = 0.99;                // of evidence, per slot

// Before there is evidence: the chance that an interval ends within a slot, by its age in slots. Where something is
// known of shorter intervals it is carried on from there, and only ever downwards, so that without evidence of an age
// the order is that of LRU.
constexpr double kFirstChance = 0.0088;
constexpr double kFlatUntil = 30;
constexpr double kFalls = 1.44;

// How much evidence (see Learn) weighs as much as what is assumed.
constexpr double kAllEvidence = 0.64;
constexpr double kOddsEvidence = 0.05;
constexpr double kClassEvidence = 0.14;

}  // namespace

int ReuseStatistics::BinOf(int age) { return age < 16 ? age : 16 + static_cast<int>(std::log2(age / 16.0) * 4); }

ReuseStatistics::ReuseStatistics(std::size_t capacity, std::span<const double> odds)
    : slot_uses_(std::max<std::uint64_t>(kLeastSlotUses, capacity / kSlotsPerTurnover)),
      capacity_(static_cast<double>(slot_uses_ * kSlotsPerTurnover)) {
  for (int age = 0; age < kMaxAge; ++age) {
    bin_of_[static_cast<std::size_t>(age)] = static_cast<std::uint8_t>(BinOf(age));
    ++width_[bin_of_[static_cast<std::size_t>(age)]];
  }
  width_[0] = 0.5;  // a slot is half over when an interval begins, on average
  double begin = 0;
  for (std::size_t bin = 0; bin < kBins; ++bin) {
    assumed_[bin] = kFirstChance / std::pow(1 + (begin + width_[bin] / 2) / kFlatUntil, kFalls);
    begin += width_[bin];
  }
  classes_.resize(odds.size());
  for (std::size_t i = 0; i < odds.size(); ++i) classes_[i].odds = odds[i];
  Learn();
}

void ReuseStatistics::Advance() {
  if (++uses_ % slot_uses_ == 0) TurnSlot();
}

ReuseStatistics::Interval ReuseStatistics::Begin(std::uint8_t klass, float weight) {
  classes_[klass].running[slot_ % kMaxAge] += weight;
  classes_[klass].slots[0] += weight * width_[0];
  all_slots_[0] += weight * width_[0];
  weight_ += weight;
  return {.begin = slot_, .klass = klass, .weight = weight};
}

int ReuseStatistics::Age(const Interval& interval) const {
  return static_cast<int>(std::min<std::uint64_t>(kMaxAge, slot_ - interval.begin));
}

void ReuseStatistics::End(const Interval& interval) {
  const int age = Age(interval);
  if (interval.klass == kNone || age >= kMaxAge) return;
  Class& klass = classes_[interval.klass];
  klass.running[interval.begin % kMaxAge] -= interval.weight;
  const std::size_t bin = bin_of_[static_cast<std::size_t>(age)];
  klass.ended[bin] += interval.weight;
  all_ended_[bin] += interval.weight;
}

void ReuseStatistics::TurnSlot() {
  ++slot_;
  for (Class& klass : classes_) {
    klass.running[slot_ % kMaxAge] = 0;  // the oldest: never ended
    for (std::size_t age = 1; age < kMaxAge; ++age) {
      const double running = klass.running[(slot_ - age) % kMaxAge];
      klass.slots[bin_of_[age]] += running;
      all_slots_[bin_of_[age]] += running;
    }
    for (double& n : klass.ended) n *= kFade;
    for (double& n : klass.slots) n *= kFade;
  }
  for (double& n : all_ended_) n *= kFade;
  for (double& n : all_slots_) n *= kFade;
  Learn();
}

void ReuseStatistics::Learn() {
  // Evidence counts against what is assumed before it in intervals of average weight, a pool full of them for a slot.
  const double unit = uses_ == 0 ? 1 : capacity_ * weight_ / static_cast<double>(uses_);
  Bins all{};  // chance to end within a slot, at an age
  for (std::size_t bin = 0; bin < kBins; ++bin) {
    double assumed = assumed_[bin];
    if (bin > 0) assumed = std::min(assumed, all[bin - 1] * assumed_[bin] / assumed_[bin - 1]);
    all[bin] = (all_ended_[bin] + kAllEvidence * unit * assumed) / (all_slots_[bin] + kAllEvidence * unit);
  }
  for (Class& klass : classes_) {
    // First how much likelier than all others at any age, then where it differs from that at some.
    double ended = 0, expected = 0;
    for (std::size_t bin = 0; bin < kBins; ++bin) {
      ended += klass.ended[bin];
      expected += klass.slots[bin] * all[bin];
    }
    const double odds = (ended + kOddsEvidence * unit * klass.odds) / (expected + kOddsEvidence * unit);
    Bins stays{}, uses{}, slots{};  // for a block that reaches the bin's age
    for (std::size_t bin = 0; bin < kBins; ++bin) {
      const double chance =
          (klass.ended[bin] + kClassEvidence * unit * all[bin] * odds) / (klass.slots[bin] + kClassEvidence * unit);
      stays[bin] = std::exp(-chance * width_[bin]);
      uses[bin] = 1 - stays[bin];
      slots[bin] = chance > 1e-9 ? uses[bin] / chance : width_[bin];
    }
    for (std::size_t bin = 0; bin < kBins; ++bin) {
      double reached = 1, all_uses = 0, all_slots = 0, best = 0;
      for (std::size_t until = bin; until < kBins; ++until) {
        all_uses += reached * uses[until];
        all_slots += reached * slots[until];
        reached *= stays[until];
        best = std::max(best, all_uses / all_slots);
      }
      klass.worth[bin] = best;
    }
  }
}

double ReuseStatistics::Worth(const Interval& interval) const {
  if (interval.klass == kNone) return 0;
  return classes_[interval.klass].worth[bin_of_[static_cast<std::size_t>(std::min(Age(interval), kMaxAge - 1))]];
}

}  // namespace kvshare::agentd

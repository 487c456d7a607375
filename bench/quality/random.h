// The harness's own random numbers: the same seed gives the same run on every machine and standard library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

namespace kvshare::quality {

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}

  // Uniform in [0, n), n >= 1. The modulo's bias is below 2^-50 for the sizes used here.
  std::size_t Below(std::size_t n) { return static_cast<std::size_t>(engine_() % n); }
  // Uniform in [lo, hi].
  int Between(int lo, int hi) { return lo + static_cast<int>(Below(static_cast<std::size_t>(hi - lo + 1))); }
  // Uniform in [0, 1).
  double Unit() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  bool Chance(double p) { return Unit() < p; }

  template <typename T>
  const T& Choice(const std::vector<T>& items) {
    return items[Below(items.size())];
  }
  // Fisher-Yates.
  template <typename T>
  void Shuffle(std::vector<T>* items) {
    for (std::size_t i = items->size(); i > 1; --i) std::swap((*items)[i - 1], (*items)[Below(i)]);
  }
  // k different items in random order.
  template <typename T>
  std::vector<T> Sample(std::vector<T> items, std::size_t k) {
    Shuffle(&items);
    items.resize(k < items.size() ? k : items.size());
    return items;
  }

 private:
  std::mt19937_64 engine_;  // its output is fixed by the C++ standard
};

}  // namespace kvshare::quality

// Seeds for fuzz targets whose inputs have a shape that chance does not find: an empty corpus starts from these, so
// that `target -max_total_time=60` needs no files.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

namespace kvshare::fuzz {

// One input in a hundred, and every input of almost nothing, starts over from a seed; the rest is libFuzzer's own.
inline std::size_t MutateFromSeeds(const std::vector<std::string>& seeds, std::uint8_t* data, std::size_t size,
                                   std::size_t max_size, unsigned random) {
  if (size < 4 || random % 100 == 0) {
    const std::string& seed = seeds[random / 100 % seeds.size()];
    size = std::min(seed.size(), max_size);
    std::memcpy(data, seed.data(), size);
  }
  return LLVMFuzzerMutate(data, size, max_size);
}

}  // namespace kvshare::fuzz

// Defines the target's mutator; `make_seeds()` gives std::vector<std::string>.
#define KVS_FUZZ_SEEDS(make_seeds)                                                                           \
  extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size, \
                                                 unsigned random) {                                          \
    static const std::vector<std::string> seeds = make_seeds();                                              \
    return kvshare::fuzz::MutateFromSeeds(seeds, data, size, max_size, random);                              \
  }

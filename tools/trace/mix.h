// 64-bit mixing for made-up content: the same numbers on every machine, in every run.
#pragma once

#include <cstdint>
#include <string_view>

namespace kvshare::trace {

// FNV-1a of the bytes.
constexpr std::uint64_t HashText(std::string_view text) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

// SplitMix64's finaliser over a + (b + 1) * 2^64/phi (Steele, Lea, Flood 2014).
constexpr std::uint64_t Mix(std::uint64_t a, std::uint64_t b) {
  std::uint64_t z = a + (b + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

}  // namespace kvshare::trace

#include "agentd/repair/order.h"

#include <algorithm>
#include <cstddef>

namespace kvshare::agentd {
namespace {

// FNV-1a over whole tokens.
std::uint64_t FingerprintOf(std::span<const TokenId> phrase) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const TokenId token : phrase) hash = (hash ^ static_cast<std::uint32_t>(token)) * 0x100000001b3u;
  return hash;
}

}  // namespace

FirstPlaces::FirstPlaces(std::span<const TokenId> prompt) : prompt_(prompt) {
  constexpr auto kLength = static_cast<std::size_t>(kPhrase);
  const auto phrases = prompt.first(prompt.size() - std::min(prompt.size(), static_cast<std::size_t>(kHeader)));
  first_.reserve(phrases.size());
  for (std::size_t i = 0; i + kLength <= phrases.size(); ++i) {
    first_.try_emplace(FingerprintOf(phrases.subspan(i, kLength)), static_cast<std::int64_t>(i));
  }
}

FirstPlaces::Seen FirstPlaces::SeenIn(std::span<const TokenId> there, std::int64_t role) const {
  constexpr auto kLength = static_cast<std::size_t>(kPhrase);
  Seen seen{.latest = std::vector<std::int64_t>(there.size() + 1, -1),
            .known = std::vector<std::int64_t>(there.size() + 1, role)};
  for (std::size_t b = kLength; b <= there.size(); ++b) {
    const auto end = static_cast<std::int64_t>(b);
    const auto phrase = there.subspan(b - kLength, kLength);
    seen.latest[b] = seen.latest[b - 1];
    seen.known[b] = seen.known[b - 1];
    const auto found = first_.find(FingerprintOf(phrase));
    if (found != first_.end()) {
      const auto here = prompt_.subspan(static_cast<std::size_t>(found->second), kLength);
      if (std::equal(phrase.begin(), phrase.end(), here.begin())) {
        seen.latest[b] = std::max(seen.latest[b], found->second);
        seen.known[b] = std::max(seen.known[b], end);
      }
    }
    // The last tokens may yet be in a phrase that goes on.
    if (end - seen.known[b] >= UnknownAtMost(seen.known[b], role) + kPhrase) seen.latest[b] = kNowhere;
  }
  return seen;
}

bool FirstPlaces::SawOther(const Seen& seen, std::span<const TokenId> there, std::int64_t base, std::int64_t start,
                           std::int64_t end) const {
  const auto b = static_cast<std::size_t>(base);
  if (seen.latest[b] >= end) return true;
  // What the two share right before it is a phrase with its first tokens, which here stands where it does.
  const std::int64_t known = seen.known[b];
  std::int64_t unknown = base;
  for (std::int64_t here = start; unknown > known && here > 0; --unknown, --here) {
    if (there[static_cast<std::size_t>(unknown - 1)] != prompt_[static_cast<std::size_t>(here - 1)]) break;
  }
  return unknown - known > UnknownAtMost(known, /*role=*/seen.known.front());
}

}  // namespace kvshare::agentd

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

FirstPlaces::FirstPlaces(std::span<const TokenId> prompt)
    : prompt_(prompt.first(prompt.size() - std::min(prompt.size(), static_cast<std::size_t>(kHeader)))) {
  constexpr auto kLength = static_cast<std::size_t>(kPhrase);
  first_.reserve(prompt_.size());
  for (std::size_t i = 0; i + kLength <= prompt_.size(); ++i) {
    first_.try_emplace(FingerprintOf(prompt_.subspan(i, kLength)), static_cast<std::int64_t>(i));
  }
}

std::vector<std::int64_t> FirstPlaces::LatestSeen(std::span<const TokenId> there, std::int64_t role) const {
  constexpr auto kLength = static_cast<std::size_t>(kPhrase);
  std::vector<std::int64_t> latest(there.size() + 1, -1);
  std::int64_t known = role;  // what is before is the role, in a phrase of the prompt, or too little to count
  for (std::size_t b = kLength; b <= there.size(); ++b) {
    const auto end = static_cast<std::int64_t>(b);
    const auto phrase = there.subspan(b - kLength, kLength);
    latest[b] = latest[b - 1];
    const auto found = first_.find(FingerprintOf(phrase));
    if (found != first_.end()) {
      const auto here = prompt_.subspan(static_cast<std::size_t>(found->second), kLength);
      if (std::equal(phrase.begin(), phrase.end(), here.begin())) {
        latest[b] = std::max(latest[b], found->second);
        known = std::max(known, end);
      }
    }
    // The last tokens may yet be in a phrase that goes on.
    if (end - known >= kUnknown + kPhrase) latest[b] = kNowhere;
  }
  return latest;
}

}  // namespace kvshare::agentd

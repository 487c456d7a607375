#include "agentd/pool/chunk_finder.h"

#include <algorithm>

namespace kvshare::agentd {
namespace {

constexpr std::uint64_t kModulus = (std::uint64_t{1} << 61) - 1;

std::uint64_t Reduce(std::uint64_t x) {
  x = (x & kModulus) + (x >> 61);
  return x >= kModulus ? x - kModulus : x;
}

std::uint64_t Multiply(std::uint64_t a, std::uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return Reduce((static_cast<std::uint64_t>(product) & kModulus) + static_cast<std::uint64_t>(product >> 61));
}

std::uint64_t Subtract(std::uint64_t a, std::uint64_t b) { return a >= b ? a - b : a + kModulus - b; }

// SplitMix64: one seed to several values that look unrelated.
std::uint64_t Mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

std::uint64_t Append(std::uint64_t fingerprint, TokenId token, std::uint64_t base, std::uint64_t offset) {
  return Reduce(Multiply(fingerprint, base) + Reduce(static_cast<std::uint32_t>(token) + offset));
}

}  // namespace

ChunkFinder::ChunkFinder(std::uint64_t seed)
    : base_(Mix(seed) % (kModulus - 1000) + 500), offset_(Mix(seed + 1) % (kModulus >> 1)) {}

std::uint64_t ChunkFinder::Fingerprint(std::span<const TokenId> tokens) const {
  std::uint64_t fingerprint = 0;
  for (TokenId token : tokens) fingerprint = Append(fingerprint, token, base_, offset_);
  return fingerprint;
}

bool ChunkFinder::Add(ChunkId chunk, std::span<const TokenId> tokens) {
  if (tokens.size() < kWindow) return false;
  std::vector<Candidate>& same_start = by_start_[Fingerprint(tokens.first(kWindow))];
  if (same_start.size() == kMaxSameStart) return false;
  same_start.push_back(
      {.fingerprint = Fingerprint(tokens), .length = static_cast<std::int64_t>(tokens.size()), .chunk = chunk});
  ++size_;
  return true;
}

void ChunkFinder::Remove(ChunkId chunk, std::span<const TokenId> tokens) {
  if (tokens.size() < kWindow) return;
  const auto it = by_start_.find(Fingerprint(tokens.first(kWindow)));
  if (it == by_start_.end()) return;
  size_ -= std::erase_if(it->second, [chunk](const Candidate& candidate) { return candidate.chunk == chunk; });
  if (it->second.empty()) by_start_.erase(it);
}

std::vector<ChunkFinder::Span> ChunkFinder::Find(
    std::span<const TokenId> prompt, const std::function<std::span<const TokenId>(ChunkId)>& tokens_of) const {
  std::vector<Span> found;
  if (by_start_.empty() || prompt.size() < kWindow) return found;
  // Of the first i tokens; the fingerprint of any stretch follows from two of them.
  std::vector<std::uint64_t> prefix(prompt.size() + 1), power(prompt.size() + 1);
  power[0] = 1;
  for (std::size_t i = 0; i < prompt.size(); ++i) {
    prefix[i + 1] = Append(prefix[i], prompt[i], base_, offset_);
    power[i + 1] = Multiply(power[i], base_);
  }
  const auto stretch = [&](std::size_t start, std::size_t length) {
    return Subtract(prefix[start + length], Multiply(prefix[start], power[length]));
  };
  std::vector<Span> candidates;
  for (std::size_t start = 0; start + kWindow <= prompt.size(); ++start) {
    const auto same_start = by_start_.find(stretch(start, kWindow));
    if (same_start == by_start_.end()) continue;
    for (const Candidate& candidate : same_start->second) {
      const auto length = static_cast<std::size_t>(candidate.length);
      if (start + length > prompt.size() || stretch(start, length) != candidate.fingerprint) continue;
      candidates.push_back(
          {.start = static_cast<std::int64_t>(start), .length = candidate.length, .chunk = candidate.chunk});
    }
  }
  std::sort(candidates.begin(), candidates.end(), [](const Span& a, const Span& b) {
    return a.length != b.length ? a.length > b.length : a.start != b.start ? a.start < b.start : a.chunk < b.chunk;
  });
  // What is taken is never shorter than what comes later, so an overlap shows at one of the later one's ends.
  std::vector<bool> taken(prompt.size());
  for (const Span& span : candidates) {
    const auto start = static_cast<std::size_t>(span.start), length = static_cast<std::size_t>(span.length);
    if (taken[start] || taken[start + length - 1]) continue;
    const std::span<const TokenId> tokens = tokens_of(span.chunk);
    if (!std::equal(tokens.begin(), tokens.end(), prompt.begin() + span.start,
                    prompt.begin() + span.start + span.length)) {
      continue;
    }
    std::fill_n(taken.begin() + span.start, span.length, true);
    found.push_back(span);
  }
  std::sort(found.begin(), found.end(), [](const Span& a, const Span& b) { return a.start < b.start; });
  return found;
}

}  // namespace kvshare::agentd

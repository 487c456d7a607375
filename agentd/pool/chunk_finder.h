// ChunkFinder: where known pieces of text stand in a prompt, at any offset. A rolling fingerprint leads to candidates;
// only a comparison of all tokens makes one count.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <unordered_map>
#include <vector>

#include "kvshare/types.h"

namespace kvshare::agentd {

// Polynomial fingerprints modulo 2^61 - 1, over the first kWindow tokens of a chunk and over all of it. `seed` decides
// the polynomial; where others choose the tokens, let it be random, so that nobody can make fingerprints collide.
// Answers do not depend on it. One thread.
class ChunkFinder {
 public:
  using ChunkId = std::uint32_t;
  static constexpr std::size_t kWindow = 32;
  // Chunks that begin with the same window; more are not taken, so that no position costs more than this.
  static constexpr std::size_t kMaxSameStart = 64;

  explicit ChunkFinder(std::uint64_t seed);

  // Returns whether the chunk was taken: it has at least kWindow tokens, and there is room. Requires an unused id.
  bool Add(ChunkId chunk, std::span<const TokenId> tokens);
  // `tokens` as they were added. Of a chunk that was not taken, nothing happens.
  void Remove(ChunkId chunk, std::span<const TokenId> tokens);

  struct Span {
    std::int64_t start = 0;  // in the prompt
    std::int64_t length = 0;
    ChunkId chunk = 0;
    bool operator==(const Span&) const = default;
  };
  // Whole chunks that stand in `prompt`, none overlapping: the longest first, the leftmost of two of one length, then
  // by start. `tokens_of` gives a chunk's tokens. O(prompt), and O(m log m) for m candidates.
  std::vector<Span> Find(std::span<const TokenId> prompt,
                         const std::function<std::span<const TokenId>(ChunkId)>& tokens_of) const;

  std::size_t size() const { return size_; }

 private:
  struct Candidate {
    std::uint64_t fingerprint = 0;  // of all its tokens
    std::int64_t length = 0;
    ChunkId chunk = 0;
  };
  std::uint64_t Fingerprint(std::span<const TokenId> tokens) const;

  std::uint64_t base_;
  std::uint64_t offset_;                                                // keeps token 0 from being neutral
  std::unordered_map<std::uint64_t, std::vector<Candidate>> by_start_;  // fingerprint of the first window
  std::size_t size_ = 0;
};

}  // namespace kvshare::agentd

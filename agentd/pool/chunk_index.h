// ChunkIndex: where the KV of a piece of content stands, whatever stood before it. Exact prefixes are PrefixIndex's;
// this is for content that recurs elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <optional>
#include <span>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "agentd/pool/chunk_finder.h"
#include "agentd/pool/prefix_index.h"
#include "kvshare/status.h"
#include "kvshare/types.h"
#include "libkvshare/core/hash.h"

namespace kvshare::agentd {

// One place where the content's KV stands.
struct ChunkVariant {
  std::vector<PageIndex> pages;  // following each other; token t of the chunk lies at offset + t
  int offset = 0;                // of the first token on the first page, 0..63
  std::int64_t base = 0;         // position of the first token in the sequence that computed it
  Digest context;                // of all that preceded it there
  std::uint64_t scope = 0;       // the session that may use it
  std::uint32_t source = 0;      // the agent that stored it
  bool operator==(const ChunkVariant&) const = default;
};

// One content. Views are valid until the index changes.
struct ChunkView {
  Digest content;
  std::span<const TokenId> tokens;
  std::span<const ChunkVariant> variants;  // the oldest first, at most kMaxVariants
};

struct ChunkSpan {
  std::int64_t start = 0;  // in the prompt
  ChunkView chunk;
};

// One thread (the engine's). A variant lives as long as all its pages stay in the pool's index: give DropPage to
// KvPool::SetDropObserver. The least recently used contents go when there are more than `max_tokens` tokens of them.
// Invariants (CheckIntegrity): a content is found by its digest, its tokens are those that the digest names; it has
// 1..kMaxVariants variants, of different context or scope; each variant is found by each of its pages.
class ChunkIndex {
 public:
  static constexpr std::size_t kMaxVariants = 4;

  // `seed`: see ChunkFinder.
  ChunkIndex(std::size_t max_tokens, std::uint64_t seed);

  // A variant with the context and scope of an earlier one replaces it; a fifth one replaces the oldest.
  // InvalidArgument where pages and offset do not cover the tokens exactly, or tokens are fewer than
  // ChunkFinder::kWindow; ResourceExhausted where they alone are more than the index may hold.
  Status Add(std::span<const TokenId> tokens, ChunkVariant variant);

  // The content of exactly these tokens: the digest finds it, all tokens are compared.
  std::optional<ChunkView> Lookup(std::span<const TokenId> tokens);
  // Contents that stand in `prompt` at any offset, as ChunkFinder::Find chooses them. Counts as a use of them.
  std::vector<ChunkSpan> FindIn(std::span<const TokenId> prompt);

  // `page` no longer holds what it held: all variants on it go.
  void DropPage(PageIndex page);
  void Clear();

  std::size_t contents() const { return chunks_.size(); }
  std::size_t variants() const { return num_variants_; }
  std::size_t tokens() const { return num_tokens_; }

  // Internal naming the first broken invariant. With `index`, also that every variant's pages are stored there and hold
  // the chunk's tokens.
  Status CheckIntegrity(const PrefixIndex* index = nullptr) const;

 private:
  using ChunkId = ChunkFinder::ChunkId;
  struct Chunk {
    Digest content;
    std::vector<TokenId> tokens;
    std::vector<ChunkVariant> variants;
    std::list<ChunkId>::iterator recency;
  };
  ChunkView View(const Chunk& chunk) const { return {chunk.content, chunk.tokens, chunk.variants}; }
  const Chunk* Find(const Digest& content, std::span<const TokenId> tokens) const;
  void Use(Chunk& chunk) { recency_.splice(recency_.end(), recency_, chunk.recency); }
  void LinkPages(ChunkId id, const ChunkVariant& variant);
  // After variants of the chunk have gone: its pages' lists hold it no longer than they should.
  void UnlinkPages(ChunkId id, const std::vector<PageIndex>& pages);
  void Erase(ChunkId id);

  std::size_t max_tokens_;
  ChunkFinder finder_;
  std::unordered_map<ChunkId, Chunk> chunks_;
  std::unordered_map<Digest, ChunkId, DigestHash> by_content_;
  std::unordered_map<PageIndex, std::unordered_set<ChunkId>> by_page_;
  std::list<ChunkId> recency_;  // the least recently used first
  ChunkId next_id_ = 0;
  std::size_t num_tokens_ = 0;
  std::size_t num_variants_ = 0;
};

}  // namespace kvshare::agentd

#include "agentd/pool/chunk_index.h"

#include <algorithm>
#include <string>
#include <utility>

#include "libkvshare/core/check.h"

namespace kvshare::agentd {
namespace {

constexpr std::size_t kPage = static_cast<std::size_t>(kPageTokens);

bool Names(const ChunkVariant& variant, PageIndex page) {
  return std::find(variant.pages.begin(), variant.pages.end(), page) != variant.pages.end();
}

bool Covers(const ChunkVariant& variant, std::size_t tokens) {
  if (variant.offset < 0 || variant.offset >= kPageTokens) return false;
  const std::size_t end = static_cast<std::size_t>(variant.offset) + tokens;
  return variant.pages.size() == (end + kPage - 1) / kPage;
}

}  // namespace

ChunkIndex::ChunkIndex(std::size_t max_tokens, std::uint64_t seed) : max_tokens_(max_tokens), finder_(seed) {}

Status ChunkIndex::Add(std::span<const TokenId> tokens, ChunkVariant variant) {
  if (tokens.size() < ChunkFinder::kWindow) {
    return InvalidArgument("a chunk of " + std::to_string(tokens.size()) + " tokens; the shortest has " +
                           std::to_string(ChunkFinder::kWindow));
  }
  if (!Covers(variant, tokens.size())) return InvalidArgument("the chunk's pages do not cover its tokens");
  if (tokens.size() > max_tokens_) return ResourceExhausted("the chunk is larger than the index of chunks may be");
  const Digest content = ContentDigest(tokens);
  auto found = by_content_.find(content);
  if (found == by_content_.end()) {
    while (num_tokens_ + tokens.size() > max_tokens_) Erase(recency_.front());
    while (chunks_.contains(next_id_)) ++next_id_;  // wraps around once in 2^32
    const ChunkId id = next_id_++;
    Chunk& chunk = chunks_[id];
    chunk.content = content;
    chunk.tokens.assign(tokens.begin(), tokens.end());
    chunk.recency = recency_.insert(recency_.end(), id);
    num_tokens_ += tokens.size();
    finder_.Add(id, tokens);
    found = by_content_.emplace(content, id).first;
  }
  const ChunkId id = found->second;
  Chunk& chunk = chunks_.at(id);
  Use(chunk);
  auto& variants = chunk.variants;
  auto replaced = std::find_if(variants.begin(), variants.end(), [&](const ChunkVariant& other) {
    return other.context == variant.context && other.scope == variant.scope;
  });
  if (replaced == variants.end() && variants.size() == kMaxVariants) replaced = variants.begin();
  if (replaced != variants.end()) {
    const std::vector<PageIndex> pages = std::move(replaced->pages);
    variants.erase(replaced);
    --num_variants_;
    UnlinkPages(id, pages);
  }
  LinkPages(id, variant);
  variants.push_back(std::move(variant));
  ++num_variants_;
  return OkStatus();
}

const ChunkIndex::Chunk* ChunkIndex::Find(const Digest& content, std::span<const TokenId> tokens) const {
  const auto found = by_content_.find(content);
  if (found == by_content_.end()) return nullptr;
  const Chunk& chunk = chunks_.at(found->second);
  return std::equal(tokens.begin(), tokens.end(), chunk.tokens.begin(), chunk.tokens.end()) ? &chunk : nullptr;
}

std::optional<ChunkView> ChunkIndex::Lookup(std::span<const TokenId> tokens) {
  const Chunk* chunk = Find(ContentDigest(tokens), tokens);
  if (chunk == nullptr) return std::nullopt;
  recency_.splice(recency_.end(), recency_, chunk->recency);
  return View(*chunk);
}

std::vector<ChunkSpan> ChunkIndex::FindIn(std::span<const TokenId> prompt) {
  std::vector<ChunkSpan> spans;
  const auto tokens_of = [this](ChunkId id) { return std::span<const TokenId>(chunks_.at(id).tokens); };
  for (const ChunkFinder::Span& span : finder_.Find(prompt, tokens_of)) {
    Chunk& chunk = chunks_.at(span.chunk);
    Use(chunk);
    spans.push_back({.start = span.start, .chunk = View(chunk)});
  }
  return spans;
}

void ChunkIndex::DropPage(PageIndex page) {
  const auto on_page = by_page_.find(page);
  if (on_page == by_page_.end()) return;
  const std::vector<ChunkId> ids(on_page->second.begin(), on_page->second.end());
  for (ChunkId id : ids) {
    Chunk& chunk = chunks_.at(id);
    std::vector<PageIndex> pages;
    num_variants_ -= std::erase_if(chunk.variants, [&](const ChunkVariant& variant) {
      if (!Names(variant, page)) return false;
      pages.insert(pages.end(), variant.pages.begin(), variant.pages.end());
      return true;
    });
    UnlinkPages(id, pages);
    if (chunk.variants.empty()) Erase(id);
  }
}

void ChunkIndex::LinkPages(ChunkId id, const ChunkVariant& variant) {
  for (PageIndex page : variant.pages) by_page_[page].insert(id);
}

void ChunkIndex::UnlinkPages(ChunkId id, const std::vector<PageIndex>& pages) {
  const Chunk& chunk = chunks_.at(id);
  for (PageIndex page : pages) {
    const bool still = std::any_of(chunk.variants.begin(), chunk.variants.end(),
                                   [page](const ChunkVariant& variant) { return Names(variant, page); });
    const auto on_page = by_page_.find(page);
    if (still || on_page == by_page_.end()) continue;
    on_page->second.erase(id);
    if (on_page->second.empty()) by_page_.erase(on_page);
  }
}

void ChunkIndex::Erase(ChunkId id) {
  Chunk& chunk = chunks_.at(id);
  num_variants_ -= chunk.variants.size();
  const std::vector<ChunkVariant> variants = std::move(chunk.variants);
  chunk.variants.clear();
  for (const ChunkVariant& variant : variants) UnlinkPages(id, variant.pages);
  finder_.Remove(id, chunk.tokens);
  num_tokens_ -= chunk.tokens.size();
  by_content_.erase(chunk.content);
  recency_.erase(chunk.recency);
  chunks_.erase(id);
}

void ChunkIndex::Clear() {
  while (!recency_.empty()) Erase(recency_.front());
}

Status ChunkIndex::CheckIntegrity(const PrefixIndex* index) const {
  const auto broken = [](ChunkId id, const char* what) {
    return Internal("chunk index: chunk " + std::to_string(id) + ": " + what);
  };
  std::size_t tokens = 0, variants = 0;
  for (const auto& [id, chunk] : chunks_) {
    tokens += chunk.tokens.size();
    variants += chunk.variants.size();
    const auto named = by_content_.find(chunk.content);
    if (named == by_content_.end() || named->second != id) return broken(id, "is not found by its digest");
    if (ContentDigest(chunk.tokens) != chunk.content) return broken(id, "its digest is not that of its tokens");
    if (chunk.variants.empty() || chunk.variants.size() > kMaxVariants)
      return broken(id, "has too many variants, or none");
    if (chunk.recency == recency_.end() || *chunk.recency != id) return broken(id, "is lost in the order of use");
    for (const ChunkVariant& variant : chunk.variants) {
      if (!Covers(variant, chunk.tokens.size())) return broken(id, "a variant's pages do not cover it");
      const auto twins = std::count_if(chunk.variants.begin(), chunk.variants.end(), [&](const ChunkVariant& other) {
        return other.context == variant.context && other.scope == variant.scope;
      });
      if (twins != 1) return broken(id, "has two variants of one context and scope");
      for (PageIndex page : variant.pages) {
        const auto on_page = by_page_.find(page);
        if (on_page == by_page_.end() || !on_page->second.contains(id)) return broken(id, "is not found by a page");
      }
      if (index == nullptr) continue;
      for (std::size_t t = 0; t < chunk.tokens.size(); ++t) {
        const std::size_t at = static_cast<std::size_t>(variant.offset) + t;
        const PageIndex page = variant.pages[at / kPage];
        if (!index->Contains(page)) return broken(id, "names a page that is not stored");
        const auto held = index->Tokens(page);
        if (at % kPage >= held.size() || held[at % kPage] != chunk.tokens[t]) {
          return broken(id, "a page holds other tokens");
        }
      }
    }
  }
  for (const auto& [page, ids] : by_page_) {
    for (ChunkId id : ids) {
      const auto it = chunks_.find(id);
      if (it == chunks_.end()) return broken(id, "a page names it, and it is gone");
      const auto& all = it->second.variants;
      const PageIndex named = page;
      if (std::none_of(all.begin(), all.end(), [named](const ChunkVariant& v) { return Names(v, named); })) {
        return broken(id, "a page names it that it does not use");
      }
    }
  }
  if (tokens != num_tokens_ || tokens > max_tokens_) return Internal("chunk index: the count of tokens is wrong");
  if (variants != num_variants_) return Internal("chunk index: the count of variants is wrong");
  if (by_content_.size() != chunks_.size() || recency_.size() != chunks_.size()) {
    return Internal("chunk index: its tables are of different sizes");
  }
  return OkStatus();
}

}  // namespace kvshare::agentd

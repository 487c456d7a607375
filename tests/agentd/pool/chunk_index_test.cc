// Chunks by content and at any offset, against an oracle that compares every chunk with every position.
#include "agentd/pool/chunk_index.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "agentd/pool/kv_pool.h"
#include "gtest/gtest.h"

namespace kvshare::agentd {
namespace {

using Tokens = std::vector<TokenId>;

std::uint32_t Seed() {
  const char* given = std::getenv("KVSHARE_TEST_SEED");
  return given == nullptr ? 20240607u : static_cast<std::uint32_t>(std::strtoul(given, nullptr, 10));
}

Tokens Sequence(std::size_t n, TokenId start = 0) {
  Tokens tokens(n);
  for (std::size_t i = 0; i < n; ++i) tokens[i] = start + static_cast<TokenId>(i);
  return tokens;
}

Digest Context(int i) { return ContentDigest(Sequence(1, i)); }

ChunkVariant Variant(std::vector<PageIndex> pages, int offset = 0, int context = 0, std::uint64_t scope = 0) {
  ChunkVariant variant;
  variant.pages = std::move(pages);
  variant.offset = offset;
  variant.context = Context(context);
  variant.scope = scope;
  return variant;
}

void ExpectSound(const ChunkIndex& index, const PrefixIndex* pages = nullptr) {
  const Status status = index.CheckIntegrity(pages);
  ASSERT_TRUE(status.ok()) << status.message();
}

// The longest first, then the leftmost; every pair of chunk and position is compared.
std::vector<ChunkFinder::Span> Oracle(const Tokens& prompt, const std::map<ChunkFinder::ChunkId, Tokens>& chunks) {
  std::vector<ChunkFinder::Span> all, chosen;
  for (const auto& [id, chunk] : chunks) {
    for (std::size_t start = 0; start + chunk.size() <= prompt.size(); ++start) {
      if (std::equal(chunk.begin(), chunk.end(), prompt.begin() + static_cast<std::ptrdiff_t>(start))) {
        all.push_back({static_cast<std::int64_t>(start), static_cast<std::int64_t>(chunk.size()), id});
      }
    }
  }
  std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) {
    return a.length != b.length ? a.length > b.length : a.start != b.start ? a.start < b.start : a.chunk < b.chunk;
  });
  for (const auto& span : all) {
    const bool free = std::all_of(chosen.begin(), chosen.end(), [&](const auto& other) {
      return span.start >= other.start + other.length || other.start >= span.start + span.length;
    });
    if (free) chosen.push_back(span);
  }
  std::sort(chosen.begin(), chosen.end(), [](const auto& a, const auto& b) { return a.start < b.start; });
  return chosen;
}

TEST(ChunkFinderPropertyTest, FindsWhatComparingEveryPositionFinds) {
  std::size_t found = 0;
  for (std::uint32_t round = 0; round < 60; ++round) {
    SCOPED_TRACE("KVSHARE_TEST_SEED=" + std::to_string(Seed() + round));
    std::mt19937 rng(Seed() + round);
    const auto uniform = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
    // One token, a few, or many: from everything overlapping to nothing.
    const int alphabet = std::vector<int>{1, 2, 3, 1000}[round % 4];
    Tokens text(static_cast<std::size_t>(uniform(100, 400)));
    for (TokenId& token : text) token = uniform(0, alphabet - 1);
    ChunkFinder finder(rng());
    std::map<ChunkFinder::ChunkId, Tokens> chunks;
    std::set<Tokens> distinct;
    for (ChunkFinder::ChunkId id = 0; id < 12; ++id) {
      const int length = uniform(20, 90), start = uniform(0, static_cast<int>(text.size()) - length);
      const Tokens chunk(text.begin() + start, text.begin() + start + length);
      const bool wanted = length >= static_cast<int>(ChunkFinder::kWindow);
      if (!distinct.insert(chunk).second) continue;
      EXPECT_EQ(finder.Add(id, chunk), wanted);
      if (wanted) chunks[id] = chunk;
    }
    for (auto it = chunks.begin(); it != chunks.end();) {
      if (uniform(0, 3) > 0) {
        ++it;
        continue;
      }
      finder.Remove(it->first, it->second);
      it = chunks.erase(it);
    }
    EXPECT_EQ(finder.size(), chunks.size());
    Tokens prompt;
    while (prompt.size() < 600) {
      const int start = uniform(0, static_cast<int>(text.size()) - 1);
      const int length = uniform(1, static_cast<int>(text.size()) - start);
      prompt.insert(prompt.end(), text.begin() + start, text.begin() + start + length);
      if (uniform(0, 1) == 0) prompt.push_back(uniform(0, alphabet - 1));
    }
    const auto spans =
        finder.Find(prompt, [&](ChunkFinder::ChunkId id) { return std::span<const TokenId>(chunks.at(id)); });
    EXPECT_EQ(spans, Oracle(prompt, chunks));
    found += spans.size();
  }
  EXPECT_GT(found, 100u);
}

TEST(ChunkFinderTest, NegativeIdsAndTheEndsOfPromptsAreNoExceptions) {
  ChunkFinder finder(1);
  Tokens chunk = Sequence(40, -20);
  chunk[3] = -2147483647 - 1;
  chunk[4] = 2147483647;
  ASSERT_TRUE(finder.Add(9, chunk));
  const auto tokens_of = [&](ChunkFinder::ChunkId) { return std::span<const TokenId>(chunk); };
  EXPECT_EQ(finder.Find(chunk, tokens_of), (std::vector<ChunkFinder::Span>{{0, 40, 9}}));
  EXPECT_TRUE(finder.Find(std::span(chunk).first(39), tokens_of).empty());
  EXPECT_TRUE(finder.Find({}, tokens_of).empty());
}

TEST(ChunkFinderTest, TheChunksOfOneBeginningAreBounded) {
  ChunkFinder finder(1);
  for (ChunkFinder::ChunkId id = 0; id < ChunkFinder::kMaxSameStart + 5; ++id) {
    EXPECT_EQ(finder.Add(id, Sequence(ChunkFinder::kWindow + id)), id < ChunkFinder::kMaxSameStart);
  }
}

TEST(ChunkIndexTest, KeepsUpToFourVariantsOfAContent) {
  ChunkIndex index(1000, 1);
  const Tokens tokens = Sequence(40);
  EXPECT_FALSE(index.Lookup(tokens).has_value());
  for (int i = 0; i < 6; ++i) {
    ASSERT_TRUE(index.Add(tokens, Variant({static_cast<PageIndex>(i)}, 3, i)).ok());
    ExpectSound(index);
  }
  ASSERT_EQ(index.Lookup(tokens)->variants.size(), 4u);
  EXPECT_EQ(index.Lookup(tokens)->variants[0], Variant({2}, 3, 2));
  // The same context and scope: the newer one counts. Another scope is another variant.
  ASSERT_TRUE(index.Add(tokens, Variant({70}, 3, 4)).ok());
  EXPECT_EQ(index.variants(), 4u);
  EXPECT_EQ(index.Lookup(tokens)->variants[3], Variant({70}, 3, 4));
  ASSERT_TRUE(index.Add(tokens, Variant({71}, 3, 4, 9)).ok());
  EXPECT_EQ(index.Lookup(tokens)->variants[0], Variant({3}, 3, 3));
  ExpectSound(index);
  EXPECT_FALSE(index.Lookup(Sequence(40, 1)).has_value());
  EXPECT_FALSE(index.Lookup(Sequence(39)).has_value());
}

TEST(ChunkIndexTest, RefusesPagesThatDoNotCoverTheTokens) {
  ChunkIndex index(100, 1);
  EXPECT_EQ(index.Add(Sequence(31), Variant({1})).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(index.Add(Sequence(64), Variant({1}, 1)).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(index.Add(Sequence(64), Variant({1, 2})).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(index.Add(Sequence(64), Variant({1, 2}, 64)).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(index.Add(Sequence(64), Variant({1, 2}, -1)).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(index.Add(Sequence(101), Variant({1, 2})).code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(index.Add(Sequence(64), Variant({1, 2}, 1)).ok());
  ExpectSound(index);
}

TEST(ChunkIndexTest, DroppedPagesTakeTheirVariantsAlong) {
  ChunkIndex index(1000, 1);
  ASSERT_TRUE(index.Add(Sequence(100), Variant({1, 2}, 0, 0)).ok());
  ASSERT_TRUE(index.Add(Sequence(100), Variant({2, 3}, 5, 1)).ok());
  ASSERT_TRUE(index.Add(Sequence(50, 500), Variant({3}, 8, 0)).ok());
  index.DropPage(1);
  ExpectSound(index);
  EXPECT_EQ(index.variants(), 2u);
  index.DropPage(2);
  ExpectSound(index);
  EXPECT_FALSE(index.Lookup(Sequence(100)).has_value());
  EXPECT_EQ(index.contents(), 1u);
  EXPECT_EQ(index.tokens(), 50u);
  index.Clear();
  ExpectSound(index);
  EXPECT_EQ(index.contents(), 0u);
}

TEST(ChunkIndexTest, TheContentsUsedLongestAgoMakeRoom) {
  ChunkIndex index(120, 1);
  for (const TokenId start : {0, 1000, 2000}) {
    ASSERT_TRUE(index.Add(Sequence(40, start), Variant({static_cast<PageIndex>(start)})).ok());
  }
  const auto found = index.FindIn(Sequence(45, -3));  // holds the first chunk at 3: a use
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].start, 3);
  ASSERT_TRUE(index.Add(Sequence(60, 3000), Variant({9})).ok());
  ExpectSound(index);
  EXPECT_TRUE(index.Lookup(Sequence(40)).has_value());
  EXPECT_FALSE(index.Lookup(Sequence(40, 1000)).has_value());
  EXPECT_FALSE(index.Lookup(Sequence(40, 2000)).has_value());
}

// Chunks of stored sequences, in a pool that evicts: whatever the index still names holds the chunk's tokens.
TEST(ChunkIndexPropertyTest, NeverNamesAPageThatHoldsSomethingElse) {
  for (std::uint32_t round = 0; round < 8; ++round) {
    SCOPED_TRACE("KVSHARE_TEST_SEED=" + std::to_string(Seed() + round));
    std::mt19937 rng(Seed() + round);
    const auto uniform = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
    KvPool pool(16, RootContext(Context(0), Context(1)));
    ChunkIndex index(2000, rng());
    pool.SetDropObserver([&](PageIndex page) { index.DropPage(page); });
    std::size_t most = 0;
    for (int step = 0; step < 150; ++step) {
      Tokens tokens = Sequence(static_cast<std::size_t>(uniform(1, 200)), 1000 * uniform(0, 3));
      const Tokens more = Sequence(static_cast<std::size_t>(uniform(1, 200)), 1000 * uniform(0, 3));
      tokens.insert(tokens.end(), more.begin(), more.end());
      const auto n = static_cast<std::int64_t>(tokens.size());
      KvHandle handle = *pool.Acquire(pool.index().Find(tokens), n);
      pool.Extend(handle, n);
      pool.ReleaseTail(handle);
      pool.Retire(std::move(handle), tokens, 0);
      const PrefixMatch match = pool.index().Find(tokens);
      std::vector<PageIndex> pages = match.pages;
      if (match.tail != kNoPage) pages.push_back(match.tail);
      const int length = uniform(32, 150), start = uniform(0, static_cast<int>(n));
      if (start + length <= match.tokens()) {
        const int first = start / kPageTokens, last = (start + length - 1) / kPageTokens;
        ChunkVariant variant =
            Variant({pages.begin() + first, pages.begin() + last + 1}, start % kPageTokens, step % 7);
        variant.base = start;
        ASSERT_TRUE(
            index
                .Add(std::span(tokens).subspan(static_cast<std::size_t>(start), static_cast<std::size_t>(length)),
                     variant)
                .ok());
      }
      ExpectSound(index, &pool.index());
      for (const ChunkSpan& span : index.FindIn(tokens)) {
        EXPECT_TRUE(std::equal(span.chunk.tokens.begin(), span.chunk.tokens.end(), tokens.begin() + span.start));
      }
      most = std::max(most, index.variants());
    }
    EXPECT_GT(most, 3u);
    pool.Clear();
    EXPECT_EQ(index.contents(), 0u);
  }
}

}  // namespace
}  // namespace kvshare::agentd

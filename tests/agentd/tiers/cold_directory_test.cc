// The directory against a plain list of what it should hold.
#include "agentd/tiers/cold_directory.h"

#include <algorithm>
#include <map>
#include <random>

#include "gtest/gtest.h"

namespace kvshare::agentd {
namespace {

using Tokens = std::vector<TokenId>;

ColdPage Page(const Digest& parent, const Tokens& tokens) {
  ColdPage page;
  page.parent = parent;
  page.tokens = tokens;
  page.context = ChainContext(parent, tokens);
  return page;
}

bool Begins(const Tokens& longer, const Tokens& shorter) {
  return shorter.size() <= longer.size() && std::equal(shorter.begin(), shorter.end(), longer.begin());
}

// Tokens of two values only, so that pages share beginnings all the time.
Tokens RandomTokens(std::mt19937_64& rng) {
  Tokens tokens(1 + rng() % 6);
  for (TokenId& token : tokens) token = static_cast<TokenId>(rng() % 2);
  return tokens;
}

TEST(ColdDirectory, AgainstAList) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    std::mt19937_64 rng(seed);
    ColdDirectory directory;
    std::map<Digest, ColdPage> list;
    std::vector<Digest> parents = {ContentDigest({})};
    std::uint64_t slot = 0;
    for (int step = 0; step < 600; ++step) {
      const ColdPage page = Page(parents[rng() % parents.size()], RandomTokens(rng));
      const std::uint64_t kind = rng() % 10;
      const bool covered = std::any_of(list.begin(), list.end(), [&](const auto& item) {
        return item.second.parent == page.parent && Begins(item.second.tokens, page.tokens);
      });
      ASSERT_EQ(directory.Covers(page.parent, page.tokens), covered);
      std::size_t most = 0;
      for (const auto& [context, other] : list) {
        if (other.parent != page.parent) continue;
        const std::size_t n = std::min(other.tokens.size(), page.tokens.size());
        std::size_t same = 0;
        while (same < n && other.tokens[same] == page.tokens[same]) ++same;
        most = std::max(most, same);
      }
      const ColdTail tail = directory.FindTail(page.parent, page.tokens);
      ASSERT_EQ(static_cast<std::size_t>(tail.tokens), most);
      if (most > 0) {
        ASSERT_TRUE(
            std::equal(page.tokens.begin(), page.tokens.begin() + tail.tokens, list[tail.context].tokens.begin()));
      }
      if (kind < 6 && !covered) {
        const auto superseded = directory.Insert(page, ++slot, /*generation=*/1);
        const auto shorter = std::find_if(list.begin(), list.end(), [&](const auto& item) {
          return item.second.parent == page.parent && Begins(page.tokens, item.second.tokens);
        });
        ASSERT_EQ(superseded != nullptr, shorter != list.end());
        if (shorter != list.end()) list.erase(shorter);
        list[page.context] = page;
        if (parents.size() < 12) parents.push_back(page.context);
      } else if (kind == 6 && !list.empty()) {
        const Digest victim = std::next(list.begin(), static_cast<std::ptrdiff_t>(rng() % list.size()))->first;
        ASSERT_NE(directory.Remove(victim), nullptr);
        list.erase(victim);
      } else if (kind == 7 && !list.empty()) {
        const auto evicted = directory.Evict();
        ASSERT_NE(evicted, nullptr);
        for (const auto& [context, other] : list) ASSERT_NE(other.parent, evicted->page.context) << "not a leaf";
        ASSERT_EQ(list.erase(evicted->page.context), 1u);
      } else if (!list.empty()) {
        directory.Use(std::next(list.begin(), static_cast<std::ptrdiff_t>(rng() % list.size()))->first, kind == 8);
      }
      ASSERT_EQ(directory.size(), list.size());
      const Status sound = directory.CheckIntegrity();
      ASSERT_TRUE(sound.ok()) << sound.message();
    }
  }
}

TEST(ColdDirectory, WhatIsPinnedIsNotEvicted) {
  ColdDirectory directory;
  const Digest root = ContentDigest({});
  const ColdPage a = Page(root, {1}), b = Page(root, {2});
  directory.Insert(a, 0, 1);
  directory.Insert(b, 1, 2);
  directory.Pin(a.context);
  EXPECT_EQ(directory.Evict()->page.context, b.context);
  EXPECT_EQ(directory.Evict(), nullptr);
  EXPECT_TRUE(directory.CheckIntegrity().ok());
  directory.Unpin(a.context);
  EXPECT_EQ(directory.Evict()->page.context, a.context);
}

TEST(ColdDirectory, MovedEntriesAreTakenOnce) {
  ColdDirectory directory;
  const ColdPage a = Page(ContentDigest({}), {1});
  directory.Insert(a, 0, 1);
  EXPECT_EQ(directory.TakeMoved().size(), 0u);
  directory.Use(a.context, false);
  EXPECT_EQ(directory.TakeMoved().size(), 1u);
  EXPECT_EQ(directory.TakeMoved().size(), 0u);
}

}  // namespace
}  // namespace kvshare::agentd

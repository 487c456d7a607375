// What people and the cold tier ask of the pool: leases, pins, eviction by name, lists, generations, observers.
#include <algorithm>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "agentd/pool/kv_pool.h"
#include "gtest/gtest.h"

namespace kvshare::agentd {
namespace {

using Tokens = std::vector<TokenId>;

Digest TestRoot() { return RootContext(ContentDigest({}), ContentDigest({})); }

Tokens Sequence(std::int64_t n, TokenId start = 0) {
  Tokens tokens(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = start + static_cast<TokenId>(i);
  return tokens;
}

void ExpectSound(const KvPool& pool) {
  const Status status = pool.CheckIntegrity();
  ASSERT_TRUE(status.ok()) << status.message();
}

void Store(KvPool& pool, const Tokens& tokens, std::uint32_t source = 0) {
  Result<KvHandle> handle = pool.Acquire(pool.index().Find(tokens), static_cast<std::int64_t>(tokens.size()));
  ASSERT_TRUE(handle.ok()) << handle.status().message();
  pool.Extend(*handle, static_cast<std::int64_t>(tokens.size()));
  pool.ReleaseTail(*handle);
  pool.Retire(std::move(*handle), tokens, source);
  ExpectSound(pool);
}

std::vector<StoredPage> Entries(const KvPool& pool, EntryOrder order, std::size_t limit = 100) {
  std::vector<StoredPage> entries;
  pool.ForEachEntry(order, limit, [&](const StoredPage& entry) { entries.push_back(entry); });
  return entries;
}

TEST(KvPoolLeaseTest, ALeasePinsWhatIsStoredAndIsPromisedNothing) {
  KvPool pool(4, TestRoot());
  Store(pool, Sequence(100));
  {
    const PrefixMatch match = pool.index().Find(Sequence(100));
    const KvHandle whole_pages = *pool.Acquire(pool.index().Find(Sequence(64)), 64);
    const KvHandle lease = *pool.Lease(match);
    EXPECT_EQ(pool.usage().reserved, 0u);
    EXPECT_EQ(pool.usage().pinned, 2u);
    EXPECT_EQ(lease.pages().size(), 1u);
    EXPECT_EQ(lease.tail(), match.tail);
    EXPECT_EQ(lease.tail_tokens(), 36);
    for (TokenId start = 1000; start < 9000; start += 1000) Store(pool, Sequence(128, start));
    EXPECT_EQ(pool.index().Find(Sequence(100)).tokens(), 100);
    EXPECT_EQ(pool.Describe(lease.pages()[0]).pins, 2u);
  }
  EXPECT_EQ(pool.usage().pinned, 0u);
  Store(pool, Sequence(256, 9000));
  EXPECT_EQ(pool.index().Find(Sequence(100)).tokens(), 0);
}

TEST(KvPoolPinTest, APinnedPrefixStaysUntilItsLastUnpin) {
  KvPool pool(6, TestRoot());
  Store(pool, Sequence(150));
  const PinnedEntry first = *pool.PinEntry(Sequence(150));
  const PinnedEntry again = *pool.PinEntry(Sequence(150));
  EXPECT_EQ(first.key, again.key);
  EXPECT_EQ(first.tokens, 150);
  EXPECT_EQ(pool.usage().retained, 3u);
  EXPECT_EQ(pool.EvictFrom(kNoPage), 0u);
  EXPECT_TRUE(pool.Unpin(first.key).ok());
  for (TokenId start = 1000; start < 9000; start += 1000) Store(pool, Sequence(190, start));
  EXPECT_EQ(pool.index().Find(Sequence(150)).tokens(), 150);
  EXPECT_TRUE(pool.Unpin(first.key).ok());
  EXPECT_EQ(pool.Unpin(first.key).code(), StatusCode::kNotFound);
  ExpectSound(pool);
  Store(pool, Sequence(384, 9000));
  EXPECT_EQ(pool.index().Find(Sequence(150)).tokens(), 0);
}

TEST(KvPoolPinTest, AtMostHalfOfThePoolOrAsMuchAsWasSaidCanBePinned) {
  for (const auto& [given, most] : {std::pair<PageIndex, PageIndex>{100, 4}, {3, 3}, {0, 0}}) {
    KvPool pool(8, TestRoot(), {.max_retained = given});
    Store(pool, Sequence(5 * 64));
    for (PageIndex pages = 1; pages <= 5; ++pages) {
      const Result<PinnedEntry> pinned = pool.PinEntry(Sequence(64 * pages));
      EXPECT_EQ(pinned.ok(), pages <= most);
      EXPECT_EQ(pinned.status().code(), pages <= most ? StatusCode::kOk : StatusCode::kResourceExhausted);
      ExpectSound(pool);
    }
    EXPECT_EQ(pool.usage().retained, most);
  }
}

TEST(KvPoolPinTest, APromiseToARunningSequenceGoesBeforeAPin) {
  KvPool pool(4, TestRoot());
  Store(pool, Sequence(128));
  KvHandle running = *pool.Acquire({}, 3 * 64);
  const Result<PinnedEntry> both = pool.PinEntry(Sequence(128));
  ASSERT_FALSE(both.ok());
  EXPECT_EQ(both.status().code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(pool.PinEntry(Sequence(64)).ok());
  pool.Extend(running, 3 * 64);
  ExpectSound(pool);
  EXPECT_EQ(pool.index().Find(Sequence(128)).tokens(), 64);
}

TEST(KvPoolPinTest, NothingStoredCannotBePinned) {
  KvPool pool(4, TestRoot());
  EXPECT_EQ(pool.PinEntry(Sequence(10)).status().code(), StatusCode::kNotFound);
}

TEST(KvPoolPinTest, WhereAPinnedLastPageIsReplacedByALongerOneThePinGoesOver) {
  KvPool pool(6, TestRoot());
  Store(pool, Sequence(100));
  const PinnedEntry pinned = *pool.PinEntry(Sequence(100));
  Store(pool, Sequence(128));
  EXPECT_EQ(pool.usage().retained, 2u);
  EXPECT_EQ(pool.EvictFrom(kNoPage), 0u);
  EXPECT_TRUE(pool.Unpin(pinned.key).ok());
  ExpectSound(pool);
  EXPECT_EQ(pool.EvictFrom(kNoPage), 2u);
}

TEST(KvPoolEvictTest, DropsWhatContinuesAPrefixAndNothingElse) {
  KvPool pool(16, TestRoot());
  Tokens branch = Sequence(200);
  for (std::size_t t = 130; t < branch.size(); ++t) branch[t] += 5000;
  Store(pool, Sequence(200));
  Store(pool, branch);
  Store(pool, Sequence(70, 900));
  EXPECT_EQ(pool.Evict(Sequence(140)), 2u);  // the third and fourth page of the first sequence
  ExpectSound(pool);
  EXPECT_EQ(pool.index().Find(Sequence(200)).tokens(), 130);  // the branch's third page begins so
  EXPECT_EQ(pool.index().Find(branch).tokens(), 200);
  EXPECT_EQ(pool.Evict(Sequence(128)), 3u);  // a prefix that ends with a page names that page
  EXPECT_EQ(pool.index().Find(branch).tokens(), 64);
  EXPECT_EQ(pool.index().Find(Sequence(70, 900)).tokens(), 70);
  EXPECT_EQ(pool.Evict(Sequence(10, 77)), 0u);
  EXPECT_EQ(pool.Evict({}), 3u);
  EXPECT_EQ(pool.usage().free, 16u);
  ExpectSound(pool);
}

TEST(KvPoolEvictTest, WhatIsHeldStaysAndSoDoesAllBeforeIt) {
  KvPool pool(8, TestRoot());
  Store(pool, Sequence(300));
  const KvHandle lease = *pool.Lease(pool.index().Find(Sequence(128)));
  EXPECT_EQ(pool.Evict(Sequence(1)), 3u);
  ExpectSound(pool);
  EXPECT_EQ(pool.index().Find(Sequence(300)).tokens(), 128);
}

TEST(KvPoolGenerationTest, ChangesExactlyWhenAPageIsGivenUp) {
  KvPool pool(2, TestRoot());
  Store(pool, Sequence(64));
  const PageIndex page = pool.index().Find(Sequence(64)).pages[0];
  const std::uint64_t before = pool.generation(page);
  Store(pool, Sequence(64));
  { const KvHandle lease = *pool.Lease(pool.index().Find(Sequence(64))); }
  EXPECT_EQ(pool.generation(page), before);
  pool.Clear();
  EXPECT_EQ(pool.generation(page), before + 1);
}

TEST(KvPoolObserverTest, SeesAnEvictedPageWhileItCanStillBeRead) {
  KvPool pool(2, TestRoot());
  std::vector<StoredPage> evicted;
  std::vector<Tokens> texts;
  std::vector<PageIndex> dropped;
  pool.SetEvictionObserver([&](PageIndex page) {
    evicted.push_back(pool.Describe(page));
    texts.emplace_back(evicted.back().tokens.begin(), evicted.back().tokens.end());
    EXPECT_EQ(pool.generation(page), 0u);
  });
  pool.SetDropObserver([&](PageIndex page) { dropped.push_back(page); });
  Store(pool, Sequence(100), 7);
  Store(pool, Sequence(64, 1000), 8);
  ASSERT_EQ(evicted.size(), 1u);
  EXPECT_EQ(evicted[0].source, 7u);
  EXPECT_EQ(evicted[0].start, 64);
  EXPECT_EQ(texts[0], Sequence(36, 64));
  EXPECT_EQ(evicted[0].context, ChainContext(ChainContext(TestRoot(), Sequence(64)), Sequence(36, 64)));
  EXPECT_EQ(dropped.size(), 1u);
  pool.Clear();
  EXPECT_EQ(evicted.size(), 1u);  // asked for, not for room
  EXPECT_EQ(dropped.size(), 3u);
}

TEST(KvPoolEntriesTest, ListsByUseByHitsAndByTree) {
  KvPool pool(16, TestRoot());
  pool.SetTime(1000);
  Store(pool, Sequence(100), 1);
  pool.SetTime(3000);
  Store(pool, Sequence(70, 500), 2);
  Store(pool, Sequence(100), 3);
  pool.SetTime(9000);
  const auto recent = Entries(pool, EntryOrder::kRecent);
  ASSERT_EQ(recent.size(), 4u);
  EXPECT_EQ(recent[0].tokens[0], 0);
  EXPECT_EQ(recent[0].hits, 1);
  EXPECT_EQ(recent[0].source, 1u);
  EXPECT_EQ(recent[0].idle_ms, 6000);
  EXPECT_EQ(Entries(pool, EntryOrder::kRecent, 2).size(), 2u);
  EXPECT_EQ(Entries(pool, EntryOrder::kHits, 1)[0].hits, 1);
  EXPECT_EQ(pool.usage().hits, 2);  // a page, and the tail after it
  std::set<PageIndex> seen;
  for (const StoredPage& entry : Entries(pool, EntryOrder::kTree)) {
    EXPECT_TRUE(entry.parent == kNoPage || seen.contains(entry.parent));
    EXPECT_EQ(entry.start, entry.parent == kNoPage ? 0 : 64);
    seen.insert(entry.page);
    const auto found = pool.FindByKey(entry.context.Hex().substr(0, 16));
    ASSERT_EQ(found.size(), 1u);
    EXPECT_EQ(found[0], entry.page);
  }
  EXPECT_EQ(seen.size(), 4u);
  EXPECT_TRUE(pool.FindByKey("nothing").empty());
  EXPECT_EQ(pool.FindByKey("", 3).size(), 3u);
}

TEST(KvPoolEntriesTest, LoadedPagesAreStoredWithTheSourcesTheyHad) {
  KvPool pool(8, TestRoot());
  const Tokens tokens = Sequence(192);
  KvHandle handle = *pool.Acquire(pool.index().Find(tokens), 192);
  pool.Extend(handle, 128);
  pool.Publish(handle, std::span(tokens).first(64), 4);
  pool.Publish(handle, std::span(tokens).first(128), 5);
  pool.Extend(handle, 192);
  pool.Retire(std::move(handle), tokens, 6);
  ExpectSound(pool);
  const PrefixMatch match = pool.index().Find(tokens);
  ASSERT_EQ(match.pages.size(), 3u);
  for (std::uint32_t i = 0; i < 3; ++i) EXPECT_EQ(pool.index().Source(match.pages[i]), 4 + i);
}

}  // namespace
}  // namespace kvshare::agentd

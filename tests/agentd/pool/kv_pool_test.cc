// KvPool and its index against an oracle: a plain list of all token sequences that are stored, searched from end to
// end.
#include "agentd/pool/kv_pool.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

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

std::size_t CommonPrefix(const Tokens& a, const Tokens& b) {
  std::size_t n = 0;
  while (n < a.size() && n < b.size() && a[n] == b[n]) ++n;
  return n;
}

void ExpectSound(const KvPool& pool) {
  const Status status = pool.CheckIntegrity();
  ASSERT_TRUE(status.ok()) << status.message();
}

// One request from admission to its end, as the engine does it. Returns the tokens it found stored.
std::int64_t Store(KvPool& pool, const Tokens& tokens, std::uint32_t source = 0) {
  const PrefixMatch match = pool.index().Find(tokens);
  Result<KvHandle> handle = pool.Acquire(match, static_cast<std::int64_t>(tokens.size()));
  EXPECT_TRUE(handle.ok()) << handle.status().message();
  if (!handle.ok()) return -1;
  pool.Extend(*handle, static_cast<std::int64_t>(tokens.size()));
  pool.ReleaseTail(*handle);
  pool.Retire(std::move(*handle), tokens, source);
  ExpectSound(pool);
  return match.tokens();
}

TEST(KvPoolTest, PagesThatAreNotStoredCanBeSplitOff) {
  KvPool pool(10, TestRoot());
  const Tokens tokens = Sequence(150);
  Result<KvHandle> handle = pool.Acquire(pool.index().Find(tokens), 8 * 64);
  ASSERT_TRUE(handle.ok());
  pool.Extend(*handle, 7 * 64);
  const std::vector<PageIndex> before(handle->pages().begin(), handle->pages().end());
  KvHandle split = pool.Split(*handle, 3, 5);
  ExpectSound(pool);
  EXPECT_EQ(std::vector<PageIndex>(split.pages().begin(), split.pages().end()),
            std::vector<PageIndex>(before.begin() + 3, before.begin() + 5));
  EXPECT_EQ(handle->pages().size(), 3u);
  EXPECT_EQ(pool.usage().pinned, 5u);
  EXPECT_EQ(pool.usage().reserved, 0u);
  pool.Retire(std::move(*handle), tokens, 0);
  ExpectSound(pool);
  EXPECT_EQ(pool.index().Find(tokens).tokens(), 150);
  EXPECT_EQ(pool.usage().pinned, 2u);
  // Nobody else can have them while they are held.
  EXPECT_FALSE(pool.Acquire({}, 9 * 64).ok());
  split = KvHandle();
  ExpectSound(pool);
  EXPECT_EQ(pool.usage().pinned, 0u);
  EXPECT_TRUE(pool.Acquire({}, 10 * 64).ok());
}

// Less than what is stored may be wanted of it: the page in which that ends is a tail then, also one that is full.
TEST(KvPoolTest, AMatchCanBeCut) {
  KvPool pool(10, TestRoot());
  const Tokens tokens = Sequence(150);
  Store(pool, tokens);
  const PrefixMatch whole = pool.index().Find(tokens);
  ASSERT_EQ(whole.tokens(), 150);
  for (const std::int64_t count : {0, 1, 63, 64, 65, 127, 128, 129, 149, 150, 151}) {
    SCOPED_TRACE(count);
    PrefixMatch cut = whole;
    cut.Cut(count);
    const std::int64_t left = std::min<std::int64_t>(count, 150);
    EXPECT_EQ(cut.tokens(), left);
    EXPECT_EQ(cut.pages.size(), static_cast<std::size_t>(left / 64));
    EXPECT_EQ(cut.contexts.size(), cut.pages.size());
    EXPECT_EQ(cut.tail != kNoPage, cut.tail_tokens > 0);
    if (left % 64 > 0 && left < 128) {
      EXPECT_EQ(cut.tail, whole.pages[cut.pages.size()]);
    }
    Result<KvHandle> handle = pool.Acquire(cut, 160);
    ASSERT_TRUE(handle.ok());
    ExpectSound(pool);
    pool.Extend(*handle, 160);
    pool.ReleaseTail(*handle);
    pool.Retire(std::move(*handle), tokens, 0);
    ExpectSound(pool);
    EXPECT_EQ(pool.index().Find(tokens).tokens(), 150);
    EXPECT_EQ(pool.usage().indexed, 3u) << "stored once";
  }
}

TEST(KvPoolTest, AnEmptyPoolMatchesNothing) {
  KvPool pool(4, TestRoot());
  EXPECT_EQ(pool.index().Find(Sequence(200)).tokens(), 0);
  EXPECT_FALSE(pool.index().Find(Sequence(200)).diverges);
  ExpectSound(pool);
}

TEST(KvPoolTest, MatchesAreTokenGranularAroundPageBoundaries) {
  for (const std::int64_t stored : {1, 63, 64, 65, 127, 128, 129, 300}) {
    KvPool pool(16, TestRoot());
    EXPECT_EQ(Store(pool, Sequence(stored)), 0);
    for (const std::int64_t asked : {1, 2, 62, 63, 64, 65, 127, 128, 129, 299, 300, 301}) {
      const PrefixMatch match = pool.index().Find(Sequence(asked));
      EXPECT_EQ(match.tokens(), std::min(stored, asked)) << stored << " stored, asked for " << asked;
      EXPECT_FALSE(match.diverges);
      Tokens other = Sequence(asked);
      other.back() = -1;
      EXPECT_EQ(pool.index().Find(other).tokens(), std::min(stored, asked - 1));
      EXPECT_EQ(pool.index().Find(other).diverges, asked > 1 && stored >= asked);
    }
  }
}

TEST(KvPoolTest, ALongerPageReplacesAPrefixOfItAndAShorterOneAddsNothing) {
  KvPool pool(8, TestRoot());
  Store(pool, Sequence(10));
  Store(pool, Sequence(40));
  EXPECT_EQ(pool.usage().indexed, 1u);
  Store(pool, Sequence(20));
  EXPECT_EQ(pool.usage().indexed, 1u);
  Store(pool, Sequence(64));
  EXPECT_EQ(pool.usage().indexed, 1u);
  EXPECT_EQ(pool.index().Find(Sequence(64)).pages.size(), 1u);
  EXPECT_EQ(pool.usage().free, 7u);
}

TEST(KvPoolTest, EqualPagesOfTwoRunningSequencesAreKeptOnce) {
  KvPool pool(8, TestRoot());
  const Tokens tokens = Sequence(130);
  KvHandle a = *pool.Acquire(pool.index().Find(tokens), 130);
  KvHandle b = *pool.Acquire(pool.index().Find(tokens), 130);
  pool.Extend(a, 130);
  pool.Extend(b, 130);
  EXPECT_EQ(pool.usage().pinned, 6u);
  pool.Publish(a, tokens, 1);
  pool.Publish(b, tokens, 2);
  ExpectSound(pool);
  EXPECT_EQ(pool.usage().pinned, 4u);  // two shared, two partly filled of their own
  EXPECT_EQ(a.pages()[0], b.pages()[0]);
  EXPECT_EQ(a.pages()[1], b.pages()[1]);
  EXPECT_NE(a.pages()[2], b.pages()[2]);
  EXPECT_EQ(pool.index().Source(b.pages()[0]), 1u);
  pool.Retire(std::move(b), tokens, 2);
  pool.Retire(std::move(a), tokens, 1);
  ExpectSound(pool);
  EXPECT_EQ(pool.usage().indexed, 3u);
  EXPECT_EQ(pool.usage().pinned, 0u);
}

TEST(KvPoolTest, PinnedPagesOutliveEvictionPressureAndAFullPoolSaysSo) {
  KvPool pool(4, TestRoot());
  const Tokens kept = Sequence(128);
  Store(pool, kept);
  KvHandle handle = *pool.Acquire(pool.index().Find(kept), 128);
  for (TokenId start = 1000; start < 5000; start += 1000) Store(pool, Sequence(100, start));
  EXPECT_EQ(pool.index().Find(kept).tokens(), 128);
  const Result<KvHandle> refused = pool.Acquire({}, 3 * 64);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), StatusCode::kResourceExhausted);
  ExpectSound(pool);
}

TEST(KvPoolTest, APromiseIsKeptWhateverOthersStoreMeanwhile) {
  KvPool pool(6, TestRoot());
  KvHandle first = *pool.Acquire({}, 4 * 64);
  Store(pool, Sequence(128));
  EXPECT_FALSE(pool.Acquire({}, 3 * 64).ok());
  Store(pool, Sequence(100, 500));
  pool.Extend(first, 4 * 64);
  EXPECT_EQ(first.pages().size(), 4u);
  ExpectSound(pool);
}

TEST(KvPoolTest, TheLeastRecentlyUsedSequenceGoesFirstFromItsEnd) {
  KvPool pool(6, TestRoot(), {.policy = std::move(*NewEvictionPolicy("lru", 6))});
  const Tokens a = Sequence(128), b = Sequence(128, 1000), c = Sequence(128, 2000);
  Store(pool, a);
  Store(pool, b);
  Store(pool, c);
  Store(pool, a);  // used again: b is the oldest now
  Store(pool, Sequence(64, 3000));
  EXPECT_EQ(pool.index().Find(a).tokens(), 128);
  EXPECT_EQ(pool.index().Find(b).tokens(), 64);
  EXPECT_EQ(pool.index().Find(c).tokens(), 128);
  EXPECT_EQ(pool.usage().evictions, 1);
  EXPECT_EQ(pool.ghosts().Lookup(ChainContext(pool.index().root(), Tokens(b.begin(), b.begin() + 64)),
                                 std::span(b).subspan(64)),
            64u);
}

TEST(KvPoolTest, ClearKeepsWhatRuns) {
  KvPool pool(6, TestRoot());
  const Tokens a = Sequence(128), b = Sequence(128, 1000);
  Store(pool, a);
  Store(pool, b);
  const KvHandle handle = *pool.Acquire(pool.index().Find(a), 128);
  pool.Clear();
  ExpectSound(pool);
  EXPECT_EQ(pool.index().Find(a).tokens(), 128);
  EXPECT_EQ(pool.index().Find(b).tokens(), 0);
}

TEST(GhostSetTest, RemembersTheLastNamesOnlyAndForgetsWhatIsStoredAgain) {
  GhostSet ghosts(3);
  const Digest root = TestRoot();
  for (TokenId i = 0; i < 20; ++i) {
    const Tokens page = Sequence(i % 2 == 0 ? 64 : 10, 100 * i);
    ghosts.Add(root, ChainContext(root, page), page.size());
    ASSERT_LE(ghosts.size(), 3u);
    EXPECT_EQ(ghosts.Lookup(root, Sequence(64, 100 * i)), page.size());
  }
  EXPECT_EQ(ghosts.Lookup(root, Sequence(64, 0)), 0u);
  ghosts.Erase(ChainContext(root, Sequence(10, 1900)));
  EXPECT_EQ(ghosts.Lookup(root, Sequence(64, 1900)), 0u);
  EXPECT_EQ(ghosts.Lookup(root, Sequence(9, 1700)), 0u);
  EXPECT_EQ(ghosts.Lookup(root, Sequence(10, 1700)), 10u);
}

// Random lives of many sequences. `contents` is the simulated memory: what each page's rows hold. Every match is
// compared with the oracle and every matched row with the memory, so that a page that was overwritten, freed too early
// or found under the wrong name is seen.
class RandomLives {
 public:
  RandomLives(std::uint32_t seed, PageIndex num_pages, std::string_view policy = "default")
      : rng_(seed),
        contents_(num_pages, Tokens(kPageTokens, -1)),
        pool_(num_pages, TestRoot(), {.policy = std::move(*NewEvictionPolicy(policy, num_pages))}) {
    // A page leaves the index as it came: with the rows that its tokens say.
    pool_.SetDropObserver([this](PageIndex page) {
      const auto tokens = pool_.index().Tokens(page);
      EXPECT_TRUE(std::equal(tokens.begin(), tokens.end(), contents_[page].begin()));
    });
    pool_.SetEvictionObserver([this](PageIndex page) {
      ++observed_evictions;
      EXPECT_EQ(pool_.Describe(page).pins, 0u);
      EXPECT_FALSE(pool_.Describe(page).retained);
    });
  }

  void Step() {
    const int what = Uniform(0, 11);
    if (what == 11) {
      PinOrUnpin();
    } else if (what == 10) {
      Lease();
    } else if (what < 5 || running_.empty()) {
      Start();
    } else if (what < 7) {
      Grow(running_[PickRunning()]);
    } else {
      End(PickRunning());
    }
    ExpectSound(pool_);
    CheckMatch(RandomSequence());
  }

  void EndAll() {
    while (!running_.empty()) End(running_.size() - 1);
    leases_.clear();
    ExpectSound(pool_);
    EXPECT_EQ(pool_.usage().evictions, observed_evictions);
    for (const Digest& key : pinned_) EXPECT_TRUE(pool_.Unpin(key).ok());
    pinned_.clear();
    ExpectSound(pool_);
    EXPECT_EQ(pool_.usage().retained, 0u);
    EXPECT_EQ(pool_.usage().pinned, 0u);
    EXPECT_EQ(pool_.usage().reserved, 0u);
  }

  const KvPool& pool() const { return pool_; }
  // All that was ever stored; what a pool without evictions must find.
  bool compare_with_everything = false;
  std::int64_t observed_evictions = 0;

 private:
  struct Running {
    KvHandle handle;
    Tokens tokens;         // the whole sequence, to its planned end
    std::size_t done = 0;  // tokens whose rows are written
  };

  int Uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng_); }
  std::size_t PickRunning() { return static_cast<std::size_t>(Uniform(0, static_cast<int>(running_.size()) - 1)); }

  // A few roots, few branches, cut anywhere: sequences share prefixes of every length.
  Tokens RandomSequence() {
    Tokens tokens;
    const int pieces = Uniform(1, 4);
    for (int i = 0; i < pieces; ++i) {
      const Tokens piece = Sequence(Uniform(1, 150), 1000 * Uniform(0, 2));
      tokens.insert(tokens.end(), piece.begin(), piece.end());
    }
    return tokens;
  }

  PrefixMatch CheckMatch(const Tokens& tokens) {
    const PrefixMatch match = pool_.index().Find(tokens);
    for (std::int64_t t = 0; t < match.tokens(); ++t) {
      const PageIndex page =
          t < match.full_tokens() ? match.pages[static_cast<std::size_t>(t / kPageTokens)] : match.tail;
      EXPECT_EQ(contents_[page][static_cast<std::size_t>(t % kPageTokens)], tokens[static_cast<std::size_t>(t)]);
    }
    if (compare_with_everything) {
      std::size_t longest = 0;
      for (const Tokens& stored : stored_) longest = std::max(longest, CommonPrefix(stored, tokens));
      EXPECT_EQ(match.tokens(), static_cast<std::int64_t>(longest));
    }
    return match;
  }

  void Start() {
    Running r;
    r.tokens = RandomSequence();
    PrefixMatch match = CheckMatch(r.tokens);
    Result<KvHandle> handle = pool_.Acquire(match, static_cast<std::int64_t>(r.tokens.size()));
    if (!handle.ok()) {
      EXPECT_FALSE(running_.empty() && leases_.empty() && pinned_.empty() && match.tail == kNoPage)
          << "an idle pool refused: " << handle.status().message();
      return;
    }
    r.handle = std::move(*handle);
    r.done = static_cast<std::size_t>(match.tokens());
    if (match.tail_tokens > 0) {
      pool_.Extend(r.handle, match.tokens());
      std::copy_n(contents_[match.tail].begin(), match.tail_tokens, contents_[r.handle.pages().back()].begin());
    }
    pool_.ReleaseTail(r.handle);
    running_.push_back(std::move(r));
  }

  void Grow(Running& r) {
    const std::size_t to = std::min(r.tokens.size(), r.done + static_cast<std::size_t>(Uniform(1, 100)));
    pool_.Extend(r.handle, static_cast<std::int64_t>(to));
    for (; r.done < to; ++r.done) {
      Tokens& page = contents_[r.handle.pages()[r.done / kPageTokens]];
      page[r.done % kPageTokens] = r.tokens[r.done];
    }
    const Tokens so_far(r.tokens.begin(), r.tokens.begin() + static_cast<std::ptrdiff_t>(r.done));
    if (Uniform(0, 1) == 0) {
      pool_.Publish(r.handle, so_far, 0);
      stored_.insert(Tokens(so_far.begin(), so_far.end() - static_cast<std::ptrdiff_t>(so_far.size() % kPageTokens)));
    }
  }

  void PinOrUnpin() {
    if (!pinned_.empty() && Uniform(0, 1) == 0) {
      EXPECT_TRUE(pool_.Unpin(pinned_.back()).ok());
      pinned_.pop_back();
      return;
    }
    const Tokens tokens = RandomSequence();
    const std::int64_t stored = pool_.index().Find(tokens).tokens();
    const Result<PinnedEntry> pinned = pool_.PinEntry(tokens);
    EXPECT_EQ(stored == 0, !pinned.ok() && pinned.status().code() == StatusCode::kNotFound);
    if (!pinned.ok()) return;
    EXPECT_EQ(pinned->tokens, stored);
    pinned_.push_back(pinned->key);
  }

  // A reader that holds what is stored of a sequence for a while.
  void Lease() {
    if (leases_.size() == 3) leases_.erase(leases_.begin());
    const Tokens tokens = RandomSequence();
    const PageIndex reserved = pool_.usage().reserved;
    Result<KvHandle> lease = pool_.Lease(CheckMatch(tokens));
    if (lease.ok()) leases_.push_back(std::move(*lease));
    EXPECT_EQ(pool_.usage().reserved, reserved);
  }

  void End(std::size_t i) {
    Running r = std::move(running_[i]);
    running_.erase(running_.begin() + static_cast<std::ptrdiff_t>(i));
    if (Uniform(0, 3) == 0) return;  // dropped without being stored
    r.tokens.resize(r.done);
    pool_.Retire(std::move(r.handle), r.tokens, 0);
    stored_.insert(r.tokens);
  }

  std::mt19937 rng_;
  std::vector<Tokens> contents_;  // outlives pool_, whose observers read it
  KvPool pool_;
  std::vector<Running> running_;
  std::vector<KvHandle> leases_;
  std::vector<Digest> pinned_;
  std::set<Tokens> stored_;
};

std::uint32_t Seed() {
  const char* given = std::getenv("KVSHARE_TEST_SEED");
  return given == nullptr ? 20240607u : static_cast<std::uint32_t>(std::strtoul(given, nullptr, 10));
}

TEST(KvPoolPropertyTest, WithRoomForAllEveryMatchIsTheLongestCommonPrefixWithAnythingStored) {
  for (std::uint32_t round = 0; round < 4; ++round) {
    SCOPED_TRACE("KVSHARE_TEST_SEED=" + std::to_string(Seed() + round));
    RandomLives lives(Seed() + round, 6000);
    lives.compare_with_everything = true;
    for (int i = 0; i < 400 && !testing::Test::HasFailure(); ++i) lives.Step();
    lives.EndAll();
    EXPECT_EQ(lives.pool().usage().evictions, 0);
  }
}

TEST(KvPoolPropertyTest, UnderEvictionPressureNoMatchedRowIsEverWrong) {
  std::int64_t evictions = 0;
  for (std::uint32_t round = 0; round < 6; ++round) {
    SCOPED_TRACE("KVSHARE_TEST_SEED=" + std::to_string(Seed() + round));
    for (const std::string_view policy : EvictionPolicyNames()) {
      SCOPED_TRACE(policy);
      RandomLives lives(Seed() + round, 12 + 8 * round, policy);  // one sequence has up to 10 pages
      for (int i = 0; i < 700 && !testing::Test::HasFailure(); ++i) lives.Step();
      lives.EndAll();
      evictions += lives.pool().usage().evictions;
    }
  }
  EXPECT_GT(evictions, 400);
}

}  // namespace
}  // namespace kvshare::agentd

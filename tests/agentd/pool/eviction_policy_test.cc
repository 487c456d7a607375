// Policies against oracles that keep whole lists, and rules that every policy keeps.
#include "agentd/pool/eviction_policy.h"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace kvshare::agentd {
namespace {

std::uint32_t Seed() {
  const char* given = std::getenv("KVSHARE_TEST_SEED");
  return given == nullptr ? 20240607u : static_cast<std::uint32_t>(std::strtoul(given, nullptr, 10));
}

std::unique_ptr<EvictionPolicy> New(std::string_view name, std::size_t capacity) {
  return std::move(*NewEvictionPolicy(name, capacity));
}

// Blocks without chains, each its own slot: the textbook cache of one-block requests.
class FlatCache {
 public:
  FlatCache(std::string_view policy, std::size_t capacity) : policy_(New(policy, capacity)), capacity_(capacity) {}

  // Returns the block that went, if one did. What is asked for is never the one that goes.
  std::optional<BlockId> Ask(BlockId block) {
    const bool found = stored_.contains(block);
    std::optional<BlockId> gone;
    if (!found) {
      if (stored_.size() == capacity_) {
        gone = policy_->Victim();
        EXPECT_TRUE(stored_.contains(*gone));
        policy_->OnRemove(*gone, true);
        stored_.erase(*gone);
      }
      policy_->OnInsert(block, {.name = block + 100u, .tokens = 64});
      stored_.insert(block);
    }
    policy_->OnRequest({&block, 1}, found ? 1 : 0);
    policy_->SetEvictable(block, true);
    EXPECT_EQ(policy_->num_evictable(), stored_.size());
    return gone;
  }

 private:
  std::unique_ptr<EvictionPolicy> policy_;
  std::size_t capacity_;
  std::set<BlockId> stored_;
};

std::vector<BlockId> SkewedBlocks(std::mt19937& rng, int n) {
  std::vector<BlockId> blocks;
  for (int i = 0; i < n; ++i) {
    const int range = std::uniform_int_distribution<int>(0, 2)(rng) == 0 ? 200 : 12;
    blocks.push_back(static_cast<BlockId>(std::uniform_int_distribution<int>(0, range - 1)(rng)));
  }
  return blocks;
}

TEST(LruPolicyTest, EvictsWhatAListSaysWasUsedLongestAgo) {
  std::mt19937 rng(Seed());
  FlatCache cache("lru", 16);
  std::deque<BlockId> list;
  int evictions = 0;
  for (BlockId block : SkewedBlocks(rng, 3000)) {
    std::optional<BlockId> expected;
    const auto at = std::find(list.begin(), list.end(), block);
    if (at != list.end()) {
      list.erase(at);
    } else if (list.size() == 16) {
      expected = list.front();
      list.pop_front();
    }
    list.push_back(block);
    ASSERT_EQ(cache.Ask(block), expected);
    evictions += expected.has_value();
  }
  EXPECT_GT(evictions, 500);
}

// The paper's algorithm on plain queues.
class S3FifoOracle {
 public:
  explicit S3FifoOracle(std::size_t capacity)
      : capacity_(capacity), small_most_(std::max<std::size_t>(1, capacity / 10)) {}

  std::optional<BlockId> Ask(BlockId block) {
    if (uses_.contains(block)) {
      uses_[block] = std::min(uses_[block] + 1, 3);
      return std::nullopt;
    }
    std::optional<BlockId> gone;
    if (uses_.size() == capacity_) gone = Evict();
    const auto ghost = std::find(ghosts_.begin(), ghosts_.end(), block);
    if (ghost != ghosts_.end()) {
      ghosts_.erase(ghost);
      main_.push_back(block);
    } else {
      small_.push_back(block);
    }
    uses_[block] = 0;
    return gone;
  }

 private:
  BlockId Evict() {
    while (true) {
      const bool from_small = !small_.empty() && (small_.size() > small_most_ || main_.empty());
      auto& queue = from_small ? small_ : main_;
      const BlockId block = queue.front();
      queue.pop_front();
      int& uses = uses_[block];
      if (from_small && uses < 2) {
        ghosts_.push_back(block);
        if (ghosts_.size() > capacity_) ghosts_.pop_front();
      }
      if (from_small ? uses < 2 : uses == 0) {
        uses_.erase(block);
        return block;
      }
      uses = from_small ? 0 : uses - 1;
      main_.push_back(block);
    }
  }

  std::size_t capacity_, small_most_;
  std::deque<BlockId> small_, main_, ghosts_;
  std::map<BlockId, int> uses_;
};

TEST(S3FifoPolicyTest, IsThePapersAlgorithm) {
  std::mt19937 rng(Seed());
  FlatCache cache("s3fifo", 20);
  S3FifoOracle oracle(20);
  int evictions = 0;
  for (BlockId block : SkewedBlocks(rng, 4000)) {
    const auto expected = oracle.Ask(block);
    ASSERT_EQ(cache.Ask(block), expected);
    evictions += expected.has_value();
  }
  EXPECT_GT(evictions, 500);
}

TEST(CostPolicyTest, EvictsTheLeastWorthAndAgesTheRest) {
  std::mt19937 rng(Seed());
  FlatCache cache("cost", 16);
  std::map<BlockId, double> uses, rank;
  double age = 0;
  for (BlockId block : SkewedBlocks(rng, 3000)) {
    std::optional<BlockId> expected;
    const bool found = rank.contains(block);
    if (!found && rank.size() == 16) {
      const auto least = std::min_element(rank.begin(), rank.end(), [](const auto& a, const auto& b) {
        return a.second != b.second ? a.second < b.second : a.first < b.first;
      });
      expected = least->first;
      age = std::max(age, least->second);
      rank.erase(least);
    }
    uses[block] = found ? uses[block] + 1 : 0;
    rank[block] = age + 1 + uses[block];
    ASSERT_EQ(cache.Ask(block), expected);
  }
}

TEST(CostPolicyTest, ABlockWithMoreBeforeItIsDearer) {
  const auto policy = New("cost", 4);
  for (const BlockId block : {0u, 1u}) {
    policy->OnInsert(block, {.name = block, .depth = block == 0 ? 100u : 3u, .tokens = 64});
    policy->OnRequest({&block, 1}, 0);
    policy->SetEvictable(block, true);
  }
  EXPECT_EQ(policy->Victim(), 1u);
}

// Requests as the pool tells a policy about them: what is new is stored, the end can be evicted.
class Conversations {
 public:
  explicit Conversations(EvictionPolicy& policy) : policy_(policy) {}

  void Request(const std::vector<BlockId>& chain, std::size_t found) {
    for (std::size_t i = found; i < chain.size(); ++i) {
      const BlockId parent = i == 0 ? kNoBlock : chain[i - 1];
      policy_.OnInsert(chain[i],
                       {.name = chain[i], .parent = parent, .depth = static_cast<std::uint32_t>(i), .tokens = 64});
    }
    policy_.OnRequest(chain, found);
    for (std::size_t i = 0; i < chain.size(); ++i) policy_.SetEvictable(chain[i], i + 1 == chain.size());
  }

 private:
  EvictionPolicy& policy_;
};

TEST(ContinuationPolicyTest, AConversationThatWentOnOutlivesOlderAndNewerOnesThatDidNot) {
  const auto policy = New("default", 4000);
  Conversations conversations(*policy);
  conversations.Request({0, 1, 2}, 0);  // never continued
  conversations.Request({10, 11}, 0);
  conversations.Request({10, 11, 12}, 2);
  conversations.Request({10, 11, 12, 13}, 3);
  conversations.Request({20, 21, 22}, 0);
  conversations.Request({30, 31, 32}, 0);
  EXPECT_EQ(policy->Victim(), 2u);
  for (const BlockId block : {2u, 22u, 32u}) {
    EXPECT_EQ(policy->Victim(), block);
    policy->OnRemove(block, true);
  }
  EXPECT_EQ(policy->Victim(), 13u);
}

TEST(ContinuationPolicyTest, ABlockThatOnlyTheSamePromptCanUseGoesFirst) {
  const auto policy = New("default", 4000);
  Conversations conversations(*policy);
  conversations.Request({0, 1, 2}, 0);
  const BlockId open = 5;
  policy->OnInsert(open, {.name = 5, .tokens = 3, .open = true});
  policy->OnRequest({&open, 1}, 0);
  policy->SetEvictable(open, true);
  EXPECT_EQ(policy->Victim(), open);
}

TEST(ContinuationPolicyTest, AConversationThatComesBackIsStillOne) {
  const auto policy = New("default", 4000);
  Conversations conversations(*policy);
  conversations.Request({0, 1, 2}, 0);
  for (const BlockId block : {2u, 1u, 0u}) policy->OnRemove(block, true);
  conversations.Request({0, 1, 2, 3}, 0);  // all computed again, but known
  conversations.Request({10, 11, 12, 13}, 0);
  EXPECT_EQ(policy->Victim(), 13u);
}

// Random forests: leaves become evictable and go, in any order, with any policy.
TEST(EvictionPolicyPropertyTest, TheVictimIsAlwaysAnEvictableBlock) {
  for (const std::string_view name : EvictionPolicyNames()) {
    SCOPED_TRACE(std::string(name) + " KVSHARE_TEST_SEED=" + std::to_string(Seed()));
    std::mt19937 rng(Seed());
    const auto uniform = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
    const auto policy = New(name, 50);
    EXPECT_EQ(policy->name(), name);
    EXPECT_EQ(policy->Victim(), kNoBlock);
    std::set<BlockId> stored, evictable;
    for (int step = 0; step < 20000; ++step) {
      const auto block = static_cast<BlockId>(uniform(0, 79));
      const int what = uniform(0, 9);
      if (!stored.contains(block)) {
        policy->OnInsert(block, {.name = static_cast<std::uint64_t>(uniform(0, 300)),
                                 .depth = static_cast<std::uint32_t>(uniform(0, 30)),
                                 .tokens = static_cast<std::uint32_t>(uniform(1, 64)),
                                 .open = uniform(0, 9) == 0});
        stored.insert(block);
      } else if (what < 4) {
        std::vector<BlockId> chain;
        for (BlockId other : stored) {
          if (uniform(0, 9) == 0) chain.push_back(other);
        }
        policy->OnRequest(chain,
                          chain.empty() ? 0 : static_cast<std::size_t>(uniform(0, static_cast<int>(chain.size()))));
      } else if (what < 8) {
        const bool on = uniform(0, 2) > 0;
        policy->SetEvictable(block, on);
        on ? static_cast<void>(evictable.insert(block)) : static_cast<void>(evictable.erase(block));
      } else if (what < 9) {
        policy->OnRemove(block, uniform(0, 1) == 0);
        stored.erase(block);
        evictable.erase(block);
      }
      ASSERT_EQ(policy->num_evictable(), evictable.size());
      ASSERT_EQ(policy->IsEvictable(block), evictable.contains(block));
      const BlockId victim = policy->Victim();
      ASSERT_EQ(victim == kNoBlock, evictable.empty());
      ASSERT_TRUE(evictable.empty() || evictable.contains(victim));
    }
  }
}

TEST(EvictionPolicyTest, AnUnknownNameIsRefusedWithTheKnownOnes) {
  const auto policy = NewEvictionPolicy("clock", 4);
  ASSERT_FALSE(policy.ok());
  EXPECT_EQ(policy.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(policy.status().message().find("s3fifo"), std::string::npos);
}

}  // namespace
}  // namespace kvshare::agentd

// The ceilings beside a replay: the prefix tree against comparing everything with everything, LRU against a plain list,
// Belady against trying every choice on small cases.
#include "tools/trace/ceilings.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "tools/trace/prefix_tree.h"

namespace kvshare::trace {
namespace {

using Tokens = std::vector<TokenId>;

std::int64_t Common(const Tokens& a, const Tokens& b) {
  const std::size_t n = std::min(a.size(), b.size());
  std::size_t i = 0;
  while (i < n && a[i] == b[i]) ++i;
  return static_cast<std::int64_t>(i);
}

Tokens RandomTokens(std::mt19937& rng, std::size_t longest, int values) {
  Tokens tokens(1 + rng() % longest);
  for (TokenId& t : tokens) t = static_cast<TokenId>(rng() % static_cast<unsigned>(values));
  return tokens;
}

TEST(PrefixTreeTest, MatchesAsLongAndWithTheSameOwnersAsComparingEverything) {
  for (unsigned seed = 0; seed < 300; ++seed) {
    std::mt19937 rng(seed);
    PrefixTree tree;
    std::vector<std::pair<Tokens, int>> stored;
    for (int i = 0; i < 30; ++i) {
      const Tokens ids = RandomTokens(rng, 12, 2);
      std::vector<int> want;  // owner of each matched token: who brought a sequence with this beginning first
      for (std::size_t n = 1; n <= ids.size(); ++n) {
        const auto first = std::find_if(stored.begin(), stored.end(), [&](const auto& s) {
          return Common(s.first, ids) >= static_cast<std::int64_t>(n);
        });
        if (first == stored.end()) break;
        want.push_back(first->second);
      }
      std::vector<int> got;
      for (const PrefixTree::Run& run : tree.Match(ids))
        got.insert(got.end(), static_cast<std::size_t>(run.tokens), run.owner);
      ASSERT_EQ(got, want) << "seed " << seed << ", sequence " << i;
      tree.Insert(ids, i);
      stored.emplace_back(ids, i);
    }
  }
}

TEST(PrefixTreeTest, AVeryLongChainOfBranchesIsDestroyedWithoutDeepRecursion) {
  PrefixTree tree;
  Tokens ids(400);
  for (int i = 0; i < 400; ++i) {
    Tokens branch(ids.begin(), ids.begin() + i);
    branch.push_back(1);
    tree.Insert(branch, i);
    tree.Insert(Tokens(ids.begin(), ids.begin() + i + 1), i);
  }
  EXPECT_EQ(tree.Match(ids).size(), 400u);
}

// A prompt of whole pages, each filled with one value, and a last token that is nobody else's.
struct Workload {
  std::vector<Tokens> prompts;
  std::vector<std::vector<int>> pages;  // of each prompt, as indices of distinct chained pages
  int unique = 0;

  std::vector<CeilingRequest> Requests() const {
    std::vector<CeilingRequest> requests;
    for (const Tokens& prompt : prompts) requests.push_back({prompt, {}});
    return requests;
  }
};

Workload MakeWorkload(std::mt19937& rng, int requests, int longest, int values) {
  Workload workload;
  std::map<std::vector<int>, int> names;
  for (int r = 0; r < requests; ++r) {
    std::vector<int> path;
    Tokens prompt;
    std::vector<int> pages;
    for (int p = 0, n = static_cast<int>(rng() % static_cast<unsigned>(longest + 1)); p < n; ++p) {
      path.push_back(static_cast<int>(rng() % static_cast<unsigned>(values)));
      prompt.insert(prompt.end(), kCeilingPageTokens, path.back());
      pages.push_back(names.try_emplace(path, static_cast<int>(names.size())).first->second);
    }
    prompt.push_back(1000 + r);
    workload.prompts.push_back(prompt);
    workload.pages.push_back(pages);
  }
  workload.unique = static_cast<int>(names.size());
  return workload;
}

// The most pages that any cache of `capacity` pages can hit: every set of resident pages is tried after every request.
std::int64_t BestByBruteForce(const Workload& workload, int capacity) {
  std::map<unsigned, std::int64_t> best = {{0u, 0}};
  for (const std::vector<int>& pages : workload.pages) {
    std::map<unsigned, std::int64_t> next;
    unsigned asked = 0;
    for (int page : pages) asked |= 1u << page;
    for (const auto& [resident, hits] : best) {
      std::int64_t now = hits;
      for (std::size_t p = 0; p < pages.size() && (resident >> pages[p] & 1u) != 0; ++p) ++now;
      const unsigned all = resident | asked;
      for (unsigned kept = all;; kept = (kept - 1) & all) {
        if (std::popcount(kept) <= capacity) {
          auto [it, added] = next.try_emplace(kept, now);
          if (!added) it->second = std::max(it->second, now);
        }
        if (kept == 0) break;
      }
    }
    best = std::move(next);
  }
  std::int64_t most = 0;
  for (const auto& [resident, hits] : best) most = std::max(most, hits);
  return most;
}

TEST(CeilingsTest, BeladyIsTheBestOfAllChoices) {
  int compared = 0;
  for (unsigned seed = 0; seed < 400; ++seed) {
    std::mt19937 rng(seed);
    const Workload workload = MakeWorkload(rng, 6, 3, 2);
    if (workload.unique > 9) continue;
    const int capacity = 1 + static_cast<int>(rng() % 3);
    const Ceilings ceilings = ComputeCeilings(workload.Requests(), capacity);
    ASSERT_EQ(ceilings.belady_tokens, kCeilingPageTokens * BestByBruteForce(workload, capacity)) << "seed " << seed;
    ASSERT_LE(ceilings.lru_tokens, ceilings.belady_tokens) << "seed " << seed;
    ASSERT_LE(ceilings.belady_tokens, ceilings.unlimited_tokens) << "seed " << seed;
    ++compared;
  }
  EXPECT_GT(compared, 200);
}

TEST(CeilingsTest, LruIsAPlainListOfPages) {
  for (unsigned seed = 0; seed < 100; ++seed) {
    std::mt19937 rng(seed);
    const Workload workload = MakeWorkload(rng, 30, 4, 2);
    const std::size_t capacity = 2 + rng() % 12;
    std::vector<int> list;  // oldest first; negative: the slots of the last, partly filled pages
    std::int64_t hits = 0;
    for (std::size_t r = 0; r < workload.pages.size(); ++r) {
      std::vector<int> pages = workload.pages[r];
      for (int page : pages) {
        if (std::find(list.begin(), list.end(), page) == list.end()) break;
        ++hits;
      }
      pages.push_back(-1 - static_cast<int>(r));
      for (std::size_t p = pages.size(); p-- > 0;) {
        std::erase(list, pages[p]);
        list.push_back(pages[p]);
      }
      if (list.size() > capacity) list.erase(list.begin(), list.end() - static_cast<std::ptrdiff_t>(capacity));
    }
    ASSERT_EQ(ComputeCeilings(workload.Requests(), static_cast<std::int64_t>(capacity)).lru_tokens,
              hits * kCeilingPageTokens)
        << "seed " << seed;
  }
}

TEST(CeilingsTest, AnUnlimitedPoolIsTheExactCeilingToTheToken) {
  for (unsigned seed = 0; seed < 50; ++seed) {
    std::mt19937 rng(seed);
    std::vector<Tokens> prompts, outputs;
    std::vector<Tokens> stored;
    std::int64_t want = 0;
    for (int r = 0; r < 25; ++r) {
      Tokens prompt = stored.empty() || rng() % 3 == 0 ? Tokens{} : stored[rng() % stored.size()];
      prompt.resize(std::min<std::size_t>(prompt.size(), rng() % 300));
      const Tokens more = RandomTokens(rng, 150, 3);
      prompt.insert(prompt.end(), more.begin(), more.end());
      const Tokens output = RandomTokens(rng, 5, 3);
      std::int64_t best = 0;
      for (const Tokens& s : stored) best = std::max(best, Common(s, prompt));
      want += std::min(best, static_cast<std::int64_t>(prompt.size()) - 1);
      Tokens kept = prompt;
      kept.insert(kept.end(), output.begin(), output.end() - 1);
      stored.push_back(kept);
      prompts.push_back(prompt);
      outputs.push_back(output);
    }
    std::vector<CeilingRequest> requests;
    for (std::size_t r = 0; r < prompts.size(); ++r) requests.push_back({prompts[r], outputs[r]});
    const Ceilings ceilings = ComputeCeilings(requests, 1 << 20);
    ASSERT_EQ(ceilings.unlimited_tokens, want) << "seed " << seed;
    ASSERT_EQ(ceilings.lru_tokens, want) << "seed " << seed;
    ASSERT_EQ(ceilings.belady_tokens, want) << "seed " << seed;
    EXPECT_EQ(ComputeCeilings(requests, 0).belady_tokens, ComputeCeilings(requests, 0).lru_tokens);
  }
}

}  // namespace
}  // namespace kvshare::trace

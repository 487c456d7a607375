#include "agentd/repair/order.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <span>
#include <vector>

#include "tests/testing/ids.h"

namespace kvshare::agentd {
namespace {

using Ids = std::vector<TokenId>;
using testing::Join;

class OrderTest : public ::testing::Test {
 protected:
  Ids Random(int count) { return testing::RandomIds(rng_, count, 999); }
  std::mt19937 rng_{11};
  const Ids role_ = Random(40), other_role_ = Random(40), a_ = Random(50), b_ = Random(60);
};

TEST_F(OrderTest, WhatStoodBeforeAndComesLaterWasSeen) {
  const Ids here = Join({role_, a_, b_, Random(10)});
  const Ids there = Join({other_role_, b_, a_});
  const std::vector<std::int64_t> latest = FirstPlaces(here).SeenIn(there, 40).latest;
  ASSERT_EQ(latest.size(), there.size() + 1);
  EXPECT_EQ(latest[40], -1);             // b saw another's first words alone
  EXPECT_EQ(latest[55], -1);             // less than a phrase
  EXPECT_EQ(latest[56], 90);             // a phrase of b, which begins at 90 here
  EXPECT_EQ(latest[100], 90 + 60 - 16);  // a saw all of b,
  EXPECT_GE(latest[100], 40 + 50);       // which comes after a here
  EXPECT_EQ(latest.back(), 90 + 60 - 16);
}

TEST_F(OrderTest, TheSameOrderHasSeenNothingLater) {
  const Ids here = Join({role_, a_, Random(5), b_});
  const Ids there = Join({other_role_, a_, Random(8), b_});
  const std::vector<std::int64_t> latest = FirstPlaces(here).SeenIn(there, 40).latest;
  EXPECT_EQ(latest[40], -1);
  EXPECT_LT(latest[98], 95);  // b saw a, which comes before it here too
}

TEST_F(OrderTest, WhatComesBeforeAndAgainCountsAsBefore) {
  const Ids here = Join({b_, a_, b_});
  const Ids there = Join({b_, a_});
  EXPECT_LT(FirstPlaces(here).SeenIn(there, 0).latest[60], 60);
}

TEST_F(OrderTest, WhatStandsNowhereWasSeenBeyondTheRole) {
  const auto latest = [&](int role, const Ids& in_front) {
    const Ids there = Join({Random(role), in_front, a_, b_});
    return FirstPlaces(Join({role_, a_, b_, Random(10)})).SeenIn(there, role).latest.back();
  };
  const std::int64_t all = 40 + 50 + 60 - 16;  // the last phrase of b
  EXPECT_EQ(latest(300, {}), all);
  EXPECT_EQ(latest(300, Random(32)), all) << "a task";
  EXPECT_EQ(latest(300, Random(33)), FirstPlaces::kNowhere);
  EXPECT_EQ(latest(10, Random(33)), FirstPlaces::kNowhere);
  EXPECT_EQ(latest(0, Join({a_, Random(12)})), all) << "a header";
  EXPECT_EQ(latest(0, Join({a_, Random(13)})), FirstPlaces::kNowhere) << "a short message, behind what is known";
  EXPECT_EQ(latest(0, Join({Random(32), a_, Random(12), a_, Random(12)})), all) << "little in each place";
}

// Roles may end alike, and tasks begin alike: phrases of which are no message of what is shared.
TEST_F(OrderTest, ATaskMayBeginAsOursDoes) {
  const Ids alike = Random(15 + 16), task = Random(20), other_task = Random(20);
  const auto saw = [&](int in_role, int in_task) {
    const auto part = [](Ids::const_iterator from, int count) { return Ids(from, from + count); };
    const Ids end = part(alike.begin(), in_role), begin = part(alike.begin() + in_role, in_task);
    const Ids here = Join({Random(40), end, begin, task, b_, Random(20)});
    const Ids there = Join({Random(40), end, begin, other_task, b_});
    const FirstPlaces places(here);
    const std::int64_t base = static_cast<std::int64_t>(there.size()) - 60;
    return places.SawOther(places.SeenIn(there, 40 + in_role), there, base, base, base + 60);
  };
  EXPECT_FALSE(saw(0, 0));
  EXPECT_FALSE(saw(11, 5));
  EXPECT_FALSE(saw(15, 15));
  EXPECT_TRUE(saw(15, 16)) << "a phrase of its own";
}

// Right before the chunk a phrase may go on into it: there what both prompts share next to it decides.
TEST_F(OrderTest, WhatStandsNowhereWasSeenRightBeforeToo) {
  const Ids header = Random(5);
  const auto saw = [&](const Ids& before, const Ids& header_there) {
    const Ids there = Join({Random(12), a_, before, header_there, b_}),
              here = Join({role_, a_, header, b_, Random(20)});
    const FirstPlaces places(here);
    const std::int64_t start = 40 + 50 + 5, base = static_cast<std::int64_t>(there.size()) - 60;
    return places.SawOther(places.SeenIn(there, 12), there, base, start, start + 60);
  };
  EXPECT_FALSE(saw({}, header));
  EXPECT_FALSE(saw({}, Random(12))) << "another header";
  EXPECT_TRUE(saw({}, Random(13)));
  EXPECT_FALSE(saw(Random(12), header));
  EXPECT_TRUE(saw(Random(13), header)) << "too short for a phrase beyond what may differ";
  EXPECT_TRUE(saw(Random(47), header));
  EXPECT_TRUE(saw(Random(300), header));
}

TEST_F(OrderTest, ThePromptsBeginningEndsWhatIsShared) {
  for (const int before : {0, 32, 33}) {
    // In memory the same tokens stand before the prompt, too.
    const Ids there = Join({Random(before), a_}), memory = Join({there, Random(20)});
    const FirstPlaces places(std::span<const TokenId>(memory).subspan(static_cast<std::size_t>(before)));
    EXPECT_EQ(places.SawOther(places.SeenIn(there, 0), there, before, 0, 50), before > 32) << before;
  }
}

TEST_F(OrderTest, ShortPromptsHaveNoPhrases) {
  EXPECT_EQ(FirstPlaces({}).SeenIn({}, 0).latest, std::vector<std::int64_t>{-1});
  const Ids few = Random(FirstPlaces::kPhrase - 1);
  EXPECT_EQ(FirstPlaces(few).SeenIn(few, 0).latest, std::vector<std::int64_t>(few.size() + 1, -1));
}

// Every answer was computed behind the header that ends a prompt. Where the text before that header was the same then,
// nothing that comes later has been seen.
TEST_F(OrderTest, TheHeaderOfTheNextAnswerIsNoMessage) {
  const Ids header = Random(FirstPlaces::kHeader), refrain = Random(20);
  const Ids there = Join({role_, a_, refrain, header, b_});
  const Ids here = Join({role_, a_, refrain, b_, refrain, header});
  EXPECT_EQ(FirstPlaces(here).SeenIn(there, 40).latest[40 + 50 + 20 + 8], 40 + 50 + 20 - 16);
}

// Against the definition, over texts that repeat themselves.
TEST_F(OrderTest, IsTheGreatestFirstPlace) {
  for (int round = 0; round < 20; ++round) {
    std::vector<Ids> parts;
    for (int i = 0; i < 6; ++i) parts.push_back(Random(10 + i * 4));
    Ids here, there;
    for (int i = 0; i < 8; ++i) {
      const Ids& part = parts[rng_() % parts.size()];
      here.insert(here.end(), part.begin(), part.end());
      const Ids& other = parts[rng_() % parts.size()];
      there.insert(there.end(), other.begin(), other.end());
    }
    const FirstPlaces::Seen seen = FirstPlaces(here).SeenIn(there, 0);
    std::int64_t expected = -1, unknown = 0;  // places, one after the other, where no phrase of the prompt ends
    bool behind_role = true;
    for (std::size_t b = 0; b <= there.size(); ++b) {
      unknown += b > 0;
      if (b >= 16) {
        const auto end = here.end() - FirstPlaces::kHeader;
        const auto at = std::search(here.begin(), end, there.begin() + static_cast<std::ptrdiff_t>(b - 16),
                                    there.begin() + static_cast<std::ptrdiff_t>(b));
        if (at != end) expected = std::max<std::int64_t>(expected, at - here.begin());
        if (at != end) unknown = 0;
        if (at != end) behind_role = false;
      }
      if (unknown >= (behind_role ? 32 : 12) + 16) expected = FirstPlaces::kNowhere;
      ASSERT_EQ(seen.latest[b], expected) << b;
      ASSERT_EQ(seen.known[b], static_cast<std::int64_t>(b) - unknown) << b;
    }
  }
}

}  // namespace
}  // namespace kvshare::agentd

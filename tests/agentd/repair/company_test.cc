#include "agentd/repair/company.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "tests/testing/ids.h"

namespace kvshare::agentd {
namespace {

using Ids = std::vector<TokenId>;
using testing::Join;

class InCompanyTest : public ::testing::Test {
 protected:
  Ids Random(int count) { return testing::RandomIds(rng_, count, 9999); }

  // Where nothing is known of the other prompt's role.
  static bool InCompany(const Ids& here, const Ids& there, std::int64_t lead) {
    return agentd::InCompany(here, lead, there, static_cast<std::int64_t>(there.size()));
  }

  std::mt19937 rng_{3};
  const Ids note_ = Random(150), answer_ = Random(80);
};

TEST_F(InCompanyTest, FirstWordsMayBeAnyIfTheyAreAboutAsMany) {
  EXPECT_TRUE(InCompany(Random(40), Random(40), 40));
  EXPECT_TRUE(InCompany(Random(40), Random(72), 40));
  EXPECT_TRUE(InCompany(Random(72), Random(40), 72));
  EXPECT_FALSE(InCompany(Random(40), Random(73), 40));
  EXPECT_FALSE(InCompany(Random(73), Random(40), 73));
  EXPECT_TRUE(InCompany({}, {}, 0));
}

TEST_F(InCompanyTest, WhatStandsBetweenMustBeTheSameButForALittle) {
  const Ids head = Random(50), other_head = Random(60);
  const auto with = [&](const Ids& between_here, const Ids& between_there) {
    return InCompany(Join({head, note_, between_here, answer_, Random(5)}),
                     Join({other_head, note_, between_there, answer_, Random(3)}), 50);
  };
  EXPECT_TRUE(with({}, {}));
  EXPECT_TRUE(with(Random(6), Random(12)));
  EXPECT_TRUE(with(Random(12), {}));
  EXPECT_TRUE(with({}, Random(12)));
  EXPECT_FALSE(with(Random(13), {})) << "something put in";
  EXPECT_FALSE(with({}, Random(13))) << "something left out";
  EXPECT_FALSE(with(Random(60), Random(60))) << "something changed";
}

TEST_F(InCompanyTest, BehindTheRoleATaskMayBeAnother) {
  const Ids head = Random(50), other_head = Random(50);
  const auto with = [&](int task_here, int task_there) {
    return InCompany(Join({head, Random(task_here), note_}), Join({other_head, Random(task_there), note_}), 50);
  };
  EXPECT_TRUE(with(32, 32));
  EXPECT_TRUE(with(32, 0));
  EXPECT_FALSE(with(33, 33));
}

TEST_F(InCompanyTest, WhatFollowsTheOtherRoleIsNotARole) {
  // There is a role of 60 tokens and a document of 90; here a role as long as both.
  const Ids here = Join({Random(150), note_}), there = Join({Random(60), Random(90), note_});
  EXPECT_TRUE(agentd::InCompany(here, 150, there, 150));
  EXPECT_FALSE(agentd::InCompany(here, 150, there, 60));
  EXPECT_TRUE(agentd::InCompany(here, 150, there, 118)) << "a header's worth may be left";
  EXPECT_FALSE(agentd::InCompany(here, 150, there, 117));
}

TEST_F(InCompanyTest, OrderMatters) {
  const Ids head = Random(50);
  EXPECT_TRUE(InCompany(Join({head, note_, answer_}), Join({head, note_, answer_}), 50));
  EXPECT_FALSE(InCompany(Join({head, note_, answer_}), Join({head, answer_, note_}), 50));
  EXPECT_FALSE(InCompany(Join({head, note_, answer_}), Join({head, note_}), 50))
      << "it stood before what is here before";
  EXPECT_FALSE(InCompany(Join({head, note_}), Join({head, note_, answer_}), 50));
}

TEST_F(InCompanyTest, SmallDifferencesAddUpWhereTheyAreFarApart) {
  // Ten messages with other headers, each of other length.
  Ids here = Random(40), there = Random(50);
  for (int i = 0; i < 10; ++i) {
    const Ids message = Random(60);
    here = Join({here, Random(4 + i % 3), message});
    there = Join({there, Random(5 + i % 4), message});
  }
  EXPECT_TRUE(InCompany(here, there, 40));
}

TEST_F(InCompanyTest, RepeatingTextIsNotTakenForMore) {
  Ids loop;
  for (int i = 0; i < 300; ++i) loop.push_back(i % 3);
  const Ids head = Random(40);
  EXPECT_TRUE(InCompany(Join({head, loop}), Join({head, loop}), 40));
  EXPECT_FALSE(InCompany(Join({head, loop}), Join({head, loop, loop}), 40));
}

TEST(PromptCompany, NothingInCompanyIsFirstWordsToWhatFollows) {
  std::mt19937 rng{5};
  const RoleMarks marks = {.ends = {7}};
  const Ids note = testing::RandomIds(rng, 60), rest = testing::RandomIds(rng, 60);
  // A raw prompt, so that its first words are a header's worth at most, and one whose first message ends in the note.
  const auto first_words = [&](int tokens) { return Ids(static_cast<std::size_t>(tokens), 9); };
  const Ids here = Join({first_words(20), note, rest, {7}});
  PromptCompany company(here, marks);
  const Ids with_note = Join({first_words(30), note, rest, {7}}), without = Join({first_words(90), rest, {7}});
  EXPECT_TRUE(company.InCompany(80, without, 90)) << "all that stands before may be the role";
  EXPECT_TRUE(company.InCompany(20, with_note, 30));
  EXPECT_FALSE(company.InCompany(80, without, 90)) << "the note stands here, and is in company";
  EXPECT_TRUE(company.InCompany(80, with_note, 90));
}

TEST(PromptCompany, ThePromptsEndIsCut) {
  const Ids here(200, 1);
  const RoleMarks none;
  const PromptCompany company(here, none);
  EXPECT_EQ(company.Tail(50, 184, 32), 0) << "enough follows it";
  EXPECT_EQ(company.Tail(50, 185, 32), 17);
  EXPECT_EQ(company.Tail(50, 199, 32), 31);
  EXPECT_EQ(company.Tail(136, 199, 32), 31);
  EXPECT_EQ(company.Tail(137, 199, 32), 62) << "too little would be left";
  EXPECT_EQ(company.Tail(180, 199, 32), 19);
}

TEST(Strays, AreComputedWhereTheyAreTheLesserPart) {
  using Indices = std::vector<std::size_t>;
  EXPECT_EQ(Strays({}), Indices{});
  EXPECT_EQ(Strays(std::vector<ChunkCompany>{{100, true}, {40, false}, {60, false}}), (Indices{1, 2}));
  EXPECT_EQ(Strays(std::vector<ChunkCompany>{{100, true}, {41, false}, {60, false}}), Indices{});
  EXPECT_EQ(Strays(std::vector<ChunkCompany>{{100, true}, {41, true}}), Indices{});
  EXPECT_EQ(Strays(std::vector<ChunkCompany>{{100, false}}), Indices{});
}

TEST(Strays, AreAlwaysThoseThatSawWhatComesLater) {
  using Indices = std::vector<std::size_t>;
  EXPECT_EQ(Strays(std::vector<ChunkCompany>{{100, true, true}}), Indices{0});
  EXPECT_EQ(Strays(std::vector<ChunkCompany>{{500, false, true}, {90, true}, {50, false}}), (Indices{0, 2}));
  EXPECT_EQ(Strays(std::vector<ChunkCompany>{{500, true, true}, {40, true}, {50, false}}), Indices{0});
}

}  // namespace
}  // namespace kvshare::agentd

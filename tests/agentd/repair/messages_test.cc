// What KVCOMM's mode finds: messages, each at a place and from a run that are the same from one task to the next.
#include "agentd/repair/messages.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "tests/testing/ids.h"

namespace kvshare::agentd {
namespace {

using Ids = std::vector<TokenId>;
using testing::Join;

constexpr TokenId kEnd = 9000;
constexpr std::int64_t kEdge = 2, kMin = 36;

class MessagesTest : public ::testing::Test {
 protected:
  Ids Random(std::size_t size) {
    Ids ids(size);
    for (TokenId& id : ids) id = static_cast<TokenId>(rng_() % 5000);
    return ids;
  }
  static Ids Message(const Ids& header, const Ids& text) { return Join({header, text, {kEnd}}); }

  std::vector<Recurrence> Find(const Ids& prompt, std::int64_t from) const {
    const Messages messages(prompt, ends_);
    return messages.Find(book_, "s", from, static_cast<std::int64_t>(prompt.size()) - 1, kMin, kEdge,
                         ReuseMode::kKvcomm);
  }
  std::uint32_t Source(const Recurrence& r) const { return book_.source("s", r.run); }

  std::mt19937 rng_{3};
  SessionBook book_;
  const Ids ends_ = {kEnd};
  const Ids user_ = Random(4), quoted_ = Random(9), assistant_ = Random(4);
};

TEST_F(MessagesTest, AChainFindsTaskAndAnswersWhereTheyWereFirst) {
  const Ids task = Random(300), first = Random(100), second = Random(120);
  const Ids roles[] = {Message(user_, Random(50)), Message(user_, Random(70)), Message(user_, Random(60))};
  const Ids asked = Message(user_, task);
  book_.Record("s", Join({roles[0], asked, assistant_, first}), 1);
  // The second reads what the first has written, and so has all of it in one run.
  book_.Record("s", Join({roles[1], asked, Message(quoted_, first), assistant_, second}), 2);
  const Ids prompt = Join({roles[2], asked, Message(quoted_, first), Message(quoted_, second), assistant_});
  const auto role = static_cast<std::int64_t>(roles[2].size());
  const std::int64_t begins[] = {role, role + 305, role + 305 + 110};
  const std::uint32_t sources[] = {1, 1, 2};
  // However much of the task stood in an earlier one.
  for (const std::int64_t again : {0, 3, 30, 60}) {
    const auto found = Find(prompt, role + again);
    ASSERT_EQ(found.size(), 3u) << again;
    for (std::size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(found[i].start + kEdge, begins[i] + kMessageStep) << i;
      EXPECT_EQ(Source(found[i]), sources[i]) << i;
    }
    EXPECT_EQ(found[0].start + found[0].length, begins[1]) << "with its end";
    EXPECT_EQ(found[1].start + found[1].length, begins[2] - 1) << "written without";
  }
  const Messages messages(prompt, ends_);
  EXPECT_EQ(messages.PlaceOf(0), "0+0");
  EXPECT_EQ(messages.PlaceOf(begins[2] + 16), "3+16");
}

TEST_F(MessagesTest, AnAnswerThatRepeatsAnotherIsFoundAsItself) {
  const Ids task = Random(300), answer = Random(100);
  const Ids role = Message(user_, Random(50)), asked = Message(user_, task);
  for (const bool other_task_before : {false, true}) {
    book_.Clear();
    if (other_task_before) book_.Record("s", Join({role, Message(user_, Random(300)), assistant_, answer}), 3);
    book_.Record("s", Join({role, asked, assistant_, answer}), 1);
    book_.Record("s", Join({role, asked, Message(quoted_, answer), assistant_, answer}), 2);
    const Ids prompt =
        Join({Message(user_, Random(40)), asked, Message(quoted_, answer), Message(quoted_, answer), assistant_});
    const auto found = Find(prompt, 45);
    ASSERT_EQ(found.size(), 3u);
    EXPECT_EQ(Source(found[1]), 1u);
    EXPECT_EQ(Source(found[2]), 2u);
  }
}

TEST_F(MessagesTest, WhatIsStoredIsNotFoundAgain) {
  const Ids task = Random(300), role = Message(user_, Random(50));
  book_.Record("s", Join({role, Message(user_, task)}), 1);
  book_.Record("s", Join({Random(20), Message(user_, task)}), 2);
  const Ids prompt = Join({role, Message(user_, task), assistant_});
  const auto begin = static_cast<std::int64_t>(role.size());
  const auto late = Find(prompt, begin + 100);
  ASSERT_EQ(late.size(), 1u);
  EXPECT_GE(late[0].start, begin + 100);
  EXPECT_EQ((late[0].start + kEdge - begin) % kMessageStep, 0);
  EXPECT_TRUE(Find(prompt, begin + 290).empty());
  // The stored beginning of a message that goes on otherwise.
  const Ids other = Join({role, Message(user_, Join({Ids(task.begin(), task.begin() + 50), Random(200)})), assistant_});
  EXPECT_TRUE(Find(other, begin + 54).empty());
}

TEST_F(MessagesTest, OfAMessageThatIsMostlyNewThereIsNothing) {
  const Ids table = Random(100);
  book_.Record("s", Join({Random(40), table, Random(40)}), 1);
  EXPECT_TRUE(Find(Join({Message(user_, Random(50)), Message(user_, Join({Random(200), table}))}), 0).empty());
  const Ids mostly = Join({Message(user_, Random(50)), Message(user_, Join({Random(60), table}))});
  EXPECT_EQ(Find(mostly, 0).size(), 1u);
}

TEST_F(MessagesTest, APromptWithoutEndsIsOneMessage) {
  const Ids note = Random(200);
  book_.Record("s", Join({Random(40), note, Random(40)}), 1);
  const Ids prompt = Join({Random(45), note, Random(12)});
  const auto found = Find(prompt, 0);
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].start + kEdge, 48);
  EXPECT_EQ(Messages(prompt, ends_).PlaceOf(48), "0+48");
}

}  // namespace
}  // namespace kvshare::agentd

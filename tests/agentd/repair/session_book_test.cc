// The session book against a brute-force search: every run it names is there, and none that is long enough is missed.
#include "agentd/repair/session_book.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace kvshare::agentd {
namespace {

constexpr std::int64_t kMin = SessionBook::kWindow + SessionBook::kStride - 1;

std::vector<TokenId> Random(std::mt19937& rng, std::size_t size, TokenId vocab) {
  std::vector<TokenId> ids(size);
  for (TokenId& id : ids) id = static_cast<TokenId>(rng() % static_cast<unsigned>(vocab));
  return ids;
}

std::vector<TokenId> Joined(std::initializer_list<std::vector<TokenId>> parts) {
  std::vector<TokenId> ids;
  for (const auto& part : parts) ids.insert(ids.end(), part.begin(), part.end());
  return ids;
}

TEST(SessionBookTest, FindsARunAtAnotherOffsetAsLongAsItIs) {
  std::mt19937 rng(1);
  for (const std::int64_t length : {kMin, kMin + 1, std::int64_t{64}, std::int64_t{301}}) {
    const auto note = Random(rng, static_cast<std::size_t>(length), 5000);
    for (std::size_t offset = 0; offset < 9; ++offset) {
      SessionBook book;
      book.Record("s", Joined({Random(rng, offset, 5000), note, Random(rng, 20, 5000)}), 7);
      const auto prompt = Joined({Random(rng, 13, 5000), note, Random(rng, 5, 5000)});
      const auto found = book.Find("s", prompt, 0, static_cast<std::int64_t>(prompt.size()), kMin, ReuseMode::kAuto);
      ASSERT_EQ(found.size(), 1u) << "length " << length << " offset " << offset;
      EXPECT_LE(found[0].start, 13);
      EXPECT_GE(found[0].start + found[0].length, 13 + length);
      EXPECT_EQ(book.source("s", found[0].run), 7u);
    }
  }
}

TEST(SessionBookTest, OtherSessionsSeeNothing) {
  std::mt19937 rng(2);
  const auto note = Random(rng, 100, 5000);
  SessionBook book;
  book.Record("a", note, 1);
  EXPECT_TRUE(book.Find("b", note, 0, 100, kMin, ReuseMode::kAuto).empty());
  EXPECT_FALSE(book.Find("a", note, 0, 100, kMin, ReuseMode::kAuto).empty());
}

TEST(SessionBookTest, AgreesWithBruteForceOnSmallVocabularies) {
  std::mt19937 rng(3);
  for (int round = 0; round < 60; ++round) {
    SessionBook book;
    std::vector<std::vector<TokenId>> runs;
    for (int r = 0; r < 3; ++r) runs.push_back(Random(rng, 40 + rng() % 160, 3000));
    std::vector<TokenId> prompt = Random(rng, rng() % 40, 3000);
    for (int piece = 0; piece < 4; ++piece) {
      const auto& run = runs[rng() % runs.size()];
      const std::size_t from = rng() % run.size();
      const std::size_t count = std::min<std::size_t>(rng() % 90, run.size() - from);
      prompt.insert(prompt.end(), run.begin() + static_cast<std::ptrdiff_t>(from),
                    run.begin() + static_cast<std::ptrdiff_t>(from + count));
      const auto between = Random(rng, rng() % 20, 3000);
      prompt.insert(prompt.end(), between.begin(), between.end());
    }
    for (const auto& run : runs) book.Record("s", run, 0);
    const auto size = static_cast<std::int64_t>(prompt.size());
    const auto found = book.Find("s", prompt, 0, size, kMin, ReuseMode::kAuto);
    std::vector<bool> covered(prompt.size());
    std::int64_t end = 0;
    for (const Recurrence& r : found) {
      EXPECT_GE(r.start, end);
      EXPECT_GE(r.length, kMin);
      end = r.start + r.length;
      const auto tokens = book.tokens("s", r.run);
      for (std::int64_t t = 0; t < r.length; ++t) {
        EXPECT_EQ(prompt[static_cast<std::size_t>(r.start + t)], tokens[static_cast<std::size_t>(r.base + t)]);
        covered[static_cast<std::size_t>(r.start + t)] = true;
      }
    }
    // Every run of kMin tokens that occurs somewhere touches what was found: none is wholly missed.
    for (std::int64_t at = 0; at + kMin <= size; ++at) {
      const auto begin = prompt.begin() + at;
      const bool occurs = std::any_of(runs.begin(), runs.end(), [&](const auto& run) {
        return std::search(run.begin(), run.end(), begin, begin + kMin) != run.end();
      });
      if (!occurs) continue;
      const auto first = covered.begin() + at;
      EXPECT_TRUE(std::any_of(first, first + kMin, [](bool c) { return c; })) << "round " << round << " at " << at;
    }
  }
}

TEST(SessionBookTest, ARunThatGrowsTakesThePlaceOfItsBeginning) {
  std::mt19937 rng(4);
  const auto all = Random(rng, 200, 5000);
  SessionBook book;
  book.Record("s", std::span(all).first(100), 1);
  EXPECT_EQ(book.recorded_tokens(), 100u);
  book.Record("s", all, 2);
  EXPECT_EQ(book.recorded_tokens(), 200u);
  book.Record("s", std::span(all).first(150), 3);
  EXPECT_EQ(book.recorded_tokens(), 200u);
  const auto found = book.Find("s", all, 0, 200, kMin, ReuseMode::kAuto);
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].length, 200);
}

// KVCOMM's: an answer is taken from where it was written, whoever has read it since, whole or nearly so.
TEST(SessionBookTest, TheFirstRunIsFoundWhereItIsWanted) {
  std::mt19937 rng(12);
  const auto answer = Random(rng, 100, 5000);
  SessionBook book;
  book.Record("s", Joined({Random(rng, 90, 5000), std::vector<TokenId>(answer.begin() + 3, answer.end() - 3)}), 1);
  book.Record("s", Joined({Random(rng, 9, 5000), answer, Random(rng, 20, 5000)}), 2);
  const auto prompt = Joined({Random(rng, 40, 5000), answer, Random(rng, 5, 5000)});
  const auto source = [&](const SessionBook::Rank& rank) {
    const auto size = static_cast<std::int64_t>(prompt.size());
    const auto found = book.Find("s", prompt, 0, size, kMin, ReuseMode::kKvcomm, SessionBook::kNone, rank);
    EXPECT_EQ(found.size(), 1u);
    return found.empty() ? 0 : book.source("s", found[0].run);
  };
  EXPECT_EQ(source(nullptr), 2u);
  EXPECT_EQ(source([](std::span<const TokenId>) { return 0u; }), 1u);
  EXPECT_EQ(source([](std::span<const TokenId>) { return 2u; }), 1u);
  EXPECT_EQ(source([](std::span<const TokenId> before) { return before.size() == 9 ? 1u : 3u; }), 2u);
}

TEST(SessionBookTest, WhatIsHealedIsAsOldAsItWas) {
  std::mt19937 rng(13);
  const auto answer = Random(rng, 100, 5000);
  SessionBook book;
  KeptKv kept{.name = 5, .mode = ReuseMode::kKvcomm};
  kept.prompt = std::make_shared<const std::vector<TokenId>>(answer);
  book.RecordKept("s", 100, 1, kept);
  book.Record("s", Joined({Random(rng, 9, 5000), answer}), 2);
  const std::uint64_t since = book.ForgetKept("s", 5);
  EXPECT_NE(since, 0u);
  EXPECT_EQ(book.ForgetKept("s", 5), 0u);
  book.Record("s", Joined({Random(rng, 50, 5000), answer}), 1, since);
  const auto found = book.Find("s", answer, 0, 100, kMin, ReuseMode::kKvcomm, SessionBook::kNone,
                               [](std::span<const TokenId>) { return 2u; });
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(book.source("s", found[0].run), 1u);
}

// Small models repeat themselves, and each other.
TEST(SessionBookTest, RepetitionIsFoundAtItsOwnPlace) {
  std::mt19937 rng(10);
  for (const std::size_t period : {5u, 28u, 31u}) {
    SCOPED_TRACE("a round of " + std::to_string(period));
    const auto round = Random(rng, period, 5000);
    std::vector<TokenId> answer;
    while (answer.size() < 200) answer.insert(answer.end(), round.begin(), round.end());
    // Two prompts that end in the same answer, the second after the first's.
    auto first = Random(rng, 101, 5000);
    const auto header = Random(rng, 7, 5000);
    first.insert(first.end(), answer.begin(), answer.end());
    auto second = first;
    second.insert(second.end(), header.begin(), header.end());
    const auto prompt = std::make_shared<const std::vector<TokenId>>([&] {
      auto all = second;
      all.insert(all.end(), answer.begin(), answer.end());
      return all;
    }());
    SessionBook book;
    book.Record("s", first, 0);
    book.RecordKept("s", static_cast<std::int64_t>(answer.size()), 1,
                    {.name = 1, .prompt = prompt, .position = static_cast<std::int64_t>(second.size())});
    // A third, whose header between the two is another.
    auto third = first;
    const auto other = Random(rng, 9, 5000);
    third.insert(third.end(), other.begin(), other.end());
    third.insert(third.end(), answer.begin(), answer.end());
    const auto found = book.Find("s", third, 0, static_cast<std::int64_t>(third.size()), kMin, ReuseMode::kAuto);
    ASSERT_EQ(found.size(), 2u);
    EXPECT_EQ(found[0].length, static_cast<std::int64_t>(first.size()));
    EXPECT_EQ(found[1].length, static_cast<std::int64_t>(answer.size()));
    EXPECT_EQ(found[1].base, 0);
    EXPECT_NE(book.kept("s", found[1].run), nullptr) << "the first answer was taken for the second";
  }
}

// Three answers of one run that go round in the same words, the last from its first word on.
TEST(SessionBookTest, TheThirdOfThreeThatRepeatEachOtherIsFoundAtItsOwnPlace) {
  std::mt19937 rng(11);
  for (const std::size_t period : {5u, 17u, 28u, 31u}) {
    SCOPED_TRACE("a round of " + std::to_string(period));
    const auto round = Random(rng, period, 5000);
    const auto circles = [&round](std::size_t size) {
      std::vector<TokenId> ids;
      while (ids.size() < size) ids.insert(ids.end(), round.begin(), round.end());
      ids.resize(size);
      return ids;
    };
    const auto task = Joined({Random(rng, 101, 5000), circles(330), Random(rng, 7, 5000), circles(310)});
    const auto answer = circles(300);
    SessionBook book;
    book.Record("s", Joined({task, Random(rng, 6, 5000), answer, Random(rng, 30, 5000)}), 0);
    const auto prompt = Joined({task, Random(rng, 15, 5000), answer, Random(rng, 9, 5000)});
    const auto found = book.Find("s", prompt, 0, static_cast<std::int64_t>(prompt.size()), kMin, ReuseMode::kAuto);
    ASSERT_EQ(found.size(), 2u);
    EXPECT_EQ(found[0].length, static_cast<std::int64_t>(task.size()));
    EXPECT_EQ(found[1].length, 300);
    EXPECT_EQ(found[1].base, static_cast<std::int64_t>(task.size()) + 6);
  }
}

TEST(SessionBookTest, WhatIsKeptIsForItsModeUntilItIsForgotten) {
  std::mt19937 rng(9);
  const auto prompt = std::make_shared<const std::vector<TokenId>>(Random(rng, 900, 5000));
  const std::vector<TokenId> answer(prompt->begin() + 700, prompt->begin() + 820);
  SessionBook book;
  auto lease = std::make_shared<int>(0);
  book.RecordKept("s", 120, 3,
                  {.name = 5, .mode = ReuseMode::kRotate, .prompt = prompt, .position = 700, .lease = lease});
  const auto find = [&](const std::string& session, ReuseMode mode) {
    return book.Find(session, answer, 0, 120, kMin, mode);
  };
  EXPECT_TRUE(find("s", ReuseMode::kAuto).empty());
  EXPECT_TRUE(find("t", ReuseMode::kRotate).empty());
  const auto found = find("s", ReuseMode::kRotate);
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].length, 120);
  EXPECT_EQ(book.source("s", found[0].run), 3u);
  ASSERT_NE(book.kept("s", found[0].run), nullptr);
  EXPECT_EQ(book.kept("s", found[0].run)->position, 700);
  // The same tokens, exact: both are there, until the kept one is forgotten, and its pages with it.
  book.Record("s", answer, 4);
  EXPECT_EQ(book.kept("s", find("s", ReuseMode::kRotate).at(0).run), nullptr);
  EXPECT_EQ(lease.use_count(), 2);
  book.ForgetKept("s", 6);
  EXPECT_EQ(lease.use_count(), 2);
  book.ForgetKept("s", 5);
  EXPECT_EQ(lease.use_count(), 1);
  EXPECT_EQ(find("s", ReuseMode::kAuto).size(), 1u);
}

// A prompt that was stored meanwhile does not find itself, nor what went on from it.
TEST(SessionBookTest, OwnPromptsCanBeLeftOut) {
  SessionBook book;
  std::mt19937 rng(23);
  const auto random = [&rng](std::size_t count) {
    std::vector<TokenId> ids(count);
    for (TokenId& id : ids) id = std::uniform_int_distribution<int>(0, 999)(rng);
    return ids;
  };
  const std::vector<TokenId> note = random(100);
  std::vector<TokenId> prompt = random(50), other = random(70);
  other.insert(other.end(), note.begin(), note.end());
  prompt.insert(prompt.end(), note.begin(), note.end());
  book.Record("s", other, 1);
  std::vector<TokenId> longer = prompt;
  longer.resize(200, 7);
  book.Record("s", longer, 2);
  const auto size = static_cast<std::int64_t>(prompt.size());
  const auto find = [&](std::int64_t own) { return book.Find("s", prompt, 0, size, kMin, ReuseMode::kAuto, own); };
  ASSERT_EQ(find(size + 1).size(), 1u);
  EXPECT_EQ(find(size + 1)[0].length, size) << "itself";
  for (const std::int64_t own : {std::int64_t{1}, std::int64_t{50}, size}) {
    const auto found = find(own);
    ASSERT_EQ(found.size(), 1u);
    EXPECT_EQ(found[0].start, 50);
    EXPECT_EQ(found[0].length, 100);
    EXPECT_EQ(book.source("s", found[0].run), 1u);
  }
}

TEST(SessionBookTest, ForgetsBeyondItsLimits) {
  std::mt19937 rng(5);
  SessionBook book({.sessions = 3, .runs_per_session = 2, .tokens = 1000});
  std::vector<std::vector<TokenId>> runs;
  for (int i = 0; i < 5; ++i) {
    runs.push_back(Random(rng, 150, 5000));
    book.Record("s" + std::to_string(i), runs.back(), 0);
  }
  EXPECT_EQ(book.recorded_tokens(), 450u);
  EXPECT_TRUE(book.Find("s0", runs[0], 0, 150, kMin, ReuseMode::kAuto).empty());
  EXPECT_FALSE(book.Find("s4", runs[4], 0, 150, kMin, ReuseMode::kAuto).empty());
  for (int i = 0; i < 4; ++i) book.Record("s4", Random(rng, 300, 5000), 0);
  EXPECT_LE(book.recorded_tokens(), 1000u);
  EXPECT_TRUE(book.Find("s4", runs[4], 0, 150, kMin, ReuseMode::kAuto).empty());
  book.Clear();
  EXPECT_EQ(book.recorded_tokens(), 0u);
}

}  // namespace
}  // namespace kvshare::agentd

// The world judges itself: its answers must follow from the text of its notes alone, by rules written here anew.
#include "bench/quality/world.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <regex>
#include <set>

namespace kvshare::quality {
namespace {

// Reads a conversation's sentences in order, as a reader would, and answers questions from them.
class Reading {
 public:
  explicit Reading(const WorldSample& sample) {
    for (const Message& message : sample.messages) {
      std::smatch match;
      std::string text = message.text;
      while (std::regex_search(text, match, std::regex("([^.]+)\\. ?"))) {
        Read(match[1].str());
        text = match.suffix().str();
      }
    }
  }

  // Empty when no rule fits.
  std::string Answer(const std::string& question) const {
    std::smatch m;
    if (std::regex_match(question, m, std::regex("What is the job of (\\w+)\\?"))) return Get(job_, m[1]);
    if (std::regex_match(question, m, std::regex("Where is (\\w+) from\\?"))) return Get(city_, m[1]);
    if (std::regex_match(question, m, std::regex("Where does (\\w+) keep the (\\w+)\\?"))) return Get(place_, m[2]);
    if (std::regex_match(question, m, std::regex("What color is the (\\w+) of (\\w+)\\?"))) return Get(color_, m[1]);
    if (std::regex_match(question, m, std::regex("What is the code of the place where (\\w+) keeps the (\\w+)\\?")))
      return Get(code_, Get(place_, m[2]));
    if (std::regex_match(question, m, std::regex("What is the code of the (\\w+)\\?"))) return Get(code_, m[1]);
    if (std::regex_match(question, m, std::regex("Which animal does (\\w+) own\\?"))) return Get(animal_, m[1]);
    if (std::regex_match(question, m, std::regex("Whom does (\\w+) trust\\?"))) return Get(trust_, m[1]);
    if (std::regex_match(question, m, std::regex("Who owns the (\\w+)\\?"))) {
      for (const auto& [name, animal] : animal_) {
        if (animal == m[1].str()) return name;
      }
    }
    return "";
  }

 private:
  using Facts = std::map<std::string, std::string>;

  static std::string Get(const Facts& facts, const std::string& key) {
    const auto found = facts.find(key);
    return found == facts.end() ? "" : found->second;
  }

  void Read(const std::string& s) {
    std::smatch m;
    const auto is = [&](const char* pattern) { return std::regex_match(s, m, std::regex(pattern)); };
    if (is("(\\w+) is a (\\w+) from (\\w+)")) return Person(m[1], m[2], m[3]);
    if (is("(\\w+) comes from (\\w+) and works as a (\\w+)")) return Person(m[1], m[3], m[2]);
    if (is("(\\w+) has the same job as (\\w+)") || is("(\\w+) does what (\\w+) does for a living"))
      return Person(m[1], Get(job_, m[2]), "");
    if (is("(\\w+) keeps the (\\w+) (\\w+) in the same place as the (\\w+)"))
      return Keeps(m[1], m[2], m[3], Get(place_, m[4]));
    if (is("The (\\w+) (\\w+) of (\\w+) lies next to the (\\w+)")) return Keeps(m[3], m[1], m[2], Get(place_, m[4]));
    if (is("(\\w+) keeps the (\\w+) (\\w+) in the (\\w+)")) return Keeps(m[1], m[2], m[3], m[4]);
    if (is("The (\\w+) (\\w+) of (\\w+) is in the (\\w+)")) return Keeps(m[3], m[1], m[2], m[4]);
    if (is("The code of the (\\w+) is (\\d+)") || is("To open the (\\w+) use (\\d+)")) {
      last_place_ = m[1];
      code_[last_place_] = m[2];
    } else if (is("Correction: the last code was wrong")) {
      correcting_code_ = true;
    } else if (correcting_code_ && is("It is (\\d+)")) {
      code_[last_place_] = m[1];
      correcting_code_ = false;
    } else if (is("Correction: this person is from (\\w+)")) {
      city_[last_person_] = m[1];
    } else if (is("This person owns a (\\w+)") || is("The same person has a (\\w+)")) {
      animal_[last_person_] = m[1];
    } else if (is("This person trusts (\\w+)") || is("The same person asked (\\w+) for help")) {
      trust_[last_person_] = m[1];
    } else {
      ADD_FAILURE() << "a sentence of no known form: " << s;
    }
  }

  void Person(const std::string& name, const std::string& job, const std::string& city) {
    last_person_ = name;
    job_[name] = job;
    if (!city.empty()) city_[name] = city;
  }

  void Keeps(const std::string& name, const std::string& color, const std::string& object, const std::string& place) {
    last_person_ = name;
    color_[object] = color;
    place_[object] = place;
  }

  Facts job_, city_, place_, color_, code_, animal_, trust_;
  std::string last_person_, last_place_;
  bool correcting_code_ = false;
};

void ExpectAnswersFollow(const WorldSample& sample, int* questions) {
  const Reading reading(sample);
  for (const Question& q : sample.questions) {
    EXPECT_EQ(reading.Answer(q.text), q.answer) << q.kind << ": " << q.text;
    ASSERT_FALSE(q.notes.empty());
    EXPECT_LT(*std::max_element(q.notes.begin(), q.notes.end()), sample.messages.back().end_note);
    ++*questions;
  }
}

TEST(WorldTest, AnswersFollowFromTheNotes) {
  Random random(1);
  std::map<std::string, int> kinds;
  int questions = 0;
  for (int i = 0; i < 300; ++i) {
    const WorldSample sample = MakeWorld(&random, MakeReader(&random), random.Between(3, 12));
    ExpectAnswersFollow(sample, &questions);
    for (const Question& q : sample.questions) ++kinds[q.kind];
  }
  for (const char* kind : {"one_hop", "two_hop", "coref", "override", "bound"}) EXPECT_GT(kinds[kind], 30) << kind;
}

TEST(WorldTest, RelayCandidatesAndControlAnswerToo) {
  Random random(2);
  int questions = 0;
  for (int i = 0; i < 50; ++i) {
    const WorldSample relay = MakeRelay(&random, MakeReader(&random), 3);
    ASSERT_EQ(relay.messages.size(), 4u);
    ASSERT_EQ(relay.questions.size(), 4u);
    ExpectAnswersFollow(relay, &questions);
    for (const Question& q : relay.questions) EXPECT_TRUE(relay.CrossesMessages(q));
    const WorldSample candidates = MakeCandidates(&random, MakeReader(&random), 3);
    ASSERT_EQ(candidates.questions.size(), 3u);
    ExpectAnswersFollow(candidates, &questions);
    const WorldSample control = MakeControl(&random, MakeReader(&random), 4);
    ASSERT_GE(control.questions.size(), 12u);
    ExpectAnswersFollow(control, &questions);
    for (const Question& q : control.questions) EXPECT_FALSE(control.CrossesMessages(q));
  }
  EXPECT_GT(questions, 900);
}

TEST(WorldTest, SwappedCandidatesKeepTheirAnswers) {
  Random random(3);
  for (int i = 0; i < 50; ++i) {
    const WorldSample sample = MakeCandidates(&random, MakeReader(&random), 3);
    const WorldSample swapped = SwapOrder(sample);
    int questions = 0;
    ExpectAnswersFollow(swapped, &questions);
    for (std::size_t q = 0; q < sample.questions.size(); ++q) {
      EXPECT_EQ(sample.questions[q].answer, swapped.questions[q].answer);
      EXPECT_EQ(sample.MessageOf(sample.questions[q].notes.back()),
                2 - swapped.MessageOf(swapped.questions[q].notes.back()));
    }
  }
}

TEST(WorldTest, KindsSayHowManyNotesTheyTake) {
  Random random(4);
  for (int i = 0; i < 100; ++i) {
    for (const Question& q : MakeWorld(&random, MakeReader(&random), 10).questions) {
      const std::set<int> different(q.notes.begin(), q.notes.end());
      EXPECT_EQ(different.size(), q.notes.size());
      if (q.kind == "one_hop") {
        EXPECT_EQ(q.notes.size(), 1u) << q.text;
      } else {
        EXPECT_GE(q.notes.size(), 2u) << q.kind << ": " << q.text;
      }
    }
  }
}

TEST(WorldTest, TheSameSeedIsTheSameWorld) {
  for (const std::uint64_t seed : {7ull, 20000003ull}) {
    Random a(seed);
    Random b(seed);
    const WorldSample x = MakeWorld(&a, MakeReader(&a), 8);
    const WorldSample y = MakeWorld(&b, MakeReader(&b), 8);
    ASSERT_EQ(x.messages.size(), y.messages.size());
    for (std::size_t i = 0; i < x.messages.size(); ++i) EXPECT_EQ(x.messages[i].text, y.messages[i].text);
  }
  Random c(7);
  Random d(8);
  EXPECT_NE(MakeWorld(&c, MakeReader(&c), 8).messages[0].text, MakeWorld(&d, MakeReader(&d), 8).messages[0].text);
}

}  // namespace
}  // namespace kvshare::quality

// The world's cases: which samples are drawn and which of their questions are asked.
#include <algorithm>
#include <array>
#include <map>
#include <utility>

#include "bench/quality/prompt.h"
#include "bench/quality/suite.h"
#include "bench/quality/world.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::quality {
namespace {

// Notes per conversation; the model's training text has 3 to 10, in 1 to 6 messages.
constexpr int kNotesMin = 6;
constexpr int kNotesMax = 10;
// Questions asked of one conversation, one after another: a later one's prompt holds the earlier ones with their
// right answers, as the model was trained.
constexpr std::size_t kQuestions = 5;
constexpr std::size_t kControlQuestions = 4;
constexpr int kRelayHops = 3;
constexpr int kCandidates = 3;
constexpr int kControlMessages = 4;
// Prompts whose readers recur; every fourth sample's reader is met once only.
constexpr std::size_t kTeam = 2;
constexpr std::int64_t kUnknownEvery = 4;
constexpr std::int64_t kWarmUp = 12;  // six for each of the team
// Samples are drawn again until one asks the kind that was asked least so far, at most this often.
constexpr int kDraws = 64;
constexpr std::array<const char*, 5> kWorldKinds = {"one_hop", "two_hop", "coref", "override", "bound"};
constexpr int kAnswerTokens = 16;

class SuiteMaker {
 public:
  SuiteMaker(const runtime::Tokenizer& tokenizer, const WorldOptions& options)
      : tokenizer_(tokenizer), options_(options), random_(options.seed) {
    for (const char* kind : kWorldKinds) asked_[kind] = 0;
    while (team_.size() < kTeam) {
      Reader reader = MakeReader(&random_);
      if (team_.empty() || team_[0].agent != reader.agent) team_.push_back(std::move(reader));
    }
  }

  Result<Suite> Make() {
    suite_.samples = options_.samples;
    suite_.max_answer_tokens = kAnswerTokens;
    for (std::int64_t i = 0; i < kWarmUp; ++i) {
      WorldSample sample = MakeWorld(&random_, team_[static_cast<std::size_t>(i) % kTeam], Notes());
      while (sample.questions.empty())
        sample = MakeWorld(&random_, team_[static_cast<std::size_t>(i) % kTeam], Notes());
      KVS_ASSIGN_OR_RETURN(const JudgedCase warm, MakeCase(sample, 1, "warm" + std::to_string(i), true));
      suite_.warm_up.push_back(warm.c);
    }
    for (std::int64_t i = 0; i < options_.samples; ++i) KVS_RETURN_IF_ERROR(AddSample(i));
    return std::move(suite_);
  }

 private:
  int Notes() { return random_.Between(kNotesMin, kNotesMax); }

  // Of every eight conversations five are the world's own, one of each other style.
  Status AddSample(std::int64_t i) {
    const bool known = i % kUnknownEvery != kUnknownEvery - 1;
    const Reader reader = known ? team_[random_.Below(kTeam)] : MakeReader(&random_);
    const std::string name = "s" + std::to_string(i);
    switch (i % 8) {
      case 1: return Ask(MakeRelay(&random_, reader, kRelayHops), name, known, kQuestions).status();
      case 4: return AddCandidates(reader, name, known);
      case 6: return Ask(MakeControl(&random_, reader, kControlMessages), name, known, kControlQuestions).status();
      default: return Ask(DrawWorld(reader), name, known, kQuestions).status();
    }
  }

  // A sample that asks what was asked least; its questions, those of rarer kinds first.
  WorldSample DrawWorld(const Reader& reader) {
    const auto rarest = std::min_element(asked_.begin(), asked_.end(),
                                         [](const auto& a, const auto& b) { return a.second < b.second; });
    WorldSample sample;
    for (int draw = 0; draw < kDraws; ++draw) {
      sample = MakeWorld(&random_, reader, Notes());
      if (std::any_of(sample.questions.begin(), sample.questions.end(),
                      [&](const Question& q) { return q.kind == rarest->first; })) {
        break;
      }
    }
    std::map<std::string, int> asked = asked_;
    std::vector<Question> left = std::move(sample.questions);
    sample.questions.clear();
    while (!left.empty() && sample.questions.size() < kQuestions) {
      const auto next = std::min_element(left.begin(), left.end(), [&](const Question& a, const Question& b) {
        return asked[a.kind] < asked[b.kind];
      });
      ++asked[next->kind];
      sample.questions.push_back(*next);
      left.erase(next);
    }
    random_.Shuffle(&sample.questions);
    return sample;
  }

  // The same candidates in both orders; the n-th question of one is the n-th of the other.
  Status AddCandidates(const Reader& reader, const std::string& name, bool known) {
    const WorldSample sample = MakeCandidates(&random_, reader, kCandidates);
    KVS_ASSIGN_OR_RETURN(const std::size_t first, Ask(sample, name + "a", known, kQuestions));
    KVS_ASSIGN_OR_RETURN(const std::size_t second, Ask(SwapOrder(sample), name + "b", known, kQuestions));
    for (std::size_t i = 0; second + i < suite_.judged.size(); ++i) {
      suite_.judged[first + i].swapped = static_cast<int>(second + i);
      suite_.judged[second + i].swapped = static_cast<int>(first + i);
    }
    return OkStatus();
  }

  // Appends the first `most` questions as judged cases; returns the index of the first.
  Result<std::size_t> Ask(const WorldSample& sample, const std::string& name, bool known, std::size_t most) {
    const std::size_t first = suite_.judged.size();
    for (std::size_t turn = 1; turn <= std::min(most, sample.questions.size()); ++turn) {
      KVS_ASSIGN_OR_RETURN(JudgedCase judged, MakeCase(sample, turn, name, known));
      if (asked_.contains(judged.kind)) ++asked_[judged.kind];
      suite_.judged.push_back(std::move(judged));
    }
    return first;
  }

  // The prompt of the `turn`-th question (from 1), in the layout of the model's training text.
  Result<JudgedCase> MakeCase(const WorldSample& sample, std::size_t turn, const std::string& name, bool known) const {
    const Question& question = sample.questions[turn - 1];
    JudgedCase judged;
    judged.kind = question.kind;
    judged.answer = question.answer;
    judged.turn = static_cast<int>(turn);
    judged.crosses = sample.CrossesMessages(question);
    judged.known_reader = known;
    judged.c.id = name + "/" + std::to_string(turn);
    judged.c.session = name;
    // A reader met once has a name of its own.
    judged.c.agent = known ? sample.agent : sample.agent + "-" + name;
    PromptText text;
    text.Add("<|im_start|>system\nYou are the " + sample.agent + ". " + sample.role + "<|im_end|>\n<|im_start|>user\n" +
             sample.task + "<|im_end|>\n");
    for (std::size_t m = 0; m < sample.messages.size(); ++m) {
      const Message& message = sample.messages[m];
      const std::string slot = "message_" + std::to_string(m);
      text.Add("<|im_start|>user\n" + message.author + ": ");
      text.AddChunk(message.text, name + "." + slot, slot, message.author);
      text.Add("<|im_end|>\n");
    }
    for (std::size_t q = 0; q < turn; ++q) {
      text.suffix_begin = text.text.size();
      text.Add("<|im_start|>user\n" + sample.questions[q].text + "<|im_end|>\n<|im_start|>assistant\n");
      if (q + 1 < turn) text.Add(sample.questions[q].answer + "<|im_end|>\n");
    }
    const Status status = Tokenise(tokenizer_, text, &judged.c);
    if (!status.ok()) return status.WithContext(judged.c.id);
    const std::string slot = "message_" + std::to_string(sample.MessageOf(question.notes.back()));
    for (std::size_t i = 0; i < judged.c.chunks.size(); ++i) {
      if (judged.c.chunks[i].slot == slot) judged.slot = static_cast<int>(i);
    }
    return judged;
  }

  const runtime::Tokenizer& tokenizer_;
  const WorldOptions options_;
  Random random_;
  std::vector<Reader> team_;
  std::map<std::string, int> asked_;
  Suite suite_;
};

}  // namespace

std::int64_t Suite::LongestPrompt() const {
  std::size_t longest = 0;
  for (const Case& c : warm_up) longest = std::max(longest, c.prompt.size());
  for (const JudgedCase& j : judged) longest = std::max(longest, j.c.prompt.size());
  return static_cast<std::int64_t>(longest);
}

Result<Suite> WorldSuite(const runtime::Model& model, const WorldOptions& options) {
  if (model.tokenizer() == nullptr) return InvalidArgument("the world needs a model with a tokenizer");
  for (const char* token : {"<|im_start|>", "<|im_end|>"}) {
    if (model.tokenizer()->FindToken(token) < 0) {
      return InvalidArgument(std::string("the world is written in ChatML, and this model has no ") + token +
                             "; judge it with --cases");
    }
  }
  return SuiteMaker(*model.tokenizer(), options).Make();
}

}  // namespace kvshare::quality

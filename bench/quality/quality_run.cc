#include "bench/quality/quality_run.h"

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cmath>
#include <map>
#include <utility>

#include "bench/quality/exact_prefill.h"
#include "bench/quality/statistics.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::quality {
namespace {

using Clock = std::chrono::steady_clock;

// Prompts whose pieces are varied, and the rows of a piece: no divisor of a page.
constexpr std::size_t kPieceCases = 4;
constexpr std::int64_t kPieceRows = 7;

double MsSince(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

// Words in lower case, punctuation at their ends dropped, one space between them and around.
std::string Normalised(const std::string& text) {
  std::string out = " ";
  std::string word;
  const auto flush = [&] {
    while (!word.empty() && std::ispunct(static_cast<unsigned char>(word.back()))) word.pop_back();
    std::size_t first = 0;
    while (first < word.size() && std::ispunct(static_cast<unsigned char>(word[first]))) ++first;
    if (first < word.size()) out += word.substr(first) + " ";
    word.clear();
  };
  for (char c : text) {
    if (std::isspace(static_cast<unsigned char>(c))) {
      flush();
    } else {
      word += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    }
  }
  flush();
  return out;
}

class CaseJudge {
 public:
  CaseJudge(const runtime::Model& model, const Suite& suite)
      : config_(model.config()), tokenizer_(*model.tokenizer()), max_tokens_(suite.max_answer_tokens) {}

  std::size_t vocab() const { return static_cast<std::size_t>(config_.vocab_size); }

  Result<ExactResult> Exact(PrefillUnderTest* exact, const JudgedCase& judged) {
    ExactResult result;
    const Clock::time_point start = Clock::now();
    KVS_ASSIGN_OR_RETURN(const PrefillOutcome outcome, exact->Prefill(judged.c));
    result.prefill_ms = MsSince(start);
    KVS_RETURN_IF_ERROR(Decode(exact, outcome.logits, &result.reply, &result.logits));
    result.text = Text(result.reply);
    result.right = judged.answer && IsRight(result.text, *judged.answer, judged.contained);
    return result;
  }

  Result<CaseResult> Compare(PrefillUnderTest* policy, const JudgedCase& judged, const ExactResult& exact) {
    CaseResult result;
    const Clock::time_point start = Clock::now();
    KVS_ASSIGN_OR_RETURN(const PrefillOutcome outcome, policy->Prefill(judged.c));
    result.prefill_ms = MsSince(start);
    if (outcome.logits.size() != vocab() || outcome.chunks.size() != judged.c.chunks.size())
      return Internal("the policy reports " + std::to_string(outcome.chunks.size()) + " chunks of " +
                      std::to_string(judged.c.chunks.size()));
    KVS_ASSIGN_OR_RETURN(const std::vector<float> logits, Forced(policy, outcome.logits, exact.reply));
    Distances(exact, logits, &result.kl, &result.agree);
    KVS_RETURN_IF_ERROR(FreeRun(policy, logits, exact.reply, &result));
    result.exact_text = exact.text;
    result.exact_right = exact.right;
    result.right = judged.answer && IsRight(result.text, *judged.answer, judged.contained);
    for (const Chunk& chunk : judged.c.chunks) result.shared_tokens += chunk.end - chunk.begin;
    result.chunks = policy->Costs();
    policy->Healed(std::span(exact.logits).first(vocab()));
    result.escalated = outcome.escalated.size();
    result.error_estimate = outcome.error_estimate;
    return result;
  }

  // Teacher-forced logits [reply, vocab] after a prefill that gave `first`.
  Result<std::vector<float>> Forced(PrefillUnderTest* policy, const std::vector<float>& first,
                                    const std::vector<TokenId>& reply) {
    std::vector<float> logits(reply.size() * vocab());
    std::copy(first.begin(), first.end(), logits.begin());
    if (reply.size() > 1) {
      KVS_RETURN_IF_ERROR(policy->Extend(std::span(reply).first(reply.size() - 1), logits.data() + vocab()));
    }
    return logits;
  }

  void Distances(const ExactResult& exact, const std::vector<float>& logits, std::vector<double>* kl,
                 std::int64_t* agree) const {
    for (std::size_t i = 0; i < exact.reply.size(); ++i) {
      const std::span<const float> row = std::span(logits).subspan(i * vocab(), vocab());
      kl->push_back(KlDivergence(std::span(exact.logits).subspan(i * vocab(), vocab()), row));
      *agree += Argmax(row) == exact.reply[i] ? 1 : 0;
    }
  }

 private:
  bool IsEnd(TokenId id) const {
    return std::find(config_.eos_ids.begin(), config_.eos_ids.end(), id) != config_.eos_ids.end();
  }

  std::string Text(std::vector<TokenId> reply) const {
    if (!reply.empty() && IsEnd(reply.back())) reply.pop_back();
    std::string text = tokenizer_.Decode(reply);
    while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back()))) text.pop_back();
    std::size_t first = 0;
    while (first < text.size() && std::isspace(static_cast<unsigned char>(text[first]))) ++first;
    return text.substr(first);
  }

  // Greedy after a prefill that gave `next`; every row of logits is kept in `logits` if it is not null.
  Status Decode(PrefillUnderTest* prefill, std::vector<float> next, std::vector<TokenId>* reply,
                std::vector<float>* logits) {
    while (true) {
      if (logits != nullptr) logits->insert(logits->end(), next.begin(), next.end());
      reply->push_back(static_cast<TokenId>(Argmax(next)));
      if (IsEnd(reply->back()) || reply->size() >= static_cast<std::size_t>(max_tokens_)) return OkStatus();
      KVS_RETURN_IF_ERROR(prefill->Extend(std::span(&reply->back(), 1), next.data()));
    }
  }

  // What the policy says when nobody forces it. As long as it agrees with exact's reply the forced logits are its own,
  // so decoding starts where they part.
  Status FreeRun(PrefillUnderTest* policy, const std::vector<float>& forced, const std::vector<TokenId>& exact,
                 CaseResult* result) {
    std::size_t same = 0;
    while (same < exact.size() && Argmax(std::span(forced).subspan(same * vocab(), vocab())) == exact[same]) ++same;
    result->same = static_cast<std::int64_t>(same);
    result->identical = same == exact.size();
    std::vector<TokenId> reply(exact.begin(), exact.begin() + static_cast<std::ptrdiff_t>(same));
    if (!result->identical) {
      policy->Rewind();
      std::vector<float> rows(std::max<std::size_t>(same, 1) * vocab());
      if (same > 0) KVS_RETURN_IF_ERROR(policy->Extend(reply, rows.data()));
      const std::span<const float> next = std::span(forced).subspan(same * vocab(), vocab());
      KVS_RETURN_IF_ERROR(Decode(policy, {next.begin(), next.end()}, &reply, nullptr));
    }
    result->text = Text(reply);
    return OkStatus();
  }

  const runtime::ModelConfig& config_;
  const runtime::Tokenizer& tokenizer_;
  const int max_tokens_;
};

// Exact against itself: in another dtype, and in other pieces.
class Floor {
 public:
  static Result<Floor> New(runtime::Model* model, runtime::Model* other, const PrefillLimits& limits) {
    Floor floor;
    if (other == nullptr) return floor;
    floor.run_.against = std::string(kernels::DTypeName(other->kv_layout().dtype));
    KVS_ASSIGN_OR_RETURN(floor.other_, ExactPrefill::New(other, limits, {}));
    KVS_ASSIGN_OR_RETURN(floor.pieces_,
                         ExactPrefill::New(model, limits, {.share_prefix = false, .piece_rows = kPieceRows}));
    return floor;
  }

  Status Measure(CaseJudge* judge, const JudgedCase& judged, const ExactResult& exact, std::size_t index) {
    run_.kl.emplace_back();
    if (other_ == nullptr || ++of_kind_[judged.kind] > kFloorCases) return OkStatus();
    KVS_ASSIGN_OR_RETURN(const PrefillOutcome outcome, other_->Prefill(judged.c));
    KVS_ASSIGN_OR_RETURN(const std::vector<float> logits, judge->Forced(other_.get(), outcome.logits, exact.reply));
    judge->Distances(exact, logits, &run_.kl.back(), &run_.agree);
    if (index >= kPieceCases) return OkStatus();
    KVS_ASSIGN_OR_RETURN(const PrefillOutcome pieces, pieces_->Prefill(judged.c));
    const std::span<const float> first = std::span(exact.logits).first(judge->vocab());
    run_.other_pieces_kl_max = std::max(run_.other_pieces_kl_max, KlDivergence(first, pieces.logits));
    return OkStatus();
  }

  FloorRun Take() { return std::move(run_); }

 private:
  std::unique_ptr<ExactPrefill> other_;
  std::unique_ptr<ExactPrefill> pieces_;
  std::map<std::string, std::size_t> of_kind_;  // cases measured
  FloorRun run_;
};

}  // namespace

std::vector<double> FloorRun::Tokens() const {
  std::vector<double> tokens;
  for (const std::vector<double>& of_case : kl) tokens.insert(tokens.end(), of_case.begin(), of_case.end());
  return tokens;
}

std::int64_t FloorRun::Cases() const {
  return std::count_if(kl.begin(), kl.end(), [](const auto& of_case) { return !of_case.empty(); });
}

bool IsRight(const std::string& reply, const std::string& answer, bool contained) {
  const std::string said = Normalised(reply);
  const std::string wanted = Normalised(answer);
  return contained ? said.find(wanted) != std::string::npos : said == wanted;
}

Result<QualityRun> Judge(runtime::Model* model, const Suite& suite, const QualityOptions& options) {
  return JudgeWith(model, suite, options, [model](const Policy& policy, const PrefillLimits& limits) {
    return NewPrefill(model, policy, limits);
  });
}

Result<QualityRun> JudgeWith(runtime::Model* model, const Suite& suite, const QualityOptions& options,
                             const PolicyFactory& new_prefill) {
  const PrefillLimits limits{.max_tokens = suite.LongestPrompt() + suite.max_answer_tokens};
  if (limits.max_tokens > model->config().max_positions) {
    return InvalidArgument("prompts of up to " + std::to_string(suite.LongestPrompt()) + " tokens do not fit the " +
                           "model's window of " + std::to_string(model->config().max_positions));
  }
  QualityRun run;
  std::vector<std::unique_ptr<PrefillUnderTest>> policies;
  for (const Policy& policy : options.policies) {
    KVS_ASSIGN_OR_RETURN(auto prefill, new_prefill(policy, limits));
    policies.push_back(std::move(prefill));
    run.policies.push_back({.policy = policy, .cases = {}});
  }
  const auto all = static_cast<std::int64_t>(suite.judged.size());
  const auto go_on = [&](std::int64_t done) { return options.progress == nullptr || options.progress(done, all); };
  for (const auto& policy : policies) {
    for (const Case& c : suite.warm_up) {
      const auto outcome = policy->Prefill(c);
      if (!outcome.ok()) return outcome.status().WithContext(c.id);
      if (!go_on(0)) return Cancelled("interrupted");
    }
  }
  KVS_ASSIGN_OR_RETURN(const auto exact, ExactPrefill::New(model, limits, {}));
  KVS_ASSIGN_OR_RETURN(Floor floor, Floor::New(model, options.floor_model, limits));
  CaseJudge judge(*model, suite);
  for (std::size_t i = 0; i < suite.judged.size(); ++i) {
    const JudgedCase& judged = suite.judged[i];
    auto reference = judge.Exact(exact.get(), judged);
    if (!reference.ok()) return reference.status().WithContext(judged.c.id);
    run.exact_prefill_ms.push_back(reference->prefill_ms);
    run.reply_tokens += static_cast<std::int64_t>(reference->reply.size());
    for (std::size_t p = 0; p < policies.size(); ++p) {
      auto result = judge.Compare(policies[p].get(), judged, *reference);
      if (!result.ok()) {
        return result.status().WithContext(judged.c.id + " under " +
                                           std::string(ReuseModeName(run.policies[p].policy.mode)));
      }
      run.policies[p].cases.push_back(std::move(*result));
    }
    KVS_RETURN_IF_ERROR(floor.Measure(&judge, judged, *reference, i));
    if (!go_on(static_cast<std::int64_t>(i) + 1)) return Cancelled("interrupted");
  }
  run.floor = floor.Take();
  return run;
}

}  // namespace kvshare::quality

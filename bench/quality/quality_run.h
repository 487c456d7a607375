// The judge at work: every case once exactly and once under each policy, compared token by token.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bench/quality/judge.h"
#include "bench/quality/suite.h"

namespace kvshare::quality {

// What exact prefill and greedy decoding give for one case.
struct ExactResult {
  std::vector<TokenId> reply;  // up to and including an end token
  std::vector<float> logits;   // [reply, vocab]: row i is what reply[i] was chosen from
  std::string text;            // the reply without its end token, trimmed
  bool right = false;          // only where the case has an answer
  double prefill_ms = 0;
};

// One case under one policy.
struct CaseResult {
  std::vector<double> kl;  // [reply] nats, teacher-forced on exact's reply: KL(exact || policy)
  std::int64_t agree = 0;  // of those tokens, how many the policy would have chosen too
  std::int64_t same = 0;   // free-running: tokens before the first that differs
  bool identical = false;  // free-running: the whole reply is exact's
  std::string text;        // free-running reply
  bool right = false;
  bool exact_right = false;
  std::string exact_text;
  std::vector<ChunkCost> chunks;
  std::int64_t shared_tokens = 0;  // tokens of all chunks
  std::size_t escalated = 0;
  double error_estimate = -1;
  double prefill_ms = 0;
};

struct PolicyRun {
  Policy policy;
  std::vector<CaseResult> cases;  // [judged]
};

struct FloorRun {
  std::string against;                  // the dtype of the other exact prefill
  std::vector<std::vector<double>> kl;  // [judged][reply], empty where it was not measured
  std::int64_t agree = 0;               // of all those tokens
  double other_pieces_kl_max = 0;       // the same model, prompts in pieces of 7 rows: 0 by the numerics contract

  std::vector<double> Tokens() const;  // kl of all cases, one after the other
  std::int64_t Cases() const;          // those that were measured
};

struct QualityRun {
  std::vector<PolicyRun> policies;
  FloorRun floor;
  std::vector<double> exact_prefill_ms;  // [judged]
  std::int64_t reply_tokens = 0;
};

struct QualityOptions {
  std::vector<Policy> policies;
  // The same weights in another dtype: exact against itself, the noise floor. Null: not measured.
  runtime::Model* floor_model = nullptr;
  // Called after every case with (done, all); false ends the run as Cancelled.
  std::function<bool(std::int64_t, std::int64_t)> progress;
};

// Cases of each kind that the noise floor is measured on. How much rounding moves an answer depends on the question, so
// a kind's KL is held against the floor of the same cases.
inline constexpr std::size_t kFloorCases = 64;

// Requires a model with a tokenizer. Unimplemented for a policy that cannot be judged, before anything is computed.
Result<QualityRun> Judge(runtime::Model* model, const Suite& suite, const QualityOptions& options);

// The same with policies from elsewhere.
using PolicyFactory =
    std::function<Result<std::unique_ptr<PrefillUnderTest>>(const Policy& policy, const PrefillLimits& limits)>;
Result<QualityRun> JudgeWith(runtime::Model* model, const Suite& suite, const QualityOptions& options,
                             const PolicyFactory& new_prefill);

// Whether a reply counts as `answer`: equal, or, with `contained`, holding it as whole words; case, punctuation at the
// ends of words and white space do not matter.
bool IsRight(const std::string& reply, const std::string& answer, bool contained);

}  // namespace kvshare::quality

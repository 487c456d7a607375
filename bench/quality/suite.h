// What is judged: the cases of a run, with what the judge must know about each beside the prompt.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bench/quality/judge.h"
#include "kvshare/status.h"
#include "runtime/model.h"

namespace kvshare::quality {

struct JudgedCase {
  Case c;
  std::string kind;
  std::optional<std::string> answer;  // absent: only the distributions are compared
  bool contained = false;             // right when the reply holds the answer as whole words, not only when it is it
  int turn = 1;                       // 1: the first question of its sample; more: earlier answers stand in the prompt
  int slot = -1;                      // the chunk that states the answer; -1: unknown
  bool crosses = false;               // the answer needs several chunks
  bool known_reader = true;           // false: no other prompt begins like this one
  int swapped = -1;                   // the judged case that is this one in another order of candidates
};

struct Suite {
  std::int64_t samples = 0;
  std::vector<Case> warm_up;  // what every policy sees first; not judged
  std::vector<JudgedCase> judged;
  int max_answer_tokens = 32;

  std::int64_t LongestPrompt() const;
};

struct WorldOptions {
  std::uint64_t seed = 0;
  std::int64_t samples = 0;  // conversations, several questions each
};
// `samples` conversations of the world (world.h); the mix and the balance of kinds: docs/design/quality-judge.md.
// InvalidArgument for a model without a tokenizer or without ChatML's tokens.
Result<Suite> WorldSuite(const runtime::Model& model, const WorldOptions& options);

// Cases from JSON lines, each {"id","kind","messages":[{"role","name","content"}],"shared":[index],"question",
// "answer"}; "question" and "answer" may be absent. The first `limit` lines (0: all). Every error names the line.
Result<Suite> FileSuite(const runtime::Model& model, const std::string& jsonl, std::int64_t limit);

}  // namespace kvshare::quality

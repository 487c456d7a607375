// The judge's two sides: a prompt whose chunks other agents wrote (Case), and whatever computes such a prompt under a
// reuse policy (PrefillUnderTest). The judge (quality_run.h) asks exact prefill and the policy for the same case and
// compares what follows; it never looks inside.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvshare/status.h"
#include "kvshare/types.h"
#include "runtime/model.h"

namespace kvshare::quality {

// A run of prompt tokens that another agent wrote or read before: what a policy may reuse. Tokens that straddle its
// edges in the text (a leading space merged with the word before it) are not part of it.
struct Chunk {
  std::int64_t begin = 0;  // prompt tokens [begin, end), begin < end
  std::int64_t end = 0;
  std::string id;        // names the content: equal ids have equal text, in any case of the run
  std::string slot;      // KVCOMM's placeholder: the same name in every prompt of the same template
  std::string producer;  // the agent that wrote it; may be empty
};

// One prompt. Cases of one session come one after another and begin with the same tokens. All sessions of a run are one
// team's, whose readers recur: chunks stay in their session, what a policy learns about readers may outlive it.
struct Case {
  std::string id;
  std::string session;  // which conversation
  std::string agent;    // who reads the prompt: equal names have equal text before the first chunk
  std::vector<TokenId> prompt;
  std::vector<Chunk> chunks;      // ascending, disjoint
  std::int64_t suffix_begin = 0;  // first token of the last message: the question, always computed
};

// In whose company a chunk's stored KV was computed.
enum class StoredIn {
  kAlone,     // after the sink and nothing else: what any session may share
  kThread,    // in the prompt of another agent of the session, which read the same messages under its own first words
  kReversed,  // likewise, which read them in the opposite order
  kBehind,    // likewise, but with another conversation's first chunk in front; the case's own has no stored KV
  kAmid       // as kThread, with a short message of another conversation before the later half of them
};

struct Policy {
  ReuseMode mode = ReuseMode::kExact;
  std::optional<double> budget;       // wished share of (layer, cached token) pairs to compute; unset: the policy's own
  std::optional<StoredIn> stored_in;  // unset: alone, as the published policies have it; kAuto: thread
  bool gradual = false;               // kCacheBlend: gradual filtering (docs/design/repair.md)
};

// What a policy did with one chunk. A pair is one token in one layer whose K and V were computed in this prefill;
// layers that a policy computes only to choose tokens count in full, and so does work that it threw away.
struct ChunkCost {
  std::int64_t cached_tokens = 0;   // tokens of the chunk for which stored KV was at hand, used or not
  std::int64_t computed_pairs = 0;  // of those cached tokens; can pass layers * cached_tokens when work was thrown away
};

struct PrefillOutcome {
  std::vector<float> logits;           // [vocab] of the last prompt token
  std::vector<ChunkCost> chunks;       // Costs() right after this prefill
  std::vector<std::string> escalated;  // ids of chunks that the policy's own guard sent back to exact
  double error_estimate = -1;          // the guard's estimate of the worst reused chunk; < 0: it makes none
};

// Computes prompts under one policy. Stateful: what it stores or learns from one case serves later ones. One thread.
class PrefillUnderTest {
 public:
  virtual ~PrefillUnderTest() = default;

  // Computes c.prompt, taking what it may from storage. The KV stays until the next Prefill, for Extend.
  // Fails when the case does not fit or the backend fails; a policy that cannot reuse computes instead.
  virtual Result<PrefillOutcome> Prefill(const Case& c) = 0;

  // Computes `ids` after the prompt and what was appended since, and writes one row of vocab floats per id.
  virtual Status Extend(std::span<const TokenId> ids, float* logits) = 0;

  // What exact prefill says after the prompt, [vocab]: the daemon computes answers exactly afterwards, when it has
  // time. A policy may learn from it. At most once after a Prefill.
  virtual void Healed(std::span<const float> /*exact*/) {}

  // Forgets what was appended after the prompt.
  virtual void Rewind() = 0;

  // One per chunk of the case: what it has cost so far, the prompt and whatever appending to it made the policy compute
  // again. Rewinding takes nothing back.
  virtual std::vector<ChunkCost> Costs() const = 0;
};

struct PrefillLimits {
  std::int64_t max_tokens = 0;  // longest prompt and what is appended to it
};

// The implementation of `policy` on `model`, which must outlive it; empty of all state. Unimplemented names a policy
// that this build cannot judge (policies.cc).
Result<std::unique_ptr<PrefillUnderTest>> NewPrefill(runtime::Model* model, const Policy& policy,
                                                     const PrefillLimits& limits);

}  // namespace kvshare::quality

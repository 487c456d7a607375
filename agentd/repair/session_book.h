// SessionBook: which token runs a session has seen, so that a prompt's parts are recognised wherever they stand now.
//
// Every prompt (with its answer) whose KV was stored is recorded under its session. A new prompt of that session is
// then searched for runs that occur in any of them, at any offset: a message in another order, a document under another
// system prompt, an answer quoted in the middle of a template. Found by rolling fingerprints, verified token by token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <list>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "agentd/repair/kept_kv.h"
#include "kvshare/types.h"

namespace kvshare::agentd {

// Tokens [start, start + length) of a prompt are tokens [base, base + length) of a recorded run.
struct Recurrence {
  std::int64_t start = 0;
  std::int64_t length = 0;
  std::int64_t base = 0;
  std::uint64_t run = 0;
};

struct SessionBookLimits {
  std::size_t sessions = 256;                 // least recently used are forgotten first
  std::size_t runs_per_session = 64;          // oldest first
  std::size_t tokens = std::size_t{4} << 20;  // of all runs; least recently used sessions first
};

// One thread. Memory: about 10 bytes per recorded token.
class SessionBook {
 public:
  explicit SessionBook(const SessionBookLimits& limits = {}) : limits_(limits) {}

  // `tokens` stood from position 0 and are stored; `source` is whose they were. A run that continues a recorded one
  // takes its place. `since`: what ForgetKept gave, where it is what was kept, exact now.
  void Record(const std::string& session, std::span<const TokenId> tokens, std::uint32_t source,
              std::uint64_t since = 0);
  // Tokens [kv.position, kv.position + length) of kv.prompt, whose KV is kv.
  void RecordKept(const std::string& session, std::int64_t length, std::uint32_t source, KeptKv kv);
  // What RecordKept was given under `name`. Returns when that was, for Record; 0: there is nothing.
  std::uint64_t ForgetKept(const std::string& session, std::uint64_t name);

  // Disjoint, ascending recurrences of at least `min_length` tokens within prompt[from, end), each about as long as it
  // can be: of those, one moved like the one before it (or most like it), then the longest, then the most recent; or,
  // where `rank` is given, of those that it ranks lowest (0 to 3) by what stood before them in their own prompts, the
  // one whose run was recorded first. KV kept by another mode than `mode` does not count, nor do prompts that begin
  // with the first `own` tokens of this one. Requires min_length >= kWindow + kStride - 1, below which some would be
  // missed. Expected time linear in the prompt, whatever is recorded.
  using Rank = std::function<unsigned(std::span<const TokenId> before)>;
  static constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::max();
  std::vector<Recurrence> Find(const std::string& session, std::span<const TokenId> prompt, std::int64_t from,
                               std::int64_t end, std::int64_t min_length, ReuseMode mode, std::int64_t own = kNone,
                               const Rank& rank = nullptr) const;

  // Of a run that Find named just now.
  std::span<const TokenId> tokens(const std::string& session, std::uint64_t run) const;
  std::uint32_t source(const std::string& session, std::uint64_t run) const;
  const KeptKv* kept(const std::string& session, std::uint64_t run) const;  // null: stored under its tokens' key

  void Clear();
  std::size_t recorded_tokens() const { return tokens_; }

  static constexpr std::int64_t kWindow = 24;  // tokens of a fingerprint
  static constexpr std::int64_t kStride = 4;   // of the windows that are indexed

 private:
  struct Run {
    std::vector<TokenId> tokens;
    std::uint32_t source = 0;
    std::optional<KeptKv> kept;
    std::uint64_t since = 0;  // its number, or that of what it was before it was healed
  };
  struct Place {
    std::uint64_t run = 0;
    std::int64_t at = 0;
  };
  struct Session {
    std::map<std::uint64_t, Run> runs;  // by number, so in order of recording
    std::unordered_map<std::uint64_t, std::vector<Place>> windows;
    std::list<std::string>::iterator recency;
  };

  Session& Used(const std::string& name);
  void Add(Session& session, Run run);
  void Index(Session& session, std::uint64_t number);
  void Drop(Session& session, std::uint64_t number);
  void Forget(const std::string& name);

  SessionBookLimits limits_;
  std::map<std::string, Session> sessions_;
  std::list<std::string> recency_;  // most recently used first
  std::uint64_t next_run_ = 1;
  std::size_t tokens_ = 0;
};

}  // namespace kvshare::agentd

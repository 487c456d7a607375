// Whether stored KV has seen what does not stand before it in the prompt it is wanted for, but only later or nowhere.
// Such KV knows what nothing before it there says, whichever of its tokens are computed again.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <unordered_map>
#include <vector>

#include "kvshare/types.h"

namespace kvshare::agentd {

// Where each phrase of a prompt, so many tokens next to each other, stands first. Its last kHeader tokens are in none:
// a prompt ends with the header of the answer that is asked for, and every answer was computed behind such a header;
// where two answers end alike, as those of small models do, that is no message that comes later. The prompt must
// outlive it.
class FirstPlaces {
 public:
  explicit FirstPlaces(std::span<const TokenId> prompt);

  // What was read before each position b of another prompt, b in [0, its size].
  struct Seen {
    // The greatest first place in this prompt of a phrase that lies before b; -1 where there is none, kNowhere where
    // more tokens in one place than another reader may have had beside (UnknownAtMost) are in no phrase of this prompt,
    // whatever follows b.
    std::vector<std::int64_t> latest;
    // The end of the last phrase before b that stands in this prompt, or of the role.
    std::vector<std::int64_t> known;
  };
  Seen SeenIn(std::span<const TokenId> there, std::int64_t role) const;

  // Whether what was computed at position `base` of `there` and stands in this prompt at [start, end) has seen what
  // does not stand before it here. `seen` is SeenIn(there).
  bool SawOther(const Seen& seen, std::span<const TokenId> there, std::int64_t base, std::int64_t start,
                std::int64_t end) const;

  // Longer than what templates put between messages, shorter than most sentences.
  static constexpr std::int64_t kPhrase = 16;
  static constexpr std::int64_t kHeader = 8;
  // What another reader may have had beside: behind its role a task of its own, elsewhere a message's header and name.
  static constexpr std::int64_t kTask = 32;
  static constexpr std::int64_t kOtherHeader = 12;
  static constexpr std::int64_t kNowhere = std::numeric_limits<std::int64_t>::max();

 private:
  // Behind `known`. A phrase that began in the role may end in what all readers' tasks begin with.
  static std::int64_t UnknownAtMost(std::int64_t known, std::int64_t role) {
    return known < role + kPhrase ? kTask : kOtherHeader;
  }

  const std::span<const TokenId> prompt_;
  std::unordered_map<std::uint64_t, std::int64_t> first_;  // by fingerprint
};

}  // namespace kvshare::agentd

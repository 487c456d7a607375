// What decides how well stored KV serves at another place: what it was computed to see.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <vector>

#include "agentd/repair/order.h"
#include "agentd/repair/role.h"
#include "anchors/confidence.h"
#include "kvshare/types.h"

namespace kvshare::agentd {

// By how many tokens an agent's first words may be longer or shorter than another's.
inline constexpr std::int64_t kCompanyShift = 32;

// Whether a chunk would see in a prompt what it saw where it was computed. `here` and `there` are the tokens before it
// in the two prompts, of which the first `lead` and `lead_there`, the reader's role, may be any, if they are about as
// many (kCompanyShift); of the rest a task may differ behind it, and in each other place a message's header
// (FirstPlaces::kTask, kOtherHeader). Time linear in `here`.
bool InCompany(std::span<const TokenId> here, std::int64_t lead, std::span<const TokenId> there,
               std::int64_t lead_there);

// A prompt whose chunks are asked about one after the other, as they stand in it. What it is made of must outlive it.
class PromptCompany {
 public:
  PromptCompany(std::span<const TokenId> prompt, const RoleMarks& marks);

  // Whether the chunk at `start`, computed at `base` of `there`, is in company. The reader's first words end, at the
  // latest, where the first chunk in company begins.
  bool InCompany(std::int64_t start, std::span<const TokenId> there, std::int64_t base);
  // Whether the one at [start, end) saw there what does not stand before it here (FirstPlaces).
  bool SawOther(std::int64_t start, std::int64_t end, std::span<const TokenId> there, std::int64_t base);
  // Of the one at [start, end), if it is not in company: how many tokens at its end are computed, so that the prompt's
  // end is (kFreshEnd). All where fewer than `least` would be left.
  std::int64_t Tail(std::int64_t start, std::int64_t end, std::int64_t least) const;

 private:
  const std::span<const TokenId> prompt_;
  const RoleMarks& marks_;
  std::int64_t lead_;
  std::optional<FirstPlaces> places_;
  std::map<const TokenId*, FirstPlaces::Seen> seen_;  // by the prompt in which chunks were computed
};

// Mode auto: where fewer tokens than this follow what was found in other company, the prompt's last 2 * kFreshEnd are
// computed. What the answer begins with is made of them, and fewer could not look at what else is to be repaired.
inline constexpr std::int64_t kFreshEnd = 16;

struct ChunkCompany {
  std::int64_t tokens = 0;
  bool in_company = false;
  bool saw_other = false;  // what does not stand before it here (FirstPlaces)
};
// Which of a prompt's chunks mode auto computes although they are stored, as ascending indices: those that saw what
// does not stand before them, and of the rest those that are not in company, where they are at most half of it. What is
// left then is one thread.
std::vector<std::size_t> Strays(std::span<const ChunkCompany> chunks);

// What is asked of answers in mode auto, by company, before any has been audited. That chunks of one thread are near
// exact the judge has shown; of others it depends on what they are (docs/design/repair.md).
inline constexpr anchors::Guard::Prior kThreadPrior{.margin = 0, .doubts = 0.2};
inline constexpr anchors::Guard::Prior kElsewherePrior{.margin = anchors::Guard::kNever, .doubts = 0.6};

}  // namespace kvshare::agentd

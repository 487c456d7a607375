// What decides how well stored KV serves at another place: what it was computed to see.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "anchors/confidence.h"
#include "kvshare/types.h"

namespace kvshare::agentd {

// What may differ around chunks that are in company: message headers between them, an agent's first words before them.
inline constexpr std::int64_t kCompanyGap = 32;
inline constexpr std::int64_t kCompanyShift = 32;

// Whether a chunk would see in a prompt what it saw where it was computed. `here` and `there` are the tokens before it
// in the two prompts. The first `lead` tokens of `here`, before anything that is moved, may be any, if they are about
// as many there (kCompanyShift); of the rest as much as kCompanyGap may differ in one place. Time linear in `here`.
bool InCompany(std::span<const TokenId> here, std::span<const TokenId> there, std::int64_t lead);

struct ChunkCompany {
  std::int64_t tokens = 0;
  bool in_company = false;
  bool saw_later = false;  // what only comes after it here (FirstPlaces)
};
// Which of a prompt's chunks mode auto computes although they are stored, as ascending indices: those that saw what
// comes later, and of the rest those that are not in company, where they are at most half of it. What is left then is
// one thread.
std::vector<std::size_t> Strays(std::span<const ChunkCompany> chunks);

// What is asked of answers in mode auto, by company, before any has been audited. That chunks of one thread are near
// exact the judge has shown; of others it depends on what they are (docs/design/repair.md).
inline constexpr anchors::Guard::Prior kThreadPrior{.margin = 0, .doubts = 0.2};
inline constexpr anchors::Guard::Prior kElsewherePrior{.margin = 3, .doubts = 0.6};

}  // namespace kvshare::agentd

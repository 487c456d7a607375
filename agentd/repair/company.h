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

// Tokens of a prompt's first message, up to and with the first of `ends`, the tokens that end one; 0 where there is
// none. That message is the agent's role, which says who reads. What comes behind it is what is read, and may be what a
// chunk refers to.
std::int64_t RoleTokens(std::span<const TokenId> prompt, std::span<const TokenId> ends);

// Whether a chunk would see in a prompt what it saw where it was computed. `here` and `there` are the tokens before it
// in the two prompts, of which the first `lead` and `lead_there`, the reader's role, may be any, if they are about as
// many (kCompanyShift); of the rest as much as kCompanyGap may differ in one place. Time linear in `here`.
bool InCompany(std::span<const TokenId> here, std::int64_t lead, std::span<const TokenId> there,
               std::int64_t lead_there);

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
inline constexpr anchors::Guard::Prior kElsewherePrior{.margin = 3, .doubts = 0.6};

}  // namespace kvshare::agentd

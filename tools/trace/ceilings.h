// What a prefix cache of a given size could have reused of the prompts that were replayed: least recently used, and the
// clairvoyant bound. The yardsticks that stand beside a replay's own hit rate.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kvshare/types.h"

namespace kvshare::trace {

inline constexpr std::int64_t kCeilingPageTokens = 64;  // as the daemon's pages (docs/design/pool.md)

// One request in the order of the replay.
struct CeilingRequest {
  std::span<const TokenId> prompt;
  std::span<const TokenId> generated;  // kept behind the prompt, but for the last token: its KV was never computed
};

// Tokens reused, summed over all requests; a request's last token is always computed.
struct Ceilings {
  std::int64_t prompt_tokens = 0;
  std::int64_t unlimited_tokens = 0;
  std::int64_t lru_tokens = 0;
  std::int64_t belady_tokens = 0;
  std::int64_t unique_pages = 0;
};

// Pages are chained: a page is named by its tokens and all before it. A request hits the leading whole pages of its
// prompt that are resident, and when these are all that were ever stored, the tokens beyond them that an unlimited
// cache would have, too: with `capacity_pages` >= unique_pages all three ceilings are the exact one.
//
// LRU touches a sequence's last page first, so that the beginnings stay longest. Belady (MIN, with bypass) keeps the
// pages that are needed soonest, the deeper one going first where two are needed at the same time; which pages are
// needed again is known because the whole replay is. A sequence's last, partly filled page takes a slot. Math: the cost
// per request is its number of pages times the logarithm of the capacity.
Ceilings ComputeCeilings(const std::vector<CeilingRequest>& requests, std::int64_t capacity_pages);

}  // namespace kvshare::trace

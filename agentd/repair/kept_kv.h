// KeptKv: KV that an approximate request computed, and that its session may use again.
//
// No key names it, so no exact request can find it. It is found as chunks are, by its tokens, by later requests of the
// same session and mode.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/paged_kv.h"
#include "kvshare/types.h"

namespace kvshare::agentd {

// Tokens that stood next to each other in one prompt, or were generated after it.
struct KeptKv {
  std::uint64_t name = 0;  // of the request
  ReuseMode mode = ReuseMode::kAuto;
  std::shared_ptr<const std::vector<TokenId>> prompt;  // and what was generated
  std::int64_t position = 0;                           // of the first token, in `prompt`
  int depth = 1;                                       // see MovedChunk
  std::vector<kernels::PageIndex> pages;
  int first = 0;                      // page row of the first token in pages[0]
  std::shared_ptr<const void> lease;  // while it lives, the pages stay as they are
};

}  // namespace kvshare::agentd

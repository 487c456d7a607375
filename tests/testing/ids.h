// Prompts for tests: token ids without a meaning, and prompts put together of parts.
#pragma once

#include <initializer_list>
#include <random>
#include <vector>

#include "kvshare/types.h"

namespace kvshare::testing {

// Each in [0, most], drawn from `rng` one by one.
inline std::vector<TokenId> RandomIds(std::mt19937& rng, int count, TokenId most = 255) {
  std::vector<TokenId> ids(static_cast<std::size_t>(count));
  for (TokenId& id : ids) id = std::uniform_int_distribution<TokenId>(0, most)(rng);
  return ids;
}

inline std::vector<TokenId> Join(std::initializer_list<std::vector<TokenId>> parts) {
  std::vector<TokenId> all;
  for (const std::vector<TokenId>& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

}  // namespace kvshare::testing

// Which of a prompt's leading tokens stood at the front of an earlier sequence, and who brought them: what an exact
// prefix cache that forgets nothing can reuse, to the token.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "kvshare/types.h"

namespace kvshare::trace {

// A radix tree of token sequences. Not thread-safe.
class PrefixTree {
 public:
  PrefixTree();
  ~PrefixTree();

  // Leading tokens of one prompt that one owner brought first.
  struct Run {
    std::int64_t tokens = 0;
    int owner = 0;
  };
  // The longest stored beginning of `ids`, as runs in order.
  std::vector<Run> Match(std::span<const TokenId> ids) const;

  // Tokens that were there before stay with whoever brought them. Cost: the length of `ids`.
  void Insert(std::vector<TokenId> ids, int owner);

 private:
  struct Node;
  std::unique_ptr<Node> root_;
};

}  // namespace kvshare::trace

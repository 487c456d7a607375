// AddedTokens: the tokens that are found in the text as they are, before words are cut: longest match, leftmost first.
// Follows `added_vocabulary` of the Hugging Face tokenizers library.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "kvshare/types.h"
#include "runtime/tokenizer.h"

namespace kvshare::runtime {

// Immutable once made; safe from any thread.
class AddedTokens {
 public:
  // Of `tokens`, those with normalized == `normalized`. The first of equal texts counts; empty ones never match.
  AddedTokens(const std::vector<AddedToken>& tokens, bool normalized);
  ~AddedTokens();

  struct Piece {
    std::string_view text;
    TokenId id = -1;  // -1: ordinary text
  };
  // Appends the pieces of `text`, in order. Ordinary pieces are never empty.
  void Split(std::string_view text, std::vector<Piece>* pieces) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvshare::runtime

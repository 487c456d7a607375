// Content for traces that hold only block ids or lengths: the same tokens in every run and on every machine that has
// the same tokenizer. docs/reference/traces.md gives the formula.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kvshare/client.h"
#include "kvshare/status.h"
#include "tools/trace/trace.h"

namespace kvshare::trace {

// Ordinary tokens of a model: common words that its tokenizer takes as one token each, so that neither a special token
// nor a byte fragment gets into made-up text.
class Vocabulary {
 public:
  // Asks the client's tokenizer about a fixed list of words. FailedPrecondition when nothing can be tokenised.
  static Result<Vocabulary> Of(Client* client);

  std::size_t size() const { return ids_.size(); }
  TokenId At(std::uint64_t hash) const { return ids_[hash % ids_.size()]; }

  // `tokens` words, a function of `seed`: about as many tokens.
  std::string Text(std::uint64_t seed, std::int64_t tokens) const;

 private:
  std::vector<TokenId> ids_;
  std::vector<std::string> words_;  // one for each id where words are single tokens
};

// Prompt tokens [begin, end) of a request that has block ids or a length. Token k of block b is a function of
// (b, b's space, k); what lies beyond the last block belongs to this request alone.
// Requires: 0 <= begin <= end <= kMaxTokens.
std::vector<TokenId> SynthesiseTokens(const Trace& trace, std::size_t request, const Vocabulary& vocabulary,
                                      std::int64_t begin, std::int64_t end);

}  // namespace kvshare::trace

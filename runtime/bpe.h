// Byte-level BPE: a word's bytes to token ids by merging neighbours, lowest rank first (Sennrich et al. 2016, as in
// GPT-2). Follows `models/bpe` of the Hugging Face tokenizers library.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvshare/status.h"
#include "kvshare/types.h"

namespace kvshare::runtime {

// GPT-2's alphabet: every byte has a printable character that stands for it in vocabulary files.
// AlphabetToBytes gives the bytes a token stands for; a token with a character outside the alphabet is taken as it is.
std::string BytesToAlphabet(std::string_view bytes);
std::string AlphabetToBytes(std::string_view token);

struct BpeOptions {
  bool ignore_merges = false;
  bool fuse_unk = false;
  TokenId unk_id = -1;
};

// Immutable once made; safe from any thread.
class Bpe {
 public:
  // InvalidArgument naming the first merge whose parts or result the vocabulary lacks.
  static Result<std::unique_ptr<Bpe>> Make(const std::vector<std::string>& vocab,
                                           const std::vector<std::pair<std::string, std::string>>& merges,
                                           const BpeOptions& options);
  ~Bpe();

  // What Encode needs between words; one per thread of callers.
  struct Scratch;
  struct ScratchDeleter {
    void operator()(Scratch* s) const;
  };
  static std::unique_ptr<Scratch, ScratchDeleter> NewScratch();

  // Appends the ids of `word` (bytes) to `ids`.
  // Cost: O(n log n) in its length, whatever it says.
  void Encode(std::string_view word, Scratch* scratch, std::vector<TokenId>* ids) const;

  // The id of a token as the vocabulary writes it; -1 = none.
  TokenId Find(std::string_view token) const;

 private:
  struct State;
  explicit Bpe(std::unique_ptr<State> state);

  std::unique_ptr<State> state_;
};

}  // namespace kvshare::runtime

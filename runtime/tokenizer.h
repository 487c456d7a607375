// Tokenizer: text to token ids and back, exactly as the Hugging Face tokenizers library does it for byte-level BPE.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvshare/status.h"
#include "kvshare/types.h"
#include "libkvshare/core/hash.h"

namespace kvshare::runtime {

// How text is cut into words before merging: the pre-tokenizers at hand, in the order they apply.
struct PreTokenizerSpec {
  struct Step {
    enum class Kind { kDigits, kByteLevelSplit, kRegexSplit } kind = Kind::kByteLevelSplit;
    bool individual_digits = false;  // kDigits
    std::string pattern;             // kRegexSplit: an Oniguruma/PCRE pattern; matches and gaps are both pieces
  };
  std::vector<Step> steps;
  bool add_prefix_space = false;
};

struct AddedToken {
  TokenId id = 0;
  std::string text;
  bool special = false;
  bool lstrip = false;       // swallows the white space before it
  bool rstrip = false;       // and after it
  bool single_word = false;  // only where no word character touches it
  bool normalized = false;   // looked for after normalisation instead of before
};

// What a tokenizer is made of, whichever file it came from (tokenizer.json or GGUF metadata).
struct TokenizerSpec {
  std::vector<std::string> vocab;                           // id -> token in the byte-to-unicode alphabet; "" = none
  std::vector<std::pair<std::string, std::string>> merges;  // by rank
  std::vector<AddedToken> added;
  PreTokenizerSpec pre;
  bool nfc = false;            // normalise to NFC first
  bool ignore_merges = false;  // a word in the vocabulary is one token as it is
  TokenId unk_id = -1;         // for bytes the vocabulary lacks; -1 = they vanish
  bool fuse_unk = false;       // neighbouring unknown bytes are one token
};

// Immutable once made; safe from any thread.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // Special tokens in the text are recognised; none is added. Invalid UTF-8 becomes U+FFFD, as Python's decoder does.
  virtual std::vector<TokenId> Encode(std::string_view text) const = 0;
  // Special tokens are kept. Bytes that are not UTF-8 become U+FFFD. An id that no token has (models may have more rows
  // than that, and draw one) stands for nothing, here and below.
  virtual std::string Decode(std::span<const TokenId> ids) const = 0;
  // The bytes one token stands for; a character may need several tokens. Special tokens give their text.
  virtual std::string_view TokenBytes(TokenId id) const = 0;
  virtual bool IsSpecial(TokenId id) const = 0;
  // An added token by its text, or a token as the vocabulary writes it; -1 = none.
  virtual TokenId FindToken(std::string_view text) const = 0;
  virtual std::int64_t vocab_size() const = 0;  // largest id + 1
  virtual const Digest& digest() const = 0;     // names the tokenizer: part of `space`
};

// InvalidArgument when the spec contradicts itself (a merge of unknown tokens, a pattern that does not compile).
Result<std::unique_ptr<Tokenizer>> NewTokenizer(TokenizerSpec spec);

// tokenizer.json as the tokenizers library writes it. Unimplemented for kinds we lack (naming them).
Result<TokenizerSpec> ParseTokenizerJson(std::string_view json);

// The pre-tokenizer that GGUF names by `tokenizer.ggml.pre` ("smollm", "gpt-2", "llama-bpe", "qwen2").
Result<PreTokenizerSpec> PreTokenizerByName(std::string_view name);

}  // namespace kvshare::runtime

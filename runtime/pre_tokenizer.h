// PreTokenizer: cuts text into the words that BPE merges within. The door to PCRE2.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kvshare/status.h"
#include "runtime/tokenizer.h"

namespace kvshare::runtime {

// Immutable once made; safe from any thread.
class PreTokenizer {
 public:
  // InvalidArgument for a pattern that does not compile, Unimplemented for one whose syntax PCRE2 reads differently
  // from Oniguruma, which is what tokenizer files are written for.
  static Result<std::unique_ptr<PreTokenizer>> Make(const PreTokenizerSpec& spec);
  ~PreTokenizer();

  struct Words {
    std::vector<std::string_view> words;  // into the text, or into `storage` where a space was put before a word
    std::deque<std::string> storage;
  };
  // Appends the words of `text` (valid UTF-8), in order; together they are the text, added spaces aside. A pattern that
  // runs into PCRE2's match limit leaves the rest of its input as one word.
  void Split(std::string_view text, Words* out) const;

 private:
  struct Pattern;
  static constexpr std::size_t kNever = static_cast<std::size_t>(-1);
  PreTokenizer(std::vector<std::unique_ptr<Pattern>> patterns, std::size_t prefix_before);

  std::vector<std::unique_ptr<Pattern>> patterns_;
  std::size_t prefix_before_;  // the step before which words get their leading space
};

}  // namespace kvshare::runtime

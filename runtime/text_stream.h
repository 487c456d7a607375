// TextStream: generated tokens to text, piece by piece: whole UTF-8 characters only, and nothing that a stop string may
// still swallow.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kvshare/types.h"
#include "runtime/tokenizer.h"

namespace kvshare::runtime {

class TextStream {
 public:
  TextStream(const Tokenizer* tokenizer, std::vector<std::string> stop);

  // Takes one generated token. True when a stop string is now complete: generation ends, and text() ends before the one
  // that was complete first (of those that end together, the longest). Empty stop strings are ignored.
  bool Push(TokenId id);
  // No more tokens: what was held back (a possible start of a stop string, an incomplete character as U+FFFD) is
  // released.
  void Finish();
  // Text released since the last call.
  std::string TakeDelta();
  // All text released so far.
  const std::string& text() const { return text_; }

 private:
  const Tokenizer* tokenizer_;
  std::vector<std::string> stop_;
  void Release(std::size_t bytes);

  std::string pending_;  // whole characters not yet released
  std::string tail_;     // the bytes of a character that is not whole yet
  std::string text_;
  std::size_t taken_ = 0;
  bool stopped_ = false;
};

}  // namespace kvshare::runtime

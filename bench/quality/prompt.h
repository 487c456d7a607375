// Prompts from pieces of text: the whole is tokenised at once, as it would be in use, and every chunk's bytes are found
// again among the tokens.
#pragma once

#include <string>
#include <vector>

#include "bench/quality/judge.h"
#include "kvshare/status.h"
#include "runtime/tokenizer.h"

namespace kvshare::quality {

// Bytes [begin, end) of the text, and what the chunk they become is called.
struct TextChunk {
  std::size_t begin = 0;
  std::size_t end = 0;
  std::string id;
  std::string slot;
  std::string producer;
};

struct PromptText {
  std::string text;
  std::vector<TextChunk> chunks;  // ascending, disjoint
  std::size_t suffix_begin = 0;   // byte at which the last message starts

  void Add(std::string_view piece) { text += piece; }
  void AddChunk(std::string_view piece, std::string id, std::string slot, std::string producer);
};

// Fills prompt, chunks and suffix_begin of `c`. A chunk is the tokens that lie wholly within its bytes; one that holds
// no whole token is left out. InvalidArgument when the tokenizer changes the text (normalisation), so that bytes cannot
// be found again.
Status Tokenise(const runtime::Tokenizer& tokenizer, const PromptText& text, Case* c);

}  // namespace kvshare::quality

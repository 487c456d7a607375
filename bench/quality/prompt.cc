#include "bench/quality/prompt.h"

#include <algorithm>
#include <utility>

namespace kvshare::quality {

void PromptText::AddChunk(std::string_view piece, std::string id, std::string slot, std::string producer) {
  chunks.push_back({text.size(), text.size() + piece.size(), std::move(id), std::move(slot), std::move(producer)});
  text += piece;
}

Status Tokenise(const runtime::Tokenizer& tokenizer, const PromptText& text, Case* c) {
  c->prompt = tokenizer.Encode(text.text);
  std::vector<std::size_t> starts;  // byte at which each token starts, and the end
  std::size_t at = 0;
  for (TokenId id : c->prompt) {
    starts.push_back(at);
    const std::string_view bytes = tokenizer.TokenBytes(id);
    if (text.text.compare(at, bytes.size(), bytes) != 0)
      return InvalidArgument("the tokenizer changes the text at byte " + std::to_string(at));
    at += bytes.size();
  }
  if (at != text.text.size()) return InvalidArgument("the tokenizer drops the end of the text");
  if (c->prompt.empty()) return InvalidArgument("the prompt is empty");
  starts.push_back(at);
  const auto first_at = [&](std::size_t byte) {
    return std::lower_bound(starts.begin(), starts.end(), byte) - starts.begin();
  };
  c->chunks.clear();
  for (const TextChunk& chunk : text.chunks) {
    const std::int64_t begin = first_at(chunk.begin);
    const std::int64_t after = std::upper_bound(starts.begin(), starts.end(), chunk.end) - starts.begin();
    const std::int64_t end = after - 1;  // the last start at or before the chunk's end
    if (begin < end) c->chunks.push_back({begin, end, chunk.id, chunk.slot, chunk.producer});
  }
  c->suffix_begin =
      std::min<std::int64_t>(first_at(text.suffix_begin), static_cast<std::int64_t>(c->prompt.size()) - 1);
  return OkStatus();
}

}  // namespace kvshare::quality

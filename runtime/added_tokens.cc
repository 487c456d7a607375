#include "runtime/added_tokens.h"

#include <absl/container/flat_hash_map.h>

#include <algorithm>
#include <array>

#include "runtime/unicode.h"
#include "runtime/utf8.h"

namespace kvshare::runtime {
namespace {

// The last character of valid, non-empty text.
char32_t LastCharacter(std::string_view text) {
  std::size_t i = text.size() - 1;
  while (i > 0 && (static_cast<unsigned char>(text[i]) & 0xC0) == 0x80) --i;
  return DecodeUtf8(text.substr(i)).code_point;
}

std::size_t LeadingSpace(std::string_view text) {
  std::size_t n = 0;
  while (n < text.size()) {
    const Utf8Step step = DecodeUtf8(text.substr(n));
    if (!IsWhiteSpace(step.code_point)) break;
    n += step.length;
  }
  return n;
}

// Where the white space at the end of `text` begins, looking back no further than `floor`.
std::size_t TrailingSpaceBegin(std::string_view text, std::size_t floor) {
  std::size_t end = text.size();
  while (end > floor) {
    std::size_t i = end - 1;
    while (i > floor && (static_cast<unsigned char>(text[i]) & 0xC0) == 0x80) --i;
    if (!IsWhiteSpace(DecodeUtf8(text.substr(i, end - i)).code_point)) break;
    end = i;
  }
  return end;
}

}  // namespace

struct AddedTokens::State {
  std::vector<AddedToken> tokens;
  // A trie of their texts: (node, byte) -> node; node 0 is the root.
  absl::flat_hash_map<std::uint64_t, std::uint32_t> edges;
  std::vector<std::int32_t> token_at = {-1};  // [node] index into `tokens`
  std::array<bool, 256> begins{};             // whether any token starts with the byte

  static std::uint64_t Edge(std::uint32_t node, char byte) {
    return (static_cast<std::uint64_t>(node) << 8) | static_cast<unsigned char>(byte);
  }

  // The longest token that `text` starts with; null = none.
  const AddedToken* Longest(std::string_view text) const {
    std::int32_t found = -1;
    std::uint32_t node = 0;
    for (const char c : text) {
      const auto it = edges.find(Edge(node, c));
      if (it == edges.end()) break;
      node = it->second;
      if (token_at[node] >= 0) found = token_at[node];
    }
    return found < 0 ? nullptr : &tokens[static_cast<std::size_t>(found)];
  }
};

AddedTokens::AddedTokens(const std::vector<AddedToken>& tokens, bool normalized) : state_(new State) {
  for (const AddedToken& token : tokens) {
    if (token.normalized != normalized || token.text.empty()) continue;
    std::uint32_t node = 0;
    for (const char c : token.text) {
      const auto [it, is_new] =
          state_->edges.emplace(State::Edge(node, c), static_cast<std::uint32_t>(state_->token_at.size()));
      if (is_new) state_->token_at.push_back(-1);
      node = it->second;
    }
    if (state_->token_at[node] >= 0) continue;
    state_->token_at[node] = static_cast<std::int32_t>(state_->tokens.size());
    state_->tokens.push_back(token);
    state_->begins[static_cast<unsigned char>(token.text[0])] = true;
  }
}

AddedTokens::~AddedTokens() = default;

void AddedTokens::Split(std::string_view text, std::vector<Piece>* pieces) const {
  std::size_t done = 0;  // text before this is in `pieces`
  for (std::size_t i = 0; i < text.size();) {
    const AddedToken* token =
        state_->begins[static_cast<unsigned char>(text[i])] ? state_->Longest(text.substr(i)) : nullptr;
    if (token == nullptr) {
      ++i;
      continue;
    }
    std::size_t begin = i;
    std::size_t end = i + token->text.size();
    i = end;
    if (token->single_word) {
      const bool word_before = begin > 0 && IsWordCharacter(LastCharacter(text.substr(0, begin)));
      const bool word_after = end < text.size() && IsWordCharacter(DecodeUtf8(text.substr(end)).code_point);
      if (word_before || word_after) continue;
    }
    if (token->lstrip) begin = TrailingSpaceBegin(text.substr(0, begin), std::min(done, begin));
    if (token->rstrip) end += LeadingSpace(text.substr(end));
    if (begin > done) pieces->push_back({.text = text.substr(done, begin - done)});
    pieces->push_back({.text = text.substr(begin, end - begin), .id = token->id});
    done = end;
  }
  if (done < text.size()) pieces->push_back({.text = text.substr(done)});
}

}  // namespace kvshare::runtime

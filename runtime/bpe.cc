#include "runtime/bpe.h"

#include <absl/container/flat_hash_map.h>
#include <absl/strings/string_view.h>

#include <algorithm>

#include "runtime/utf8.h"

namespace kvshare::runtime {
namespace {

// A word of at most this many bytes is merged by rescanning its few pairs: faster than a heap, and the same result.
constexpr std::size_t kScanLimit = 32;

// OpenAI's bytes_to_unicode: printable Latin-1 bytes stand for themselves, the others for U+0100 onwards.
struct Alphabet {
  std::array<char32_t, 256> of_byte{};
  std::array<std::int16_t, 512> to_byte;

  Alphabet() {
    to_byte.fill(-1);
    char32_t next = 256;
    for (char32_t b = 0; b < 256; ++b) {
      const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      of_byte[b] = printable ? b : next++;
      to_byte[of_byte[b]] = static_cast<std::int16_t>(b);
    }
  }
};

const Alphabet& TheAlphabet() {
  static const Alphabet alphabet;
  return alphabet;
}

absl::string_view ToAbsl(std::string_view s) { return {s.data(), s.size()}; }

std::uint64_t PairKey(TokenId left, TokenId right) {
  return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32) | static_cast<std::uint32_t>(right);
}

struct Merge {
  std::uint32_t rank = 0;
  TokenId result = -1;
};

// A token of the word in the making: a node of a linked list in reading order.
struct Symbol {
  TokenId id = -1;  // -1: merged into its left neighbour
  std::int64_t prev = -1;
  std::int64_t next = -1;
};

struct Candidate {
  std::uint32_t rank;
  TokenId result;
  std::int64_t pos;  // of the left symbol
  // For std heaps, whose top is the largest: lowest rank first, then leftmost.
  bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : pos > other.pos; }
};

}  // namespace

std::string BytesToAlphabet(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) AppendUtf8(TheAlphabet().of_byte[static_cast<unsigned char>(c)], &out);
  return out;
}

std::string AlphabetToBytes(std::string_view token) {
  std::string out;
  for (std::string_view rest = token; !rest.empty();) {
    const Utf8Step step = DecodeUtf8(rest);
    if (!step.valid || step.code_point >= 512 || TheAlphabet().to_byte[step.code_point] < 0) return std::string(token);
    out += static_cast<char>(TheAlphabet().to_byte[step.code_point]);
    rest.remove_prefix(step.length);
  }
  return out;
}

struct Bpe::State {
  BpeOptions options;
  absl::flat_hash_map<std::string, TokenId> ids;
  absl::flat_hash_map<std::uint64_t, Merge> merges;
  std::array<TokenId, 256> byte_ids{};  // -1: the vocabulary lacks the byte

  const Merge* FindMerge(TokenId left, TokenId right) const {
    const auto it = merges.find(PairKey(left, right));
    return it == merges.end() ? nullptr : &it->second;
  }
};

struct Bpe::Scratch {
  std::vector<TokenId> tokens;
  std::vector<Symbol> symbols;
  std::vector<Candidate> heap;
  std::vector<Merge> pairs;  // of the scan: pairs[i] merges tokens i and i + 1; result -1 = does not
};

void Bpe::ScratchDeleter::operator()(Scratch* s) const { delete s; }

std::unique_ptr<Bpe::Scratch, Bpe::ScratchDeleter> Bpe::NewScratch() {
  return std::unique_ptr<Scratch, ScratchDeleter>(new Scratch);
}

Bpe::Bpe(std::unique_ptr<State> state) : state_(std::move(state)) {}
Bpe::~Bpe() = default;

Result<std::unique_ptr<Bpe>> Bpe::Make(const std::vector<std::string>& vocab,
                                       const std::vector<std::pair<std::string, std::string>>& merges,
                                       const BpeOptions& options) {
  auto state = std::make_unique<State>();
  state->options = options;
  state->ids.reserve(vocab.size());
  for (std::size_t id = 0; id < vocab.size(); ++id) {
    if (!vocab[id].empty()) state->ids.emplace(vocab[id], static_cast<TokenId>(id));  // the first of equals
  }
  const auto find = [&](std::string_view token) {
    const auto it = state->ids.find(ToAbsl(token));
    return it == state->ids.end() ? TokenId{-1} : it->second;
  };
  for (int b = 0; b < 256; ++b) {
    const char byte = static_cast<char>(b);
    state->byte_ids[static_cast<std::size_t>(b)] = find(BytesToAlphabet({&byte, 1}));
  }
  state->merges.reserve(merges.size());
  for (std::size_t rank = 0; rank < merges.size(); ++rank) {
    const auto& [left, right] = merges[rank];
    const TokenId left_id = find(left), right_id = find(right), result = find(left + right);
    if (left_id < 0 || right_id < 0 || result < 0) {
      return InvalidArgument("merge " + std::to_string(rank) + " ('" + left + "' '" + right + "') needs the token '" +
                             (left_id < 0    ? left
                              : right_id < 0 ? right
                                             : left + right) +
                             "', which the vocabulary lacks");
    }
    state->merges[PairKey(left_id, right_id)] = {.rank = static_cast<std::uint32_t>(rank), .result = result};
  }
  return std::unique_ptr<Bpe>(new Bpe(std::move(state)));
}

TokenId Bpe::Find(std::string_view token) const {
  const auto it = state_->ids.find(ToAbsl(token));
  return it == state_->ids.end() ? -1 : it->second;
}

namespace {

// Merges the best pair until none is left, scanning for it each time.
template <typename FindMerge>
void MergeByScan(const FindMerge& find, std::vector<Merge>* pairs, std::vector<TokenId>* tokens) {
  const auto lookup = [&](std::size_t i) {
    const Merge* m = find((*tokens)[i], (*tokens)[i + 1]);
    return m == nullptr ? Merge{} : *m;
  };
  pairs->clear();
  for (std::size_t i = 0; i + 1 < tokens->size(); ++i) pairs->push_back(lookup(i));
  while (true) {
    std::size_t best = pairs->size();
    for (std::size_t i = 0; i < pairs->size(); ++i) {
      if ((*pairs)[i].result >= 0 && (best == pairs->size() || (*pairs)[i].rank < (*pairs)[best].rank)) best = i;
    }
    if (best == pairs->size()) return;
    (*tokens)[best] = (*pairs)[best].result;
    tokens->erase(tokens->begin() + static_cast<std::ptrdiff_t>(best) + 1);
    pairs->erase(pairs->begin() + static_cast<std::ptrdiff_t>(best));
    if (best > 0) (*pairs)[best - 1] = lookup(best - 1);
    if (best < pairs->size()) (*pairs)[best] = lookup(best);
  }
}

// The same with a heap of candidates over a linked list, for words of any length. An entry whose symbols have since
// merged with others is recognised by what the pair at its place merges to now.
template <typename FindMerge>
void MergeByHeap(const FindMerge& find, std::vector<Symbol>* list, std::vector<Candidate>* heap,
                 std::vector<TokenId>* tokens) {
  std::vector<Symbol>& symbols = *list;
  const auto n = static_cast<std::int64_t>(tokens->size());
  const auto at = [&](std::int64_t i) -> Symbol& { return symbols[static_cast<std::size_t>(i)]; };
  symbols.resize(tokens->size());
  heap->clear();
  for (std::int64_t i = 0; i < n; ++i) {
    at(i) = {.id = (*tokens)[static_cast<std::size_t>(i)], .prev = i - 1, .next = i + 1 < n ? i + 1 : -1};
    if (i == 0) continue;
    if (const Merge* m = find(at(i - 1).id, at(i).id)) heap->push_back({m->rank, m->result, i - 1});
  }
  std::make_heap(heap->begin(), heap->end());
  const auto push = [&](std::int64_t pos) {
    if (const Merge* m = find(at(pos).id, at(at(pos).next).id)) {
      heap->push_back({m->rank, m->result, pos});
      std::push_heap(heap->begin(), heap->end());
    }
  };
  while (!heap->empty()) {
    const Candidate top = heap->front();
    std::pop_heap(heap->begin(), heap->end());
    heap->pop_back();
    Symbol& left = at(top.pos);
    if (left.id < 0 || left.next < 0) continue;
    Symbol& right = at(left.next);
    const Merge* m = find(left.id, right.id);
    if (m == nullptr || m->result != top.result) continue;
    left.id = top.result;
    right.id = -1;
    left.next = right.next;
    if (left.next >= 0) at(left.next).prev = top.pos;
    if (left.prev >= 0) push(left.prev);
    if (left.next >= 0) push(top.pos);
  }
  tokens->clear();
  for (std::int64_t i = 0; i >= 0; i = at(i).next) tokens->push_back(at(i).id);
}

}  // namespace

void Bpe::Encode(std::string_view word, Scratch* scratch, std::vector<TokenId>* ids) const {
  if (word.empty()) return;
  const State& state = *state_;
  if (state.options.ignore_merges) {
    const TokenId whole = Find(BytesToAlphabet(word));
    if (whole >= 0) return ids->push_back(whole);
  }
  std::vector<TokenId>& tokens = scratch->tokens;
  tokens.clear();
  bool after_unknown = false;
  for (const char c : word) {
    const TokenId id = state.byte_ids[static_cast<unsigned char>(c)];
    if (id >= 0) {
      tokens.push_back(id);
    } else if (state.options.unk_id >= 0 && !(after_unknown && state.options.fuse_unk)) {
      tokens.push_back(state.options.unk_id);
    }
    after_unknown = id < 0;
  }
  if (tokens.empty()) return;
  const auto find = [&state](TokenId left, TokenId right) { return state.FindMerge(left, right); };
  if (tokens.size() <= kScanLimit) {
    MergeByScan(find, &scratch->pairs, &tokens);
  } else {
    MergeByHeap(find, &scratch->symbols, &scratch->heap, &tokens);
  }
  ids->insert(ids->end(), tokens.begin(), tokens.end());
}

}  // namespace kvshare::runtime

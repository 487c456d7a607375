#include "tools/trace/synthesis.h"

#include <set>
#include <sstream>

#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"
#include "tools/trace/mix.h"

namespace kvshare::trace {
namespace {

// Changing this list changes what hash traces mean: replays before and after could not be compared.
constexpr const char* kWords =
    "time people year water house work part day hand place case week point room fact light word line name story side "
    "head school state family country problem group company system question night number area money book eye job power "
    "hour game end member law car city community president team minute idea body back parent face level office door "
    "health person art war history party result change morning reason research girl guy moment air teacher force "
    "education the of and a to in is was he for it with as his on be at by had not are but from or have an they which "
    "one you were her all she there would their we him been has when who will more no if out so said what up its about "
    "into than them can only other new some could these two may then do first any my now such like our over man me "
    "even "
    "most made after also did many before must through years where much your way well down should because each just "
    "those how too little good very make world still own see men long get here between both life being under never "
    "same another know while last might us great old off come since against go came right used take three";

constexpr std::size_t kFewestWords = 16;  // below this, blocks would look alike to a person who reads a dump
constexpr std::uint64_t kTail = HashText("tail");

}  // namespace

Result<Vocabulary> Vocabulary::Of(Client* client) {
  Vocabulary vocabulary;
  std::vector<std::string> all;
  std::set<TokenId> single;
  std::istringstream words(kWords);
  for (std::string word; words >> word;) {
    all.push_back(" " + word);
    KVS_ASSIGN_OR_RETURN(const std::vector<TokenId> ids, client->Tokenize(all.back()));
    if (ids.size() != 1 || !single.insert(ids[0]).second) continue;
    vocabulary.ids_.push_back(ids[0]);
    vocabulary.words_.push_back(all.back());
  }
  if (vocabulary.ids_.size() >= kFewestWords) return vocabulary;
  // A tokenizer of letters or bytes: every token that the words are made of.
  vocabulary.words_ = all;
  std::set<TokenId> parts;
  for (const std::string& word : all) {
    KVS_ASSIGN_OR_RETURN(const std::vector<TokenId> ids, client->Tokenize(word));
    parts.insert(ids.begin(), ids.end());
  }
  vocabulary.ids_.assign(parts.begin(), parts.end());
  if (vocabulary.ids_.empty()) return FailedPrecondition("the model's tokenizer makes no tokens of common words");
  return vocabulary;
}

std::string Vocabulary::Text(std::uint64_t seed, std::int64_t tokens) const {
  std::string text;
  for (std::int64_t k = 0; k < tokens; ++k) {
    text += words_[Mix(seed, static_cast<std::uint64_t>(k)) % words_.size()];
  }
  return text;
}

std::vector<TokenId> SynthesiseTokens(const Trace& trace, std::size_t index, const Vocabulary& vocabulary,
                                      std::int64_t begin, std::int64_t end) {
  KVS_CHECK(0 <= begin && begin <= end);
  const TraceRequest& request = trace.requests[index];
  const std::vector<std::uint64_t> blocks = trace.Blocks(index);
  const std::int64_t block_tokens = trace.header.block_tokens;
  const std::uint64_t space = trace.BlockSpace(request);
  const std::uint64_t own = Mix(kTail, HashText(request.id));
  std::vector<TokenId> tokens;
  tokens.reserve(static_cast<std::size_t>(end - begin));
  for (std::int64_t at = begin; at < end; ++at) {
    const std::int64_t block = at / block_tokens;
    const bool known = block < static_cast<std::int64_t>(blocks.size());
    const std::uint64_t key =
        known ? Mix(space, blocks[static_cast<std::size_t>(block)]) : Mix(own, static_cast<std::uint64_t>(block));
    tokens.push_back(vocabulary.At(Mix(key, static_cast<std::uint64_t>(at % block_tokens))));
  }
  return tokens;
}

}  // namespace kvshare::trace

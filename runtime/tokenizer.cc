#include "runtime/tokenizer.h"

#include <absl/container/flat_hash_map.h>

#include "libkvshare/core/status_macros.h"
#include "runtime/added_tokens.h"
#include "runtime/bpe.h"
#include "runtime/pre_tokenizer.h"
#include "runtime/unicode.h"
#include "runtime/utf8.h"

namespace kvshare::runtime {
namespace {

constexpr TokenId kMaxTokenId = (1 << 21) - 1;     // the largest vocabularies in use have 2^18 tokens
constexpr std::size_t kMaxAddedTokenBytes = 4096;  // bounds the look-ahead at every byte of a text

Digest DigestOf(const TokenizerSpec& spec) {
  DigestBuilder d("tokenizer");
  d.U64(spec.vocab.size());
  for (const std::string& token : spec.vocab) d.Text(token);
  d.U64(spec.merges.size());
  for (const auto& [left, right] : spec.merges) d.Text(left).Text(right);
  d.U64(spec.added.size());
  for (const AddedToken& t : spec.added) {
    d.U64(static_cast<std::uint64_t>(t.id)).Text(t.text);
    d.U64(
        static_cast<std::uint64_t>(t.special | t.lstrip << 1 | t.rstrip << 2 | t.single_word << 3 | t.normalized << 4));
  }
  d.U64(spec.pre.steps.size());
  for (const PreTokenizerSpec::Step& step : spec.pre.steps) {
    d.U64(static_cast<std::uint64_t>(step.kind)).U64(step.individual_digits).Text(step.pattern);
  }
  d.U64(spec.pre.add_prefix_space).U64(spec.nfc).U64(spec.ignore_merges);
  d.U64(static_cast<std::uint64_t>(spec.unk_id)).U64(spec.fuse_unk);
  return d.Finish();
}

class BpeTokenizer : public Tokenizer {
 public:
  BpeTokenizer(const TokenizerSpec& spec, std::unique_ptr<Bpe> bpe, std::unique_ptr<PreTokenizer> pre)
      : nfc_(spec.nfc),
        bpe_(std::move(bpe)),
        pre_(std::move(pre)),
        raw_added_(spec.added, /*normalized=*/false),
        normalized_added_(spec.added, /*normalized=*/true),
        digest_(DigestOf(spec)) {
    bytes_.reserve(spec.vocab.size());
    for (const std::string& token : spec.vocab) bytes_.push_back(AlphabetToBytes(token));
    special_.resize(spec.vocab.size());
    for (const AddedToken& token : spec.added) {
      const auto id = static_cast<std::size_t>(token.id);
      if (id >= bytes_.size()) {
        bytes_.resize(id + 1);
        special_.resize(id + 1);
      }
      bytes_[id] = token.text;
      special_[id] = token.special;
      added_ids_.emplace(token.text, token.id);
    }
  }

  std::vector<TokenId> Encode(std::string_view text) const override {
    std::string repaired;
    if (!IsValidUtf8(text)) {
      repaired = RepairUtf8(text);
      text = repaired;
    }
    std::vector<TokenId> ids;
    const auto scratch = Bpe::NewScratch();
    PreTokenizer::Words words;
    std::vector<AddedTokens::Piece> raw, normalized;
    raw_added_.Split(text, &raw);
    for (const AddedTokens::Piece& piece : raw) {
      if (piece.id >= 0) {
        ids.push_back(piece.id);
        continue;
      }
      std::string storage;
      std::string_view plain = piece.text;
      if (nfc_) {
        storage = ToNfc(plain);
        plain = storage;
      }
      normalized.clear();
      normalized_added_.Split(plain, &normalized);
      for (const AddedTokens::Piece& part : normalized) {
        if (part.id >= 0) {
          ids.push_back(part.id);
          continue;
        }
        words.words.clear();
        words.storage.clear();
        pre_->Split(part.text, &words);
        for (const std::string_view word : words.words) bpe_->Encode(word, scratch.get(), &ids);
      }
    }
    return ids;
  }

  std::string Decode(std::span<const TokenId> ids) const override {
    std::string bytes;
    for (const TokenId id : ids) bytes += TokenBytes(id);
    return RepairUtf8(bytes);
  }

  std::string_view TokenBytes(TokenId id) const override {
    return Known(id) ? std::string_view(bytes_[static_cast<std::size_t>(id)]) : std::string_view();
  }
  bool IsSpecial(TokenId id) const override { return Known(id) && special_[static_cast<std::size_t>(id)]; }

  TokenId FindToken(std::string_view text) const override {
    const auto it = added_ids_.find(absl::string_view(text.data(), text.size()));
    return it != added_ids_.end() ? it->second : bpe_->Find(text);
  }

  std::int64_t vocab_size() const override { return static_cast<std::int64_t>(bytes_.size()); }
  const Digest& digest() const override { return digest_; }

 private:
  bool Known(TokenId id) const { return id >= 0 && id < vocab_size(); }

  const bool nfc_;
  const std::unique_ptr<Bpe> bpe_;
  const std::unique_ptr<PreTokenizer> pre_;
  const AddedTokens raw_added_;         // found in the text as it came
  const AddedTokens normalized_added_;  // found in the normalised text
  std::vector<std::string> bytes_;      // [id]
  std::vector<bool> special_;           // [id]
  absl::flat_hash_map<std::string, TokenId> added_ids_;
  const Digest digest_;
};

Status CheckAdded(const TokenizerSpec& spec) {
  for (const AddedToken& token : spec.added) {
    const std::string name = "added token '" + token.text.substr(0, 80) + "'";
    if (token.id < 0 || token.id > kMaxTokenId) {
      return InvalidArgument(name + " has id " + std::to_string(token.id) + ", outside 0.." +
                             std::to_string(kMaxTokenId));
    }
    if (token.text.size() > kMaxAddedTokenBytes) {
      return InvalidArgument(name + " is longer than " + std::to_string(kMaxAddedTokenBytes) + " bytes");
    }
    if (!IsValidUtf8(token.text))
      return InvalidArgument("the added token of id " + std::to_string(token.id) + " is not UTF-8");
  }
  return OkStatus();
}

}  // namespace

Result<std::unique_ptr<Tokenizer>> NewTokenizer(TokenizerSpec spec) {
  if (spec.vocab.empty()) return InvalidArgument("the vocabulary is empty");
  if (spec.vocab.size() > static_cast<std::size_t>(kMaxTokenId) + 1)
    return InvalidArgument("the vocabulary has more than 2^21 tokens");
  if (spec.unk_id >= static_cast<std::int64_t>(spec.vocab.size()))
    return InvalidArgument("the unknown token is outside the vocabulary");
  KVS_RETURN_IF_ERROR(CheckAdded(spec));
  KVS_ASSIGN_OR_RETURN(
      auto bpe, Bpe::Make(spec.vocab, spec.merges,
                          {.ignore_merges = spec.ignore_merges, .fuse_unk = spec.fuse_unk, .unk_id = spec.unk_id}));
  KVS_ASSIGN_OR_RETURN(auto pre, PreTokenizer::Make(spec.pre));
  return std::unique_ptr<Tokenizer>(std::make_unique<BpeTokenizer>(spec, std::move(bpe), std::move(pre)));
}

}  // namespace kvshare::runtime

// tokenizer.json, the format of the Hugging Face tokenizers library, to a TokenizerSpec.
#include <string>

#include "libkvshare/core/status_macros.h"
#include "runtime/json.h"
#include "runtime/tokenizer.h"

namespace kvshare::runtime {
namespace {

// The largest vocabularies in use have 2^18 tokens; the bound keeps a small file from asking for much memory.
constexpr std::int64_t kMaxId = (1 << 21) - 1;

Result<std::string> TypeOf(const Json& object) { return GetString(object, "type"); }

Status RequireObject(const Json& value, const char* what) {
  return value.is_object() ? OkStatus() : InvalidArgument(std::string(what) + " must be an object");
}

// The elements of a "Sequence" object's list `key`, or the object itself when it is not one.
Result<std::vector<const Json*>> Flatten(const Json& object, const char* key) {
  std::vector<const Json*> todo = {&object}, flat;
  while (!todo.empty()) {
    const Json* next = todo.back();
    todo.pop_back();
    KVS_RETURN_IF_ERROR(RequireObject(*next, key));
    KVS_ASSIGN_OR_RETURN(const std::string type, TypeOf(*next));
    if (type != "Sequence") {
      flat.push_back(next);
      continue;
    }
    const Json* list = FindField(*next, key);
    if (list == nullptr || !list->is_array())
      return InvalidArgument(std::string("a Sequence needs a list '") + key + "'");
    for (auto it = list->rbegin(); it != list->rend(); ++it) todo.push_back(&*it);
  }
  return flat;
}

Status ParseNormalizer(const Json& object, TokenizerSpec* spec) {
  KVS_ASSIGN_OR_RETURN(const auto steps, Flatten(object, "normalizers"));
  for (const Json* step : steps) {
    KVS_ASSIGN_OR_RETURN(const std::string type, TypeOf(*step));
    if (type != "NFC") return Unimplemented("normalizer '" + type + "' (known: NFC)");
    spec->nfc = true;
  }
  return OkStatus();
}

Status ParseSplit(const Json& step, PreTokenizerSpec* pre) {
  KVS_ASSIGN_OR_RETURN(const std::string behavior, GetString(step, "behavior"));
  KVS_ASSIGN_OR_RETURN(const bool invert, GetBool(step, "invert", false));
  // Inverting what is a match and what is a gap changes nothing where both are pieces.
  static_cast<void>(invert);
  if (behavior != "Isolated") return Unimplemented("Split with behavior '" + behavior + "' (known: Isolated)");
  const Json* pattern = FindField(step, "pattern");
  if (pattern == nullptr || !pattern->is_object()) return InvalidArgument("Split needs an object 'pattern'");
  PreTokenizerSpec::Step out{.kind = PreTokenizerSpec::Step::Kind::kRegexSplit};
  if (pattern->contains("String")) {
    KVS_ASSIGN_OR_RETURN(const std::string literal, GetString(*pattern, "String"));
    if (literal.empty()) return OkStatus();
    for (const char c : literal) {
      const bool plain = static_cast<unsigned char>(c) >= 0x80 || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                         (c >= '0' && c <= '9') || static_cast<unsigned char>(c) <= ' ';
      if (!plain) out.pattern += '\\';
      out.pattern += c;
    }
  } else {
    KVS_ASSIGN_OR_RETURN(out.pattern, GetString(*pattern, "Regex"));
  }
  pre->steps.push_back(std::move(out));
  return OkStatus();
}

Status ParsePreTokenizer(const Json& object, PreTokenizerSpec* pre) {
  KVS_ASSIGN_OR_RETURN(const auto steps, Flatten(object, "pretokenizers"));
  bool byte_level = false;
  for (const Json* step : steps) {
    KVS_ASSIGN_OR_RETURN(const std::string type, TypeOf(*step));
    if (byte_level) return Unimplemented("pre-tokenizer '" + type + "' after ByteLevel");
    if (type == "Digits") {
      KVS_ASSIGN_OR_RETURN(const bool individual, GetBool(*step, "individual_digits", false));
      pre->steps.push_back({.kind = PreTokenizerSpec::Step::Kind::kDigits, .individual_digits = individual});
    } else if (type == "Split") {
      KVS_RETURN_IF_ERROR(ParseSplit(*step, pre));
    } else if (type == "ByteLevel") {
      byte_level = true;
      KVS_ASSIGN_OR_RETURN(pre->add_prefix_space, GetBool(*step, "add_prefix_space", true));
      KVS_ASSIGN_OR_RETURN(const bool use_regex, GetBool(*step, "use_regex", true));
      if (use_regex) pre->steps.push_back({.kind = PreTokenizerSpec::Step::Kind::kByteLevelSplit});
    } else {
      return Unimplemented("pre-tokenizer '" + type + "' (known: ByteLevel, Digits, Split, Sequence)");
    }
  }
  return byte_level ? OkStatus() : Unimplemented("a pre-tokenizer without ByteLevel: only byte-level BPE is supported");
}

// What a post-processor adds (BOS and the like) is never added here: chat templates write those tokens themselves.
Status CheckPostProcessor(const Json& object) {
  KVS_ASSIGN_OR_RETURN(const auto steps, Flatten(object, "processors"));
  for (const Json* step : steps) {
    KVS_ASSIGN_OR_RETURN(const std::string type, TypeOf(*step));
    if (type != "ByteLevel" && type != "TemplateProcessing") {
      return Unimplemented("post-processor '" + type + "' (known: ByteLevel, TemplateProcessing)");
    }
  }
  return OkStatus();
}

Status ParseVocab(const Json& model, TokenizerSpec* spec) {
  const Json* vocab = FindField(model, "vocab");
  if (vocab == nullptr || !vocab->is_object()) return InvalidArgument("field 'vocab' must be an object");
  std::int64_t last = -1;
  for (const auto& [token, id] : vocab->items()) {
    if (!id.is_number_integer() || id.get<std::int64_t>() < 0 || id.get<std::int64_t>() > kMaxId) {
      return InvalidArgument("vocab: the id of '" + token + "' must be an integer in 0.." + std::to_string(kMaxId));
    }
    last = std::max(last, id.get<std::int64_t>());
  }
  spec->vocab.resize(static_cast<std::size_t>(last + 1));
  for (const auto& [token, id] : vocab->items()) {
    std::string& place = spec->vocab[id.get<std::size_t>()];
    if (!place.empty()) return InvalidArgument("vocab: '" + place + "' and '" + token + "' have the same id");
    place = token;
  }
  return OkStatus();
}

Status ParseMerges(const Json& model, TokenizerSpec* spec) {
  const Json* merges = FindField(model, "merges");
  if (merges == nullptr || !merges->is_array()) return InvalidArgument("field 'merges' must be a list");
  spec->merges.reserve(merges->size());
  for (const Json& merge : *merges) {
    if (merge.is_string()) {
      const auto& text = merge.get_ref<const std::string&>();
      const std::size_t space = text.find(' ');
      if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
        return InvalidArgument("merges: '" + text + "' is not two tokens with one space between");
      }
      spec->merges.emplace_back(text.substr(0, space), text.substr(space + 1));
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      spec->merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
    } else {
      return InvalidArgument("merges: entry " + std::to_string(spec->merges.size()) + " is not a pair of tokens");
    }
  }
  return OkStatus();
}

Status ParseModel(const Json& model, TokenizerSpec* spec) {
  KVS_ASSIGN_OR_RETURN(const std::string type, GetString(model, "type", "BPE"));
  if (type != "BPE") return Unimplemented("tokenizer model '" + type + "' (known: BPE)");
  KVS_ASSIGN_OR_RETURN(const bool byte_fallback, GetBool(model, "byte_fallback", false));
  if (byte_fallback) return Unimplemented("byte_fallback: only byte-level BPE is supported");
  KVS_ASSIGN_OR_RETURN(const double dropout, GetNumber(model, "dropout", 0, 1, 0));
  if (dropout != 0) return Unimplemented("BPE dropout");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    KVS_ASSIGN_OR_RETURN(const std::string affix, GetString(model, key, ""));
    if (!affix.empty()) return Unimplemented(std::string(key) + " '" + affix + "'");
  }
  KVS_ASSIGN_OR_RETURN(spec->ignore_merges, GetBool(model, "ignore_merges", false));
  KVS_ASSIGN_OR_RETURN(spec->fuse_unk, GetBool(model, "fuse_unk", false));
  KVS_RETURN_IF_ERROR(ParseVocab(model, spec));
  KVS_RETURN_IF_ERROR(ParseMerges(model, spec));
  KVS_ASSIGN_OR_RETURN(const std::string unk, GetString(model, "unk_token", ""));
  if (!unk.empty()) {
    const Json& vocab = *FindField(model, "vocab");
    const auto it = vocab.find(unk);
    if (it != vocab.end()) spec->unk_id = it->get<TokenId>();
  }
  return OkStatus();
}

Status ParseAdded(const Json& list, TokenizerSpec* spec) {
  if (!list.is_array()) return InvalidArgument("field 'added_tokens' must be a list");
  for (const Json& entry : list) {
    KVS_RETURN_IF_ERROR(RequireObject(entry, "an added token"));
    AddedToken token;
    KVS_ASSIGN_OR_RETURN(const std::int64_t id, GetInt(entry, "id", 0, kMaxId));
    token.id = static_cast<TokenId>(id);
    KVS_ASSIGN_OR_RETURN(token.text, GetString(entry, "content"));
    KVS_ASSIGN_OR_RETURN(token.special, GetBool(entry, "special", false));
    KVS_ASSIGN_OR_RETURN(token.lstrip, GetBool(entry, "lstrip", false));
    KVS_ASSIGN_OR_RETURN(token.rstrip, GetBool(entry, "rstrip", false));
    KVS_ASSIGN_OR_RETURN(token.single_word, GetBool(entry, "single_word", false));
    KVS_ASSIGN_OR_RETURN(token.normalized, GetBool(entry, "normalized", !token.special));
    spec->added.push_back(std::move(token));
  }
  return OkStatus();
}

}  // namespace

Result<TokenizerSpec> ParseTokenizerJson(std::string_view text) {
  KVS_ASSIGN_OR_RETURN(const Json json, ParseJsonObject(text));
  TokenizerSpec spec;
  const Json* model = FindField(json, "model");
  if (model == nullptr || !model->is_object()) return InvalidArgument("field 'model' must be an object");
  KVS_RETURN_IF_ERROR(ParseModel(*model, &spec));
  if (const Json* added = FindField(json, "added_tokens")) KVS_RETURN_IF_ERROR(ParseAdded(*added, &spec));
  if (const Json* normalizer = FindField(json, "normalizer")) KVS_RETURN_IF_ERROR(ParseNormalizer(*normalizer, &spec));
  const Json* pre = FindField(json, "pre_tokenizer");
  if (pre == nullptr) return Unimplemented("no pre-tokenizer: only byte-level BPE is supported");
  KVS_RETURN_IF_ERROR(ParsePreTokenizer(*pre, &spec.pre));
  if (const Json* post = FindField(json, "post_processor")) KVS_RETURN_IF_ERROR(CheckPostProcessor(*post));
  return spec;
}

}  // namespace kvshare::runtime

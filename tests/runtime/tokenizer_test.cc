// The tokenizer against what the tokenizers library and transformers gave for the same strings, and its own laws.
#include "runtime/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

#include "runtime/bpe.h"
#include "runtime/model_files.h"
#include "runtime/pre_tokenizer.h"
#include "runtime/unicode.h"
#include "runtime/utf8.h"
#include "tests/testing/fixtures.h"

namespace kvshare::runtime {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Nlohmann = nlohmann::json;

std::string Slurp(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

// Compares every line {"text", "ids", optional "decoded"} of a file; returns how many there were.
int CompareAll(const Tokenizer& tokenizer, const std::filesystem::path& path) {
  std::ifstream in(path);
  int lines = 0;
  for (std::string line; std::getline(in, line); ++lines) {
    const Nlohmann row = Nlohmann::parse(line);
    const auto text = row["text"].get<std::string>();
    const auto ids = row["ids"].get<std::vector<TokenId>>();
    EXPECT_EQ(tokenizer.Encode(text), ids) << line;
    EXPECT_EQ(tokenizer.Decode(ids), row.value("decoded", text)) << line;
  }
  return lines;
}

std::unique_ptr<Tokenizer> NotesTokenizer() {
  const auto path = testing::RefModelPath();
  if (!path.has_value()) return nullptr;
  auto spec = ParseTokenizerJson(Slurp(*path / "tokenizer.json"));
  EXPECT_TRUE(spec.ok()) << spec.status().message();
  if (!spec.ok()) return nullptr;
  auto tokenizer = NewTokenizer(std::move(*spec));
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  return tokenizer.ok() ? std::move(*tokenizer) : nullptr;
}

// Bytes, then the merges given (their results follow in order), then special tokens.
TokenizerSpec SmallSpec(const std::vector<std::pair<std::string, std::string>>& merges) {
  TokenizerSpec spec;
  for (int b = 0; b < 256; ++b) {
    const char byte = static_cast<char>(b);
    spec.vocab.push_back(BytesToAlphabet({&byte, 1}));
  }
  for (const auto& [left, right] : merges) spec.vocab.push_back(left + right);
  spec.merges = merges;
  spec.pre.steps = {{.kind = PreTokenizerSpec::Step::Kind::kByteLevelSplit}};
  return spec;
}

std::unique_ptr<Tokenizer> Make(TokenizerSpec spec) {
  auto tokenizer = NewTokenizer(std::move(spec));
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  return std::move(tokenizer).value();
}

TEST(TokenizerTest, NotesModelMatchesTheTokenizersLibrary) {
  const auto tokenizer = NotesTokenizer();
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_EQ(CompareAll(*tokenizer, "tests/golden/notes_tokenizer.jsonl"), 434);
  EXPECT_EQ(tokenizer->vocab_size(), 2048);
  EXPECT_EQ(tokenizer->FindToken("<|im_end|>"), 2046);
  EXPECT_TRUE(tokenizer->IsSpecial(2046));
  EXPECT_FALSE(tokenizer->IsSpecial(0));
  EXPECT_EQ(tokenizer->TokenBytes(2046), "<|im_end|>");
  for (const TokenId nothing : {2048, 151'935, -1}) {
    EXPECT_EQ(tokenizer->TokenBytes(nothing), "");
    EXPECT_FALSE(tokenizer->IsSpecial(nothing));
    EXPECT_EQ(tokenizer->Decode(std::vector<TokenId>{2046, nothing, 2046}), "<|im_end|><|im_end|>");
  }
  EXPECT_EQ(tokenizer->FindToken("<|no_such|>"), -1);
}

TEST(TokenizerTest, SmolLm2MatchesTransformersOnAllStrings) {
  KVS_FIXTURE_OR_SKIP(shared, testing::SharedDir());
  KVS_FIXTURE_OR_SKIP(gguf, testing::SmolLm2Path());
  const auto strings = shared / "fixtures/smollm2/strings.jsonl";
  if (!std::filesystem::exists(strings)) GTEST_SKIP() << "not here: " << strings;
  auto files = OpenGguf(gguf.string());
  ASSERT_TRUE(files.ok()) << files.status().message();
  ASSERT_TRUE(files->tokenizer.has_value());
  const auto tokenizer = Make(*files->tokenizer);
  EXPECT_EQ(CompareAll(*tokenizer, strings), 3000);
}

TEST(TokenizerTest, HeapAndScanMergeTheSame) {
  // The same letters as one long word (heap) and as the library's reference rule, applied naively.
  const std::vector<std::pair<std::string, std::string>> merges = {{"a", "b"},  {"b", "a"},    {"ab", "ab"}, {"a", "a"},
                                                                   {"aa", "b"}, {"abab", "a"}, {"b", "b"}};
  const auto spec = SmallSpec(merges);
  auto bpe = Bpe::Make(spec.vocab, spec.merges, {});
  ASSERT_TRUE(bpe.ok());
  const auto scratch = Bpe::NewScratch();
  std::mt19937 rng(11);
  for (int round = 0; round < 2000; ++round) {
    std::string word;
    const std::size_t length = 1 + rng() % 80;
    for (std::size_t i = 0; i < length; ++i) word += rng() % 2 ? 'a' : 'b';
    std::vector<std::string> parts;
    for (const char c : word) parts.emplace_back(1, c);
    while (true) {
      std::size_t best_rank = merges.size(), at = 0;
      for (std::size_t i = 0; i + 1 < parts.size(); ++i) {
        for (std::size_t r = 0; r < best_rank; ++r) {
          if (merges[r].first == parts[i] && merges[r].second == parts[i + 1]) {
            best_rank = r;
            at = i;
          }
        }
      }
      if (best_rank == merges.size()) break;
      parts[at] += parts[at + 1];
      parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(at) + 1);
    }
    std::vector<TokenId> want, got;
    for (const std::string& part : parts) want.push_back((*bpe)->Find(part));
    (*bpe)->Encode(word, scratch.get(), &got);
    ASSERT_EQ(got, want) << word;
  }
}

TEST(TokenizerTest, AMegabyteOfOneLetterTakesNoQuadraticTime) {
  const auto tokenizer = Make(SmallSpec({{"a", "a"}, {"aa", "aa"}, {"aaaa", "aaaa"}}));
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(tokenizer->Encode(std::string(1 << 20, 'a')).size(), (1u << 20) / 8);
  EXPECT_EQ(tokenizer->Encode(std::string(1 << 20, ' ')).size(), 1u << 20);
  // Quadratic would be hours; the bound only has to tell the two apart on any machine.
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(60));
}

TEST(TokenizerTest, AddedTokensAreFoundLongestFirst) {
  TokenizerSpec spec = SmallSpec({});
  spec.added = {{.id = 300, .text = "<x>", .special = true},
                {.id = 301, .text = "<x>y", .special = true},
                {.id = 302, .text = "[s]", .special = true, .lstrip = true, .rstrip = true},
                {.id = 303, .text = "word", .single_word = true}};
  const auto tokenizer = Make(spec);
  EXPECT_THAT(tokenizer->Encode("<x><x>y"), ElementsAre(300, 301));
  EXPECT_THAT(tokenizer->Encode("a \t[s] \n b"), ElementsAre('a', 302, 'b'));
  EXPECT_THAT(tokenizer->Encode("word-word"), ElementsAre(303, '-', 303));
  EXPECT_THAT(tokenizer->Encode("words"), ElementsAre('w', 'o', 'r', 'd', 's'));
  EXPECT_THAT(tokenizer->Encode("<x"), ElementsAre('<', 'x'));
  EXPECT_EQ(tokenizer->vocab_size(), 304);
  EXPECT_EQ(tokenizer->Decode(std::vector<TokenId>{301, 'b'}), "<x>yb");
}

TEST(TokenizerTest, UnknownBytesVanishOrBecomeTheUnknownToken) {
  TokenizerSpec spec = SmallSpec({});
  spec.vocab['q'] = "unk";
  EXPECT_THAT(Make(spec)->Encode("aqqb"), ElementsAre('a', 'b'));
  spec.unk_id = 'q';
  EXPECT_THAT(Make(spec)->Encode("aqqb"), ElementsAre('a', 'q', 'q', 'b'));
  spec.fuse_unk = true;
  EXPECT_THAT(Make(spec)->Encode("aqqb"), ElementsAre('a', 'q', 'b'));
}

TEST(TokenizerTest, PrefixSpaceGoesBeforeTheFirstWord) {
  TokenizerSpec spec = SmallSpec({});
  spec.pre.add_prefix_space = true;
  EXPECT_THAT(Make(spec)->Encode("ab"), ElementsAre(' ', 'a', 'b'));
  EXPECT_THAT(Make(spec)->Encode(" ab"), ElementsAre(' ', 'a', 'b'));
}

TEST(TokenizerTest, BrokenUtf8IsReplacedAsPythonDoesIt) {
  // From Python: bytes.decode("utf-8", errors="replace").
  const std::string r(kReplacementCharacter);
  EXPECT_EQ(RepairUtf8("a\xFFz"), "a" + r + "z");
  EXPECT_EQ(RepairUtf8("\xF0\x9F\x98"), r);
  EXPECT_EQ(RepairUtf8("\xF0\x9F\x98q"), r + "q");
  EXPECT_EQ(RepairUtf8("\xED\xA0\x80"), r + r + r);
  EXPECT_EQ(RepairUtf8("\xC0\xAF"), r + r);
  EXPECT_EQ(RepairUtf8("\xE2\x82\xE2\x82\xAC"), r + "\xE2\x82\xAC");
  EXPECT_EQ(RepairUtf8("\xF4\x90\x80\x80"), r + r + r + r);
  const auto tokenizer = Make(SmallSpec({}));
  EXPECT_EQ(tokenizer->Encode("\xFF"), tokenizer->Encode(r));
  EXPECT_EQ(tokenizer->Decode(std::vector<TokenId>{0xE2, 0x82, 'x'}), r + "x");
}

TEST(TokenizerTest, NfcOrdersAndComposes) {
  EXPECT_EQ(ToNfc("e\xCC\x81"), "\xC3\xA9");
  EXPECT_EQ(ToNfc("s\xCC\x87\xCC\xA3"), "\xE1\xB9\xA9");                     // marks in the other order
  EXPECT_EQ(ToNfc("\xE2\x84\xAB"), "\xC3\x85");                              // angstrom
  EXPECT_EQ(ToNfc("\xE1\x84\x80\xE1\x85\xA1\xE1\x86\xA8"), "\xEA\xB0\x81");  // hangul
  EXPECT_EQ(ToNfc("plain"), "plain");
  // A long run of marks in alternating classes: exchange of neighbours would take minutes.
  std::string marks = "a";
  for (int i = 0; i < 200000; ++i) marks += "\xCC\x95\xCC\xA3";
  EXPECT_EQ(ToNfc(marks).size(), marks.size());  // a (1 byte) and a dot below (2) make U+1EA1 (3)
}

TEST(TokenizerTest, TheDigestTellsTokenizersApart) {
  TokenizerSpec spec = SmallSpec({{"a", "b"}});
  const Digest digest = Make(spec)->digest();
  EXPECT_EQ(Make(spec)->digest(), digest);
  spec.nfc = true;
  EXPECT_NE(Make(spec)->digest(), digest);
}

TEST(TokenizerTest, ContradictionsAreNamed) {
  TokenizerSpec spec = SmallSpec({});
  spec.merges = {{"a", "b"}};
  EXPECT_THAT(NewTokenizer(spec).status().message(), HasSubstr("'ab'"));
  spec = SmallSpec({});
  spec.pre.steps = {{.kind = PreTokenizerSpec::Step::Kind::kRegexSplit, .pattern = "(unclosed"}};
  EXPECT_EQ(NewTokenizer(spec).status().code(), StatusCode::kInvalidArgument);
  spec.pre.steps[0].pattern = "[a&&b]";
  EXPECT_EQ(NewTokenizer(spec).status().code(), StatusCode::kUnimplemented);
  spec = SmallSpec({});
  spec.added = {{.id = -1, .text = "x"}};
  EXPECT_THAT(NewTokenizer(spec).status().message(), HasSubstr("'x'"));
}

TEST(TokenizerTest, APatternWithoutEndIsCutShort) {
  TokenizerSpec spec = SmallSpec({});
  spec.pre.steps = {{.kind = PreTokenizerSpec::Step::Kind::kRegexSplit, .pattern = "(a+)+$x"}};
  EXPECT_EQ(Make(spec)->Encode(std::string(40, 'a') + "b").size(), 41u);
}

TEST(TokenizerJsonTest, KindsWeLackAreNamed) {
  const auto parse = [](const std::string& change_key, const Nlohmann& value) {
    Nlohmann json = {
        {"model", {{"type", "BPE"}, {"vocab", {{"a", 0}, {"b", 1}, {"ab", 2}}}, {"merges", Nlohmann::array({"a b"})}}},
        {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}}};
    json[Nlohmann::json_pointer(change_key)] = value;
    return ParseTokenizerJson(json.dump());
  };
  EXPECT_TRUE(parse("/version", "1.0").ok());
  EXPECT_EQ(parse("/model/merges", Nlohmann::array({Nlohmann::array({"a", "b"})})).value().merges,
            parse("/model/merges", Nlohmann::array({"a b"})).value().merges);
  EXPECT_THAT(parse("/model/type", "Unigram").status().message(), HasSubstr("Unigram"));
  EXPECT_THAT(parse("/normalizer", {{"type", "Lowercase"}}).status().message(), HasSubstr("Lowercase"));
  EXPECT_THAT(parse("/pre_tokenizer", {{"type", "Metaspace"}}).status().message(), HasSubstr("Metaspace"));
  EXPECT_THAT(parse("/post_processor", {{"type", "BertProcessing"}}).status().message(), HasSubstr("BertProcessing"));
  EXPECT_EQ(parse("/model/vocab/b", 0).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(parse("/model/vocab/b", -1).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(parse("/model/merges", Nlohmann::array({"a"})).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(parse("/added_tokens", 3).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(ParseTokenizerJson("{").status().code(), StatusCode::kInvalidArgument);
}

TEST(PreTokenizerTest, NamesOfGguf) {
  const auto words = [](std::string_view name, std::string_view text) {
    auto pre = PreTokenizer::Make(PreTokenizerByName(name).value());
    PreTokenizer::Words out;
    (*pre)->Split(text, &out);
    return std::vector<std::string>(out.words.begin(), out.words.end());
  };
  EXPECT_THAT(words("gpt-2", "it's 1234  x"), ElementsAre("it", "'s", " 1234", " ", " x"));
  EXPECT_THAT(words("smollm", "a12"), ElementsAre("a", "1", "2"));
  EXPECT_THAT(words("llama-bpe", "1234 it'S"), ElementsAre("123", "4", " it", "'S"));
  EXPECT_THAT(words("qwen2", "12\n\nx"), ElementsAre("1", "2", "\n\n", "x"));
  EXPECT_EQ(PreTokenizerByName("mpt").status().code(), StatusCode::kUnimplemented);
}

}  // namespace
}  // namespace kvshare::runtime

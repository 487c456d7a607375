// TextStream: whole characters, stop strings across tokens, nothing lost.
#include "runtime/text_stream.h"

#include <gtest/gtest.h>

#include <random>

#include "runtime/bpe.h"
#include "runtime/utf8.h"

namespace kvshare::runtime {
namespace {

// Ids 0..255 are the bytes; each further piece is a token of its own.
std::unique_ptr<Tokenizer> Pieces(const std::vector<std::string>& pieces) {
  TokenizerSpec spec;
  for (int b = 0; b < 256; ++b) {
    const char byte = static_cast<char>(b);
    spec.vocab.push_back(BytesToAlphabet({&byte, 1}));
  }
  for (const std::string& piece : pieces) spec.vocab.push_back(BytesToAlphabet(piece));
  return std::move(NewTokenizer(std::move(spec))).value();
}

TEST(TextStreamTest, CharactersAreReleasedWhole) {
  const auto tokenizer = Pieces({});
  TextStream stream(tokenizer.get(), {});
  const std::string euro = "\xE2\x82\xAC";
  stream.Push(0xE2);
  EXPECT_EQ(stream.TakeDelta(), "");
  stream.Push(0x82);
  EXPECT_EQ(stream.TakeDelta(), "");
  stream.Push(0xAC);
  EXPECT_EQ(stream.TakeDelta(), euro);
  stream.Push(0xF0);
  stream.Push('x');  // the character never came
  EXPECT_EQ(stream.TakeDelta(), std::string(kReplacementCharacter) + "x");
  stream.Push(0xE2);
  stream.Finish();
  EXPECT_EQ(stream.TakeDelta(), kReplacementCharacter);
  EXPECT_EQ(stream.text(), euro + std::string(kReplacementCharacter) + "x" + std::string(kReplacementCharacter));
}

TEST(TextStreamTest, AStopStringAcrossTokensIsHeldBack) {
  const auto tokenizer = Pieces({"ab#", "#", "#cd", "#x"});
  TextStream stream(tokenizer.get(), {"###"});
  EXPECT_FALSE(stream.Push(256));
  EXPECT_EQ(stream.TakeDelta(), "ab");
  EXPECT_FALSE(stream.Push(257));
  EXPECT_EQ(stream.TakeDelta(), "");
  EXPECT_TRUE(stream.Push(258));
  EXPECT_EQ(stream.text(), "ab");
  EXPECT_TRUE(stream.Push(256));  // nothing more is taken
  stream.Finish();
  EXPECT_EQ(stream.text(), "ab");
}

TEST(TextStreamTest, AFalseStartIsReleased) {
  const auto tokenizer = Pieces({"ab#", "#x"});
  TextStream stream(tokenizer.get(), {"###"});
  EXPECT_FALSE(stream.Push(256));
  EXPECT_FALSE(stream.Push(257));
  EXPECT_EQ(stream.TakeDelta(), "ab##x");
  EXPECT_FALSE(stream.Push(256));
  stream.Finish();
  EXPECT_EQ(stream.text(), "ab##xab#");
}

TEST(TextStreamTest, AStopStringMayEndWithinATokenAndBeginWithinACharacter) {
  const auto tokenizer = Pieces({});
  TextStream stream(tokenizer.get(), {"\xC3\xA9!"});
  EXPECT_FALSE(stream.Push('a'));
  EXPECT_FALSE(stream.Push(0xC3));
  EXPECT_FALSE(stream.Push(0xA9));
  EXPECT_EQ(stream.TakeDelta(), "a");
  EXPECT_TRUE(stream.Push('!'));
  EXPECT_EQ(stream.text(), "a");
}

TEST(TextStreamTest, TheFirstToBeCompleteWins) {
  const auto tokenizer = Pieces({"xabcd"});
  for (const bool at_once : {true, false}) {
    TextStream stream(tokenizer.get(), {"abcd", "bc", ""});
    bool stopped = false;
    if (at_once) {
      stopped = stream.Push(256);
    } else {
      for (const char c : {'x', 'a', 'b', 'c'}) stopped = stream.Push(c);
    }
    EXPECT_TRUE(stopped);
    EXPECT_EQ(stream.text(), "xa");
  }
  TextStream stream(tokenizer.get(), {"cd", "abcd"});
  EXPECT_TRUE(stream.Push(256));
  EXPECT_EQ(stream.text(), "x");
}

// Against the whole text at once: released text is a prefix that never has a stop string, and ends as a search would.
TEST(TextStreamTest, RandomStreamsEndWhereASearchOfTheWholeTextSays) {
  const auto tokenizer = Pieces({"ab", "ba", "aab", "\xC3", "\xA9", "\xC3\xA9"});
  const std::vector<TokenId> alphabet = {'a', 'b', 256, 257, 258, 259, 260, 261};
  const std::vector<std::string> stops = {"abab", "baa",
                                          "\xC3\xA9"
                                          "a",
                                          "bbbb"};
  std::mt19937 rng(5);
  for (int round = 0; round < 3000; ++round) {
    TextStream stream(tokenizer.get(), stops);
    std::vector<TokenId> ids;
    std::string deltas;
    bool stopped = false;
    while (!stopped && ids.size() < 30) {
      ids.push_back(alphabet[rng() % alphabet.size()]);
      stopped = stream.Push(ids.back());
      deltas += stream.TakeDelta();
    }
    stream.Finish();
    deltas += stream.TakeDelta();
    ASSERT_EQ(deltas, stream.text());
    ASSERT_TRUE(IsValidUtf8(stream.text()));
    const std::string whole = tokenizer->Decode(ids);
    std::size_t first_end = std::string::npos, begin = 0;
    for (const std::string& stop : stops) {
      const std::size_t at = whole.find(stop);
      if (at == std::string::npos) continue;
      if (at + stop.size() < first_end || (at + stop.size() == first_end && at < begin)) {
        first_end = at + stop.size();
        begin = at;
      }
    }
    ASSERT_EQ(stopped, first_end != std::string::npos);
    ASSERT_EQ(stream.text(), stopped ? whole.substr(0, begin) : whole);
  }
}

}  // namespace
}  // namespace kvshare::runtime

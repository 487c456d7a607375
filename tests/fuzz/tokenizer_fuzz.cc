// tokenizer.json of any bytes and, after a zero byte, a text to encode with what it makes.
#include <cstdlib>

#include "runtime/text_stream.h"
#include "runtime/tokenizer.h"
#include "runtime/utf8.h"
#include "tests/fuzz/seeded.h"

namespace kvshare {
namespace {

std::vector<std::string> Seeds() {
  const std::string head =
      R"({"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2,"Ġ":3,"Ġa":4,"Ã":5,"©":6,"1":7},"merges":)"
      R"(["a b",["Ġ","a"]]},)"
      R"("added_tokens":[{"id":8,"content":"<|x|>","special":true},{"id":9,"content":"[y]","lstrip":true,)"
      R"("rstrip":true,)"
      R"("single_word":true,"normalized":true}],"pre_tokenizer":)";
  const std::string text = std::string(1, '\0') +
                           "ab a b11<|x|> [y] \xC3\xA9"
                           "e\xCC\x81\xFF  ab\n";
  return {
      head + R"({"type":"ByteLevel","add_prefix_space":false,"use_regex":true},"normalizer":{"type":"NFC"}})" + text,
      head +
          R"({"type":"Sequence","pretokenizers":[{"type":"Digits","individual_digits":true},{"type":"ByteLevel"}]}})" +
          text,
      head +
          R"({"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":"\\s+(?!\\S)|[^\\s\\p{L}]+|\\w+"},)"
          R"("behavior":"Isolated"},{"type":"ByteLevel","use_regex":false}]}})" +
          text,
  };
}

}  // namespace
}  // namespace kvshare

KVS_FUZZ_SEEDS(kvshare::Seeds)

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace kvshare;
  const std::string input(reinterpret_cast<const char*>(data), size);
  const std::size_t zero = input.find('\0');
  auto spec = runtime::ParseTokenizerJson(input.substr(0, zero));
  if (!spec.ok()) return 0;
  const auto tokenizer = runtime::NewTokenizer(std::move(*spec));
  if (!tokenizer.ok()) return 0;
  // Short: a hostile pattern may take its whole match limit at every character.
  const std::string text = zero == std::string::npos ? "ab" : input.substr(zero + 1, 64);
  const std::vector<TokenId> ids = (*tokenizer)->Encode(text);
  runtime::TextStream stream(tokenizer->get(), {"ab", "\xC3\xA9"});
  for (const TokenId id : ids) {
    if (id < 0 || id >= (*tokenizer)->vocab_size()) std::abort();
    if (stream.Push(id)) break;
  }
  stream.Finish();
  if (!runtime::IsValidUtf8(stream.text()) || !runtime::IsValidUtf8((*tokenizer)->Decode(ids))) std::abort();
  return 0;
}

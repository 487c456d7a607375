#include "agentd/repair/role.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/testing/status_matchers.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::agentd {
namespace {

using Ids = std::vector<TokenId>;
using testing::kTinyImEnd;
using testing::kTinyImStart;

// The tiny tokenizer with the special tokens of other families.
std::unique_ptr<runtime::Tokenizer> TokenizerOfAll() {
  Result<runtime::TokenizerSpec> spec = runtime::ParseTokenizerJson(testing::TinyTokenizerJson());
  if (!spec.ok()) return nullptr;
  for (const char* text : {"<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM]", "[/SYSTEM]", "<start>", "<end>", "<eot>",
                           "<User>", "<Assistant>"}) {
    spec->added.push_back({.id = static_cast<TokenId>(spec->vocab.size()), .text = text, .special = true});
    spec->vocab.emplace_back(text);
  }
  auto tokenizer = runtime::NewTokenizer(std::move(*spec));
  return tokenizer.ok() ? std::move(*tokenizer) : nullptr;
}

class RoleTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_NE(tokenizer_, nullptr); }

  RoleMarks Marks(const std::string& source) {
    auto chat = runtime::NewChatTemplate(source, {.bos = "<s>", .eos = "</s>"});
    KVS_EXPECT_OK(chat);
    return chat.ok() ? RoleMarksOf(**chat, *tokenizer_) : RoleMarks{};
  }
  Ids Encode(const std::string& text) { return tokenizer_->Encode(text); }
  // How much of a text is its role; the length of the text's beginning that is the same.
  void ExpectRole(const RoleMarks& marks, const std::string& role, const std::string& rest) {
    EXPECT_EQ(RoleTokens(Encode(role + rest), marks), static_cast<std::int64_t>(Encode(role).size())) << role;
  }

  const std::unique_ptr<runtime::Tokenizer> tokenizer_ = TokenizerOfAll();
};

// Every message between the same marks; what it is stands in text.
constexpr char kChatMl[] =
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}";

TEST_F(RoleTest, EndsWhereTheSystemMessageDoes) {
  const RoleMarks marks = Marks(kChatMl);
  EXPECT_EQ(marks.begin, (Ids{kTinyImStart, 's'}));
  EXPECT_EQ(marks.ends, Ids{kTinyImEnd});
  ExpectRole(marks, "<|im_start|>system\nYou are a critic.<|im_end|>", "\n<|im_start|>user\nRead.<|im_end|>\n");
  ExpectRole(marks, "", "<|im_start|>user\nA document, and a question.<|im_end|>\n");
  ExpectRole(marks, "", "<|im_start|>system\nwithout an end");
  ExpectRole(marks, "", "A document.<|im_end|>");
}

TEST_F(RoleTest, WhereEveryPromptHasASystemMessageItsHeaderBeginsIt) {
  const std::string rest = std::string(kChatMl);
  const RoleMarks marks = Marks(
      "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}" + rest);
  EXPECT_EQ(marks.begin, (Ids{kTinyImStart, 's'}));
  // Llama's writes the date, which is another tomorrow, before what it is given.
  const std::string dated =
      "{{ '<s>' }}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set messages = "
      "messages[1:] %}{% else %}{% set s = '' %}{% endif %}{{ '<start>system<end>\\nToday: 23 Nov\\n' + s + '<eot>' }}"
      "{% for m in messages %}{{ '<start>' + m['role'] + '<end>\\n' + m['content'] + '<eot>' }}{% endfor %}";
  const RoleMarks llama = Marks(dated);
  ExpectRole(llama, "<s><start>system<end>\nToday: 24 Nov\nYou plan.<eot>", "<start>user<end>\nGo.<eot>");
}

TEST_F(RoleTest, TemplatesThatEndOnlyAnswers) {
  const char* inst =
      "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ '[SYSTEM]' + m['content'] + '[/SYSTEM]' "
      "}}"
      "{% elif m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}{% else %}{{ m['content'] + '</s>' }}"
      "{% endif %}{% endfor %}";
  const RoleMarks marks = Marks(inst);
  ExpectRole(marks, "<s>[SYSTEM]You are a critic.[/SYSTEM]", "[INST]A document.[/INST]An answer.</s>");
  ExpectRole(marks, "", "<s>[INST]A document.[/INST]An answer.</s>[INST]Go on.[/INST]");
  // The next message's mark may be the only one.
  const RoleMarks bare = Marks(
      "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% elif m['role'] == "
      "'user' %}{{ '<User>' + m['content'] }}{% else %}{{ '<Assistant>' + m['content'] + '</s>' }}{% endif %}{% endfor "
      "%}");
  ExpectRole(bare, "<s>You are a critic.<User>", "A document.<Assistant>An answer.</s>");
  ExpectRole(bare, "<s><User>", "A document.<Assistant>An answer.</s>");
}

TEST_F(RoleTest, WhereTheEndCannotBeToldThereIsNone) {
  const std::string prompt = "<s>[INST]You are a critic.\n\nA document.[/INST]An answer.</s>[INST]Go on.[/INST]";
  // The system's words and the user's in one message.
  const RoleMarks joined = Marks(
      "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\\n\\n' %}{% set "
      "messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}{% if m['role'] == 'user' "
      "%}{{ '[INST]' + (s if loop.first else '') + m['content'] + '[/INST]' }}{% else %}{{ m['content'] + '</s>' }}{% "
      "endif %}{% endfor %}");
  EXPECT_EQ(joined.ends, Ids{});
  ExpectRole(joined, "", prompt);
  const RoleMarks refused =
      Marks("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}" +
            std::string(kChatMl));
  ExpectRole(refused, "", "<|im_start|>user\nA document.<|im_end|>\n");
}

TEST_F(RoleTest, AMessageEndsBehindAUsersWordsToo) {
  const auto ends = [&](const std::string& source, const Ids& turn_ends) {
    auto chat = runtime::NewChatTemplate(source, {.bos = "<s>", .eos = "</s>"});
    KVS_EXPECT_OK(chat);
    return chat.ok() ? MessageEndsOf(**chat, *tokenizer_, turn_ends) : Ids{};
  };
  const Ids mistral = Encode("</s>[/INST]");
  const std::string inst =
      "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
      "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}";
  EXPECT_EQ(ends(inst, {mistral[0]}), mistral);
  EXPECT_EQ(ends(kChatMl, {kTinyImEnd}), Ids{kTinyImEnd});
  // The marks of Llama 2's are ordinary text.
  EXPECT_EQ(ends("{% for m in messages %}{{ 'INST ' + m['content'] + ' /INST' }}{% endfor %}", {5}), Ids{5});
  EXPECT_EQ(ends("{{ raise_exception('no') }}", {5, 6}), (Ids{5, 6}));
}

TEST_F(RoleTest, OfPromptsThatSomebodyElseRenderedAnyBeginningThatEnds) {
  const RoleMarks marks = {.ends = {7, 8}};
  EXPECT_EQ(RoleTokens(Ids{1, 2, 8, 3, 7, 4}, marks), 3);
  EXPECT_EQ(RoleTokens(Ids{7, 2}, marks), 1);
  EXPECT_EQ(RoleTokens(Ids{1, 2, 3}, marks), 0);
  EXPECT_EQ(RoleTokens({}, marks), 0);
}

}  // namespace
}  // namespace kvshare::agentd

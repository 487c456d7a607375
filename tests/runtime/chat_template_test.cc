// Chat templates against what jinja2 (tests/golden) and transformers (shared fixtures) rendered, and the bounds.
#include "runtime/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "runtime/model_files.h"
#include "tests/testing/fixtures.h"

namespace kvshare::runtime {
namespace {

using ::testing::HasSubstr;
using Ordered = nlohmann::ordered_json;

constexpr char kUser[] = R"([{"role": "user", "content": "Hi"}])";

Result<std::string> RenderText(std::string_view source, std::string_view messages, std::string_view tools = "",
                               bool add = false) {
  auto chat = NewChatTemplate(source, {.bos = "<s>", .eos = "</s>"});
  if (!chat.ok()) return chat.status();
  return (*chat)->Render(messages, tools, add);
}

Status Failure(std::string_view source, std::string_view messages = kUser, std::string_view tools = "") {
  auto text = RenderText(source, messages, tools);
  return text.ok() ? OkStatus() : text.status();
}

TEST(ChatTemplateTest, RendersWhatJinjaRenders) {
  std::ifstream in("tests/golden/templates.jsonl");
  int rows = 0;
  for (std::string line; std::getline(in, line); ++rows) {
    const Ordered row = Ordered::parse(line);
    const auto text = RenderText(row["template"].get<std::string>(), row["messages"].dump(),
                                 row["tools"].is_null() ? "" : row["tools"].dump(), row["add_generation_prompt"]);
    if (row.contains("prompt")) {
      ASSERT_TRUE(text.ok()) << line << "\n" << text.status().message();
      EXPECT_EQ(*text, row["prompt"].get<std::string>()) << line;
    } else {
      ASSERT_FALSE(text.ok()) << line << "\nrendered: " << *text;
      EXPECT_EQ(text.status().code(), StatusCode::kInvalidArgument);
      if (row.contains("raised")) {
        EXPECT_EQ(text.status().message(), "chat template: " + row["error"].get<std::string>());
      } else {
        EXPECT_THAT(text.status().message(), HasSubstr("line ")) << line;
      }
    }
  }
  EXPECT_GT(rows, 500);
}

TEST(ChatTemplateTest, RendersSmolLm2AsTransformers) {
  KVS_FIXTURE_OR_SKIP(shared, testing::SharedDir());
  KVS_FIXTURE_OR_SKIP(gguf, testing::SmolLm2Path());
  std::ifstream in(shared / "fixtures/smollm2/render.jsonl");
  if (!in) GTEST_SKIP() << "not here: fixtures/smollm2/render.jsonl";
  auto files = OpenGguf(gguf.string());
  ASSERT_TRUE(files.ok()) << files.status().message();
  for (std::string line; std::getline(in, line);) {
    const Ordered row = Ordered::parse(line);
    const auto text = RenderText(files->chat_template, row["messages"].dump(), "", row["add_generation_prompt"]);
    ASSERT_TRUE(text.ok()) << text.status().message();
    EXPECT_EQ(*text, row["prompt"].get<std::string>());
  }
}

TEST(ChatTemplateTest, WrongMessagesAreNamed) {
  const auto message = [](std::string_view messages) { return Failure("{{ messages }}", messages).message(); };
  EXPECT_THAT(message("[]"), HasSubstr("empty"));
  EXPECT_THAT(message("{}"), HasSubstr("must be a list"));
  EXPECT_THAT(message("nonsense"), HasSubstr("not valid JSON"));
  EXPECT_THAT(message(""), HasSubstr("not valid JSON"));
  EXPECT_THAT(message("[3]"), HasSubstr("messages[0]"));
  EXPECT_THAT(message(R"([{"content": "x"}])"), HasSubstr("messages[0].role"));
  EXPECT_THAT(message(R"([{"role": "user", "content": "x"}, {"role": "user"}])"), HasSubstr("messages[1].content"));
  EXPECT_THAT(message(R"([{"role": "user", "content": 5}])"), HasSubstr("messages[0].content"));
  EXPECT_THAT(message(R"([{"role": "user", "content": null}])"), HasSubstr("messages[0].content"));
  EXPECT_THAT(message(R"([{"role": "user", "content": [{"type": "image"}]}])"), HasSubstr("content[0]"));
  EXPECT_THAT(message(R"([{"role": 1, "content": ""}])"), HasSubstr("messages[0].role"));
  EXPECT_THAT(message(std::string(1000, '[')), HasSubstr("deep"));
  EXPECT_THAT(message(R"([{"role": "user", "content": "x", "n": 99999999999999999999}])"), HasSubstr("64 bits"));
  EXPECT_THAT(Failure("x", kUser, "{}").message(), HasSubstr("tools must be a list"));
  EXPECT_EQ(Failure("x", "[]").code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(Failure("x", R"([{"role": "assistant", "content": null, "tool_calls": []}])").ok());
}

// Many templates add content to a string. The parts' text and no text do for them; others see what was given.
TEST(ChatTemplateTest, TextPartsAndNullAreTextWhereTheTemplateNeedsIt) {
  constexpr char kAdds[] = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ';' }}{% endfor %}";
  constexpr char kMixed[] =
      R"([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
      {"role": "assistant", "content": null, "tool_calls": []}, {"role": "assistant", "tool_calls": []},
      {"role": "user", "content": "c"}])";
  const auto text = RenderText(kAdds, kMixed);
  ASSERT_TRUE(text.ok()) << text.status().message();
  EXPECT_EQ(*text, "user:a\nb;assistant:;assistant:;user:c;");
  const auto seen = RenderText("{{ messages[0].content | length }}{{ messages[1].content is none }}", kMixed);
  ASSERT_TRUE(seen.ok()) << seen.status().message();
  EXPECT_EQ(*seen, "2True");
  EXPECT_THAT(Failure("{{ messages[0].content + 1 }}", kMixed).message(), HasSubstr("list"));  // of what was given
}

TEST(ChatTemplateTest, ErrorsHaveLineAndColumn) {
  EXPECT_THAT(Failure("a\n  {{ 1 + }}").message(), HasSubstr("line 2, column 10"));
  EXPECT_THAT(Failure("{{ x }}\n{{ nothing.at_all }}").message(),
              HasSubstr("line 2, column 11: 'nothing' is undefined"));
  EXPECT_EQ(Failure("{{ raise_exception('as it says') }}").message(), "chat template: as it says");
}

// Each would run, grow or recurse without end.
TEST(ChatTemplateTest, BoundsHold) {
  const char* const kHungry[] = {
      "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
      "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
      "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
      "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | "
      "tojson }}",
      "{% set ns = namespace(l=[1], k=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}"
      "{% set ns.k = [ns.k, ns.k] %}{% endfor %}{{ ns.l == ns.k }}",
      "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = [ns.l] %}{% endfor %}",
      "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
      "{{ 'x' * 999999999999 }}",
      "{{ [1] * 999999999999 }}",
      "{{ ('a' * 100000) | replace('', 'b' * 100000) }}",
      "{{ range(999999999) }}",
      "{{ ('a\n' * 100000) | indent(1000) }}",
      "{% set ns = namespace(l=['x' * 1000000]) %}{% for i in range(20) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ "
      "ns.l | join }}",
  };
  for (const char* source : kHungry) EXPECT_EQ(Failure(source).code(), StatusCode::kResourceExhausted) << source;
  const auto repeat = [](const std::string& s, int n) {
    std::string out;
    for (int i = 0; i < n; ++i) out += s;
    return out;
  };
  // Macros that call themselves from deep inside: the stack must hold until the bound is met.
  const std::string calls[] = {
      repeat("{% if 1 %}", 60) + "{{ " + repeat("not ", 65) + "m(1) }}" + repeat("{% endif %}", 60),
      "{{ " + repeat("m(", 70) + "1" + repeat(")", 70) + " }}",
      "{{ " + repeat("[", 70) + "m(1)" + repeat("]", 70) + " }}"};
  for (const std::string& body : calls) {
    const std::string source = "{% macro m(n) %}" + body + "{% endmacro %}{{ m(1) }}";
    EXPECT_EQ(Failure(source).code(), StatusCode::kResourceExhausted) << body.substr(0, 40);
  }
  for (const std::string& deep :
       {"{{ " + repeat("(", 5000) + "1" + repeat(")", 5000) + " }}", "{{ " + repeat("-", 5000) + "1 }}",
        "{{ 1" + repeat(" + 1", 5000) + " }}", "{{ x" + repeat(".x", 5000) + " }}", repeat("{% if 1 %}", 5000),
        "{{ " + repeat("not ", 5000) + "1 }}", "{{ 1" + repeat(" if 1 else 1", 5000) + " }}",
        "{{ " + repeat("[", 5000) + " }}"}) {
    EXPECT_EQ(Failure(deep).code(), StatusCode::kInvalidArgument) << deep.substr(0, 40);
  }
}

}  // namespace
}  // namespace kvshare::runtime

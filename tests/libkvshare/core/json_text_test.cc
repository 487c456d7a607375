#include "libkvshare/core/json_text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvshare {
namespace {

using ::testing::StartsWith;

// The reasons are the parser's, whose words may change.
TEST(JsonTextTest, WhatIsNotJsonIsSaidWhereAndWhy) {
  const auto message = [](const std::string& text) { return ParseJson(text).status().message(); };
  EXPECT_THAT(message("{\"a\": tru}"), StartsWith("not JSON at column 10: invalid literal"));
  EXPECT_THAT(message("{\n \"a\": 1,\n \"b\" 2}"), StartsWith("not JSON at line 3, column 6: unexpected number"));
  EXPECT_THAT(message("[1, 2"), StartsWith("not JSON at column 6: unexpected end of input"));
  EXPECT_THAT(message(""), StartsWith("not JSON at column 1: "));
  EXPECT_THAT(message("[1e999]"), StartsWith("not JSON: number overflow"));
  EXPECT_THAT(message("[\"\\ud800\"]"), StartsWith("not JSON at column 9: invalid string: surrogate"));
  // Nothing of the bytes themselves, which a terminal might obey.
  EXPECT_EQ(message("[\"h\xff\"]"), "not JSON at column 4: invalid string: ill-formed UTF-8 byte");
  const auto nested = [](int levels) { return std::string(levels, '[') + std::string(levels, ']'); };
  EXPECT_TRUE(ParseJson(nested(kMaxJsonDepth)).ok());
  EXPECT_EQ(message(nested(kMaxJsonDepth + 1)), "JSON nested deeper than " + std::to_string(kMaxJsonDepth) + " levels");
  EXPECT_EQ(*ParseJson("[\"[[\\\"[\", {}]"), nlohmann::json::array({"[[\"[", nlohmann::json::object()}));
}

// Python's str.splitlines ends a line at these; a reader of JSON lines may use it.
TEST(JsonTextTest, NothingInALineEndsIt) {
  const std::string text = "a\u0085b\u2028c\u2029\u2029d\n\u00e9\u2030";
  const nlohmann::json json = {{"text", text}};
  const std::string line = JsonText(json);
  EXPECT_EQ(line, R"({"text":"a\u0085b\u2028c\u2029\u2029d\n)"
                  "\u00e9\u2030\"}");
  EXPECT_EQ(nlohmann::json::parse(line), json);
}

TEST(JsonTextTest, BytesThatAreNoTextAreReplaced) {
  EXPECT_EQ(JsonText(nlohmann::ordered_json{{"x", "\xe2\x80"}}), "{\"x\":\"\ufffd\"}");
}

}  // namespace
}  // namespace kvshare

#include "libkvshare/core/json_text.h"

#include <gtest/gtest.h>

namespace kvshare {
namespace {

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

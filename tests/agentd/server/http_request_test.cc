// HttpParser: the same request whole and byte by byte; every malformed one refused with its status.
#include "agentd/server/http_request.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvshare::agentd {
namespace {

// Feeds `text` in pieces; `rest` gets what belongs to the next request.
HttpParser Parse(std::string_view text, std::size_t piece, std::string* rest = nullptr, HttpLimits limits = {}) {
  HttpParser parser(limits);
  while (!text.empty()) {
    std::string_view data = text.substr(0, piece);
    text.remove_prefix(data.size());
    if (parser.Feed(&data) != HttpParser::State::kNeedMore) {
      if (rest != nullptr) *rest = std::string(data) + std::string(text);
      break;
    }
    EXPECT_TRUE(data.empty());
  }
  return parser;
}

TEST(HttpParserTest, ARequestIsTheSameInAnyPieces) {
  const std::string text =
      "\r\nPOST /v1/x?a=b&c HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nX-Two:  a b \r\nX-Empty:\r\n\r\nhelloGET ";
  for (const std::size_t piece : {1, 2, 3, 7, 1000}) {
    std::string rest;
    HttpParser parser = Parse(text, piece, &rest);
    ASSERT_EQ(parser.state(), HttpParser::State::kDone) << piece << parser.reason();
    const HttpRequest request = parser.TakeRequest();
    EXPECT_EQ(request.method, "POST");
    EXPECT_EQ(request.path, "/v1/x");
    EXPECT_EQ(request.query, "a=b&c");
    EXPECT_EQ(request.body, "hello");
    EXPECT_EQ(request.Header("x-two"), "a b");
    EXPECT_EQ(request.Header("x-empty"), "");
    EXPECT_EQ(request.Header("x-none"), "");
    EXPECT_TRUE(request.keep_alive);
    EXPECT_EQ(rest, "GET ");
  }
}

TEST(HttpParserTest, ChunkedBodiesAreJoined) {
  const std::string text =
      "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
      "5\r\nhello\r\n1;ext=1\r\n \r\nA\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\nnext";
  for (const std::size_t piece : {1, 2, 3, 7, 1000}) {
    std::string rest;
    HttpParser parser = Parse(text, piece, &rest);
    ASSERT_EQ(parser.state(), HttpParser::State::kDone) << piece << parser.reason();
    EXPECT_EQ(parser.TakeRequest().body, "hello 0123456789");
    EXPECT_EQ(rest, "next");
  }
}

TEST(HttpParserTest, ConnectionsStayOpenAsTheVersionSays) {
  const auto keeps = [](const std::string& head) {
    HttpParser parser = Parse(head + "\r\n\r\n", 1000);
    EXPECT_EQ(parser.state(), HttpParser::State::kDone) << head << ": " << parser.reason();
    return parser.TakeRequest().keep_alive;
  };
  EXPECT_TRUE(keeps("GET / HTTP/1.1\r\nHost: h"));
  EXPECT_FALSE(keeps("GET / HTTP/1.1\r\nHost: h\r\nConnection: foo, Close"));
  EXPECT_FALSE(keeps("GET / HTTP/1.0"));
}

TEST(HttpParserTest, ContinueIsAskedForOnce) {
  HttpParser parser = Parse("POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n", 1000);
  EXPECT_TRUE(parser.TakeContinue());
  EXPECT_FALSE(parser.TakeContinue());
  EXPECT_EQ(parser.state(), HttpParser::State::kNeedMore);
}

struct Bad {
  const char* name;
  std::string text;
  int status;
};

class HttpParserRefusesTest : public ::testing::TestWithParam<Bad> {};

TEST_P(HttpParserRefusesTest, WithAStatusAndAReason) {
  for (const std::size_t piece : {1, 5, 100000}) {
    const HttpParser parser =
        Parse(GetParam().text, piece, nullptr, {.head_bytes = 1000, .headers = 5, .body_bytes = 50});
    ASSERT_EQ(parser.state(), HttpParser::State::kRefused);
    EXPECT_EQ(parser.status(), GetParam().status) << parser.reason();
    EXPECT_FALSE(parser.reason().empty());
  }
}

const std::string kHead = "POST / HTTP/1.1\r\nHost: h\r\n";

INSTANTIATE_TEST_SUITE_P(
    Requests, HttpParserRefusesTest,
    ::testing::Values(
        Bad{"NoVersion", "GET /\r\n\r\n", 400}, Bad{"NoPath", "GET HTTP/1.1\r\n\r\n", 400},
        Bad{"Tls", std::string("\x16\x03\x01\x02\r\n\r\n", 8), 400}, Bad{"Version2", "GET / HTTP/2.0\r\n\r\n", 505},
        Bad{"Other", "GET / GOPHER/1\r\n\r\n", 400}, Bad{"Absolute", "GET http://h/ HTTP/1.1\r\nHost: h\r\n\r\n", 400},
        Bad{"SpaceInPath", "GET /a b HTTP/1.1\r\nHost: h\r\n\r\n", 400},
        Bad{"ControlInPath", std::string("GET /a\0b HTTP/1.1\r\nHost: h\r\n\r\n", 31), 400},
        Bad{"NoHost", "GET / HTTP/1.1\r\n\r\n", 400}, Bad{"TwoHosts", kHead + "Host: g\r\n\r\n", 400},
        Bad{"NoColon", kHead + "nonsense\r\n\r\n", 400}, Bad{"SpaceBeforeColon", kHead + "A : b\r\n\r\n", 400},
        Bad{"Folded", kHead + "A: b\r\n c\r\n\r\n", 400}, Bad{"ControlInValue", kHead + "A: b\x01\r\n\r\n", 400},
        Bad{"BareLineFeed", "GET / HTTP/1.1\nHost: h\n\r\n\r\n", 400},
        Bad{"LengthTwice", kHead + "Content-Length: 1\r\nContent-Length: 1\r\n\r\n", 400},
        Bad{"LengthAndChunked", kHead + "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
        Bad{"NegativeLength", kHead + "Content-Length: -1\r\n\r\n", 400},
        Bad{"PlusLength", kHead + "Content-Length: +1\r\n\r\n", 400},
        Bad{"EmptyLength", kHead + "Content-Length:\r\n\r\n", 400},
        Bad{"HugeLength", kHead + "Content-Length: 99999999999999999999\r\n\r\n", 400},
        Bad{"LongBody", kHead + "Content-Length: 51\r\n\r\n", 413},
        Bad{"Gzip", kHead + "Transfer-Encoding: gzip, chunked\r\n\r\n", 501},
        Bad{"ManyHeaders", kHead + "A: b\r\nA: b\r\nA: b\r\nA: b\r\nA: b\r\n\r\n", 431},
        Bad{"LongHead", kHead + "A: " + std::string(2000, 'x'), 431},
        Bad{"ChunkSize", kHead + "Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400},
        Bad{"ChunkNegative", kHead + "Transfer-Encoding: chunked\r\n\r\n-1\r\n", 400},
        Bad{"ChunkTooLarge", kHead + "Transfer-Encoding: chunked\r\n\r\n33\r\n", 413},
        Bad{"ChunkOverflow", kHead + "Transfer-Encoding: chunked\r\n\r\nffffffffffffffff0\r\n", 400},
        Bad{"ChunkHuge", kHead + "Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n", 413},
        Bad{"ChunkLine", kHead + "Transfer-Encoding: chunked\r\n\r\n" + std::string(300, '1'), 400},
        Bad{"ChunkBareLineFeed", kHead + "Transfer-Encoding: chunked\r\n\r\n1\nx\r\n", 400},
        Bad{"ChunkLonger", kHead + "Transfer-Encoding: chunked\r\n\r\n1\r\nxy\r\n", 400},
        Bad{"Trailers",
            kHead + "Transfer-Encoding: chunked\r\n\r\n0\r\n" + std::string(600, 'a') + "\r\n" + std::string(600, 'a') +
                "\r\n\r\n",
            431}),
    [](const auto& bad) { return bad.param.name; });

}  // namespace
}  // namespace kvshare::agentd

// An HTTP request of any bytes, in pieces whose size the first byte gives: the outcome does not depend on the pieces,
// and nothing exceeds its limit.
#include <cstdlib>
#include <string_view>

#include "agentd/server/http_request.h"
#include "tests/fuzz/seeded.h"

namespace kvshare {
namespace {

std::vector<std::string> Seeds() {
  return {"\x03GET /metrics?a HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
          "\x05POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nhello",
          "\x01POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nA: b\r\n\r\n",
          "\x10GET / HTTP/1.0\r\n\r\nGET / HTTP/1.1\r\n\r\n"};
}

constexpr agentd::HttpLimits kLimits{.head_bytes = 300, .headers = 8, .body_bytes = 64};

// How a request ended, and what was left behind it.
struct Outcome {
  agentd::HttpParser::State state;
  int status = 0;
  std::string body;
  std::string path;
  std::size_t left = 0;
  bool operator==(const Outcome&) const = default;
};

Outcome Parse(std::string_view text, std::size_t piece) {
  agentd::HttpParser parser(kLimits);
  while (!text.empty()) {
    std::string_view data = text.substr(0, piece);
    const std::size_t size = data.size();
    const auto state = parser.Feed(&data);
    text.remove_prefix(size - data.size());
    if (state != agentd::HttpParser::State::kNeedMore) break;
    if (!data.empty()) std::abort();
  }
  Outcome outcome{.state = parser.state(), .status = parser.status()};
  if (outcome.state == agentd::HttpParser::State::kDone) {
    const agentd::HttpRequest request = parser.TakeRequest();
    if (request.body.size() > kLimits.body_bytes || request.headers.size() > kLimits.headers) std::abort();
    outcome.body = request.body;
    outcome.path = request.path;
    outcome.left = text.size();
  }
  return outcome;
}

}  // namespace
}  // namespace kvshare

KVS_FUZZ_SEEDS(kvshare::Seeds)

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 1) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  if (kvshare::Parse(text, text.size() + 1) != kvshare::Parse(text, data[0] % 32 + 1)) std::abort();
  return 0;
}

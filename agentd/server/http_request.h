// HttpParser: one HTTP/1.x request out of bytes that anyone may have sent.
//
// Strict where leniency has cost others dearly: CRLF only, no folded headers, one Content-Length or "chunked" and never
// both, a bound on everything.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvshare::agentd {

struct HttpLimits {
  std::size_t head_bytes = 16 << 10;
  std::size_t headers = 100;
  std::size_t body_bytes = 64 << 10;  // no path takes one: read so that the connection can go on
};

struct HttpRequest {
  std::string method;
  std::string path;                                          // without the query
  std::string query;                                         // after the '?'
  std::vector<std::pair<std::string, std::string>> headers;  // names in lower case
  std::string body;
  bool keep_alive = false;
  bool http_1_1 = false;  // else 1.0

  // The first header of this name (in lower case); empty when there is none.
  std::string_view Header(std::string_view name) const;
};

class HttpParser {
 public:
  explicit HttpParser(const HttpLimits& limits) : limits_(limits) {}

  enum class State { kNeedMore, kDone, kRefused };
  // Takes bytes from the front of `data`, and no more than belong to this request.
  State Feed(std::string_view* data);

  State state() const;
  bool begun() const { return !head_.empty() || stage_ != Stage::kHead; }
  // True once, when the head is complete and the client waits for "100 Continue" before it sends the body.
  bool TakeContinue() { return std::exchange(wants_continue_, false); }
  HttpRequest TakeRequest() { return std::move(request_); }  // requires kDone

  // With kRefused: the status to answer with, and why.
  int status() const { return status_; }
  const std::string& reason() const { return reason_; }

 private:
  enum class Stage { kHead, kBody, kChunkSize, kChunkData, kChunkEnd, kTrailer, kDone, kRefused };

  void Refuse(int status, std::string reason);
  void FeedHead(std::string_view* data);
  void FeedBody(std::string_view* data);
  void FeedChunked(std::string_view* data);
  bool FeedLine(std::string_view* data, std::size_t max_bytes);  // into line_; true when it is whole
  void ParseHead();
  bool ParseRequestLine(std::string_view line);
  bool ParseHeader(std::string_view line);
  void DecideBody();

  HttpLimits limits_;
  Stage stage_ = Stage::kHead;
  std::string head_;           // while kHead
  std::string line_;           // a chunk's size, or a trailer
  std::size_t remaining_ = 0;  // of the body or of the chunk
  std::size_t trailer_bytes_ = 0;
  bool wants_continue_ = false;
  HttpRequest request_;
  int status_ = 0;
  std::string reason_;
};

}  // namespace kvshare::agentd

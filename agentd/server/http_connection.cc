#include "agentd/server/http_connection.h"

#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <utility>

namespace kvshare::agentd {
namespace {

constexpr std::size_t kReadBytes = 16 << 10;
constexpr int kReadsPerTurn = 16;  // so that one fast sender does not keep the others waiting

const char* StatusText(int status) {
  switch (status) {
    case 200: return "OK";
    case 400: return "Bad Request";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    case 408: return "Request Timeout";
    case 413: return "Content Too Large";
    case 415: return "Unsupported Media Type";
    case 429: return "Too Many Requests";
    case 431: return "Request Header Fields Too Large";
    case 500: return "Internal Server Error";
    case 501: return "Not Implemented";
    case 503: return "Service Unavailable";
    case 504: return "Gateway Timeout";
    case 505: return "HTTP Version Not Supported";
    default: return "Unknown";
  }
}

}  // namespace

HttpConnection::~HttpConnection() { close(fd_); }

HttpConnection::Outcome HttpConnection::Parse(std::string_view data) {
  const HttpParser::State state = parser_.Feed(&data);
  if (state == HttpParser::State::kRefused) return Outcome::kRefused;
  if (parser_.TakeContinue()) SetAnswer("HTTP/1.1 100 Continue\r\n\r\n", Then::kRead);
  unread_ = data;
  return state == HttpParser::State::kDone ? Outcome::kRequest : Outcome::kWaiting;
}

HttpConnection::Outcome HttpConnection::Read() {
  if (!unread_.empty() && !lingering_) {
    const Outcome outcome = Parse(std::exchange(unread_, ""));
    if (outcome != Outcome::kWaiting) return outcome;
  }
  std::array<char, kReadBytes> buffer;
  for (int turn = 0; turn < kReadsPerTurn; ++turn) {
    const ssize_t n = recv(fd_, buffer.data(), buffer.size(), MSG_DONTWAIT);
    if (n < 0) return errno == EAGAIN || errno == EINTR ? Outcome::kWaiting : Outcome::kGone;
    if (n == 0) return Outcome::kGone;
    if (lingering_) continue;
    const Outcome outcome = Parse({buffer.data(), static_cast<std::size_t>(n)});
    if (outcome != Outcome::kWaiting || writing()) return outcome;
  }
  return Outcome::kWaiting;
}

HttpRequest HttpConnection::TakeRequest() {
  HttpRequest request = parser_.TakeRequest();
  parser_ = HttpParser(limits_);
  return request;
}

void HttpConnection::SetAnswer(std::string answer, Then then) {
  answer_ += answer;
  then_ = then;
}

bool HttpConnection::Write() {
  while (writing()) {
    const ssize_t n = send(fd_, answer_.data(), answer_.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno == EAGAIN;
    answer_.erase(0, static_cast<std::size_t>(n));
  }
  if (then_ == Then::kLinger) {
    shutdown(fd_, SHUT_WR);
    lingering_ = true;
    unread_.clear();
  }
  return then_ != Then::kClose;
}

std::string HttpBytes(const HttpAnswer& answer, bool head_only, bool keep_alive) {
  std::string bytes = "HTTP/1.1 " + std::to_string(answer.status) + " " + StatusText(answer.status) + "\r\n";
  bytes += "Content-Type: " + answer.content_type + "\r\n";
  bytes += "Content-Length: " + std::to_string(answer.body.size()) + "\r\n";
  if (!keep_alive) bytes += "Connection: close\r\n";
  // What a browser should not guess about text that partly came from others.
  bytes += "X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n";
  for (const auto& [name, value] : answer.headers) bytes += name + ": " + value + "\r\n";
  bytes += "\r\n";
  if (!head_only) bytes += answer.body;
  return bytes;
}

}  // namespace kvshare::agentd

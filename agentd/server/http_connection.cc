#include "agentd/server/http_connection.h"

#include <poll.h>
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

std::string Hex(std::size_t value) {
  std::string text;
  do {
    text.insert(text.begin(), "0123456789abcdef"[value % 16]);
    value /= 16;
  } while (value > 0);
  return text;
}

}  // namespace

HttpConnection::~HttpConnection() { close(fd_); }

HttpConnection::Outcome HttpConnection::Parse(std::string_view data) {
  const HttpParser::State state = parser_.Feed(&data);
  if (parser_.TakeContinue()) TrySend("HTTP/1.1 100 Continue\r\n\r\n");
  if (state == HttpParser::State::kRefused) return Outcome::kRefused;
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
    if (outcome != Outcome::kWaiting) return outcome;
  }
  return Outcome::kWaiting;
}

HttpRequest HttpConnection::TakeRequest() {
  HttpRequest request = parser_.TakeRequest();
  parser_ = HttpParser(limits_);
  return request;
}

void HttpConnection::TrySend(std::string_view data) {
  // What the socket's buffer does not take at once is lost, and the connection with it; the caller closes.
  if (send(fd_, data.data(), data.size(), MSG_NOSIGNAL | MSG_DONTWAIT) < 0) return;
}

bool HttpConnection::SendAll(std::string_view data, std::chrono::milliseconds timeout) {
  while (!data.empty()) {
    const ssize_t n = send(fd_, data.data(), data.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) {
      data.remove_prefix(static_cast<std::size_t>(n));
      continue;
    }
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno != EAGAIN) return false;
    pollfd writable{fd_, POLLOUT, 0};
    if (poll(&writable, 1, static_cast<int>(timeout.count())) <= 0) return false;
    if ((writable.revents & (POLLERR | POLLHUP)) != 0) return false;
  }
  return true;
}

bool HttpConnection::PeerGone() const {
  pollfd peer{fd_, POLLRDHUP, 0};
  return poll(&peer, 1, 0) > 0 && (peer.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

void HttpConnection::StartLingering() {
  shutdown(fd_, SHUT_WR);
  lingering_ = true;
  unread_.clear();
}

std::string HttpHead(int status, std::string_view content_type, std::int64_t length, bool keep_alive,
                     const HttpReply::Headers& headers) {
  std::string head = "HTTP/1.1 " + std::to_string(status) + " " + StatusText(status) + "\r\n";
  head += "Content-Type: " + std::string(content_type) + "\r\n";
  if (length >= 0) head += "Content-Length: " + std::to_string(length) + "\r\n";
  if (!keep_alive) head += "Connection: close\r\n";
  // What a browser should not guess about text that partly came from others.
  head += "X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n";
  for (const auto& [name, value] : headers) head += name + ": " + value + "\r\n";
  return head + "\r\n";
}

void ConnectionReply::Send(int status, std::string_view content_type, std::string_view body, const Headers& headers) {
  if (begun_) return;
  begun_ = true;
  std::string answer = HttpHead(status, content_type, static_cast<std::int64_t>(body.size()), keep_alive_, headers);
  if (!head_only_) answer += body;
  ok_ = connection_->SendAll(answer, timeout_);
}

bool ConnectionReply::Begin(int status, std::string_view content_type, const Headers& headers) {
  if (begun_) return false;
  begun_ = true;
  streaming_ = true;
  Headers all = headers;
  if (chunked_) {
    all.emplace_back("Transfer-Encoding", "chunked");
  } else {
    keep_alive_ = false;
  }
  ok_ = connection_->SendAll(HttpHead(status, content_type, -1, keep_alive_, all), timeout_);
  return ok_;
}

bool ConnectionReply::Write(std::string_view data) {
  if (!ok_ || !streaming_) return false;
  if (data.empty() || head_only_) return true;
  if (!chunked_) return ok_ = connection_->SendAll(data, timeout_);
  ok_ = connection_->SendAll(Hex(data.size()) + "\r\n" + std::string(data) + "\r\n", timeout_);
  return ok_;
}

bool ConnectionReply::Finish() {
  if (ok_ && streaming_ && chunked_ && !head_only_) ok_ = connection_->SendAll("0\r\n\r\n", timeout_);
  return ok_ && keep_alive_;
}

}  // namespace kvshare::agentd

#include "agentd/server/http_request.h"

#include <algorithm>
#include <charconv>

namespace kvshare::agentd {
namespace {

constexpr std::string_view kEndOfHead = "\r\n\r\n";
constexpr std::size_t kMaxChunkLine = 256;  // a size in hex, and extensions that nobody uses

bool IsTokenChar(unsigned char c) {
  if (c >= '0' && c <= '9') return true;
  if ((c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z')) return true;
  return c != '\0' && std::string_view("!#$%&'*+-.^_`|~").find(static_cast<char>(c)) != std::string_view::npos;
}

bool IsToken(std::string_view text) { return !text.empty() && std::all_of(text.begin(), text.end(), IsTokenChar); }

std::string Lower(std::string_view text) {
  std::string lower(text);
  for (char& c : lower) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
  return lower;
}

std::string_view Trim(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t')) text.remove_suffix(1);
  return text;
}

// Digits alone: no sign, no space. False also when it does not fit.
bool ParseNumber(std::string_view text, int base, std::size_t* value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value, base);
  return !text.empty() && error == std::errc() && end == text.data() + text.size();
}

bool Lists(std::string_view header, std::string_view word) {
  while (!header.empty()) {
    const std::size_t comma = header.find(',');
    if (Lower(Trim(header.substr(0, comma))) == word) return true;
    header.remove_prefix(comma == header.npos ? header.size() : comma + 1);
  }
  return false;
}

}  // namespace

std::string_view HttpRequest::Header(std::string_view name) const {
  for (const auto& [known, value] : headers) {
    if (known == name) return value;
  }
  return {};
}

HttpParser::State HttpParser::state() const {
  if (stage_ == Stage::kDone) return State::kDone;
  return stage_ == Stage::kRefused ? State::kRefused : State::kNeedMore;
}

HttpParser::State HttpParser::Feed(std::string_view* data) {
  while (state() == State::kNeedMore) {
    const Stage before = stage_;
    if (stage_ == Stage::kHead) {
      FeedHead(data);
    } else if (stage_ == Stage::kBody) {
      FeedBody(data);
    } else {
      FeedChunked(data);
    }
    if (data->empty() && stage_ == before) break;
  }
  return state();
}

void HttpParser::Refuse(int status, std::string reason) {
  stage_ = Stage::kRefused;
  status_ = status;
  reason_ = std::move(reason);
}

void HttpParser::FeedHead(std::string_view* data) {
  // An empty line before a request is what some clients leave behind the one before.
  if (head_ == "\r" && data->starts_with('\n')) {
    head_.clear();
    data->remove_prefix(1);
  }
  while (head_.empty() && data->starts_with("\r\n")) data->remove_prefix(2);
  const std::size_t had = head_.size();
  const std::size_t room = limits_.head_bytes - std::min(limits_.head_bytes, had);
  const std::string_view taken = data->substr(0, room);
  head_ += taken;
  const std::size_t from = had < kEndOfHead.size() ? 0 : had - (kEndOfHead.size() - 1);
  const std::size_t end = head_.find(kEndOfHead, from);
  if (end == std::string::npos) {
    data->remove_prefix(taken.size());
    if (head_.size() >= limits_.head_bytes) Refuse(431, "the request's head is too large");
    return;
  }
  data->remove_prefix(end + kEndOfHead.size() - had);
  head_.resize(end);
  ParseHead();
}

void HttpParser::ParseHead() {
  std::string_view rest = head_;
  bool first = true;
  while (true) {
    const std::size_t end = rest.find("\r\n");
    const std::string_view line = rest.substr(0, end);
    if (!(first ? ParseRequestLine(line) : ParseHeader(line))) return;
    first = false;
    if (end == rest.npos) break;
    rest.remove_prefix(end + 2);
  }
  DecideBody();
}

bool HttpParser::ParseRequestLine(std::string_view line) {
  const std::size_t method_end = line.find(' ');
  const std::size_t target_end = line.rfind(' ');
  if (method_end == line.npos || target_end == method_end || !IsToken(line.substr(0, method_end))) {
    Refuse(400, "the request line is not METHOD PATH HTTP/1.1");
    return false;
  }
  const std::string_view version = line.substr(target_end + 1);
  if (version != "HTTP/1.1" && version != "HTTP/1.0") {
    const bool other = version.starts_with("HTTP/");
    Refuse(other ? 505 : 400, other ? "HTTP/1.1 is spoken here" : "the request line is not METHOD PATH HTTP/1.1");
    return false;
  }
  const std::string_view target = line.substr(method_end + 1, target_end - method_end - 1);
  const auto visible = [](unsigned char c) { return c > ' ' && c < 127; };
  if (!target.starts_with('/') || !std::all_of(target.begin(), target.end(), visible)) {
    Refuse(400, "the path must begin with / and hold no spaces");
    return false;
  }
  const std::size_t question = target.find('?');
  request_.method = line.substr(0, method_end);
  request_.path = target.substr(0, question);
  if (question != target.npos) request_.query = target.substr(question + 1);
  request_.http_1_1 = version == "HTTP/1.1";
  return true;
}

bool HttpParser::ParseHeader(std::string_view line) {
  const std::size_t colon = line.find(':');
  // Also refuses folded lines, and a space before the colon.
  if (colon == line.npos || !IsToken(line.substr(0, colon))) {
    Refuse(400, "a header is not NAME: VALUE");
    return false;
  }
  const std::string_view value = Trim(line.substr(colon + 1));
  const auto printable = [](unsigned char c) { return (c >= ' ' && c != 127) || c == '\t'; };
  if (!std::all_of(value.begin(), value.end(), printable)) {
    Refuse(400, "a header holds a control character");
    return false;
  }
  if (request_.headers.size() >= limits_.headers) {
    Refuse(431, "there are too many headers");
    return false;
  }
  request_.headers.emplace_back(Lower(line.substr(0, colon)), value);
  return true;
}

void HttpParser::DecideBody() {
  int hosts = 0, lengths = 0, encodings = 0;
  for (const auto& [name, value] : request_.headers) {
    hosts += name == "host";
    lengths += name == "content-length";
    encodings += name == "transfer-encoding";
  }
  if (hosts > 1 || (request_.http_1_1 && hosts == 0)) return Refuse(400, "one Host header is needed");
  if (lengths > 1 || encodings > 1 || (lengths == 1 && encodings == 1)) {
    return Refuse(400, "the body's length is given twice");
  }
  const std::string_view connection = request_.Header("connection");
  request_.keep_alive = request_.http_1_1 && !Lists(connection, "close");
  wants_continue_ = request_.http_1_1 && Lower(request_.Header("expect")) == "100-continue";
  if (encodings == 1) {
    if (!request_.http_1_1 || Lower(request_.Header("transfer-encoding")) != "chunked") {
      return Refuse(501, "of transfer encodings only chunked is known");
    }
    stage_ = Stage::kChunkSize;
    return;
  }
  if (lengths == 1 && !ParseNumber(request_.Header("content-length"), 10, &remaining_)) {
    return Refuse(400, "Content-Length is not a number");
  }
  if (remaining_ > limits_.body_bytes) return Refuse(413, "the body is too large");
  stage_ = remaining_ > 0 ? Stage::kBody : Stage::kDone;
}

void HttpParser::FeedBody(std::string_view* data) {
  const std::string_view taken = data->substr(0, remaining_);
  request_.body += taken;
  data->remove_prefix(taken.size());
  remaining_ -= taken.size();
  if (remaining_ == 0) stage_ = Stage::kDone;
}

bool HttpParser::FeedLine(std::string_view* data, std::size_t max_bytes) {
  while (!data->empty()) {
    const char c = data->front();
    data->remove_prefix(1);
    line_ += c;
    if (line_.size() > max_bytes) {
      Refuse(400, "a chunk's line is too long");
      return false;
    }
    if (line_.ends_with("\r\n")) {
      line_.resize(line_.size() - 2);
      return true;
    }
    if (c == '\n') {
      Refuse(400, "a chunk's line does not end with CRLF");
      return false;
    }
  }
  return false;
}

void HttpParser::FeedChunked(std::string_view* data) {
  if (stage_ == Stage::kChunkData) {
    const std::string_view taken = data->substr(0, remaining_);
    request_.body += taken;
    data->remove_prefix(taken.size());
    remaining_ -= taken.size();
    if (remaining_ == 0) stage_ = Stage::kChunkEnd;
    return;
  }
  if (!FeedLine(data, stage_ == Stage::kTrailer ? limits_.head_bytes : kMaxChunkLine)) return;
  const std::string line = std::exchange(line_, "");
  if (stage_ == Stage::kChunkEnd) {
    if (!line.empty()) return Refuse(400, "a chunk is longer than it says");
    stage_ = Stage::kChunkSize;
  } else if (stage_ == Stage::kTrailer) {
    trailer_bytes_ += line.size();
    if (trailer_bytes_ > limits_.head_bytes) return Refuse(431, "the trailers are too large");
    if (line.empty()) stage_ = Stage::kDone;
  } else {
    const std::string_view size = std::string_view(line).substr(0, line.find(';'));
    if (!ParseNumber(Trim(size), 16, &remaining_)) return Refuse(400, "a chunk's size is not a hex number");
    if (remaining_ > limits_.body_bytes - request_.body.size()) return Refuse(413, "the body is too large");
    stage_ = remaining_ > 0 ? Stage::kChunkData : Stage::kTrailer;
  }
}

}  // namespace kvshare::agentd

#include "runtime/text_stream.h"

#include <algorithm>

#include "runtime/utf8.h"

namespace kvshare::runtime {

TextStream::TextStream(const Tokenizer* tokenizer, std::vector<std::string> stop)
    : tokenizer_(tokenizer), stop_(std::move(stop)) {
  std::erase_if(stop_, [](const std::string& s) { return s.empty(); });
}

bool TextStream::Push(TokenId id) {
  if (stopped_) return true;
  tail_ += tokenizer_->TokenBytes(id);
  std::string_view rest = tail_;
  while (!rest.empty()) {
    const Utf8Step step = DecodeUtf8(rest);
    if (step.truncated) break;
    pending_ += step.valid ? rest.substr(0, step.length) : kReplacementCharacter;
    rest.remove_prefix(step.length);
  }
  tail_.erase(0, tail_.size() - rest.size());

  // What was held back is short, so a stop string that is complete now lies within `pending_`.
  std::size_t first_end = std::string::npos, begin = 0;
  for (const std::string& stop : stop_) {
    const std::size_t at = pending_.find(stop);
    if (at == std::string::npos) continue;
    const std::size_t end = at + stop.size();
    if (first_end == std::string::npos || end < first_end || (end == first_end && at < begin)) {
      first_end = end;
      begin = at;
    }
  }
  if (first_end != std::string::npos) {
    Release(begin);
    pending_.clear();
    tail_.clear();
    stopped_ = true;
    return true;
  }

  std::size_t held = 0;
  for (const std::string& stop : stop_) {
    for (std::size_t n = std::min(stop.size() - 1, pending_.size()); n > held; --n) {
      if (std::string_view(pending_).ends_with(std::string_view(stop).substr(0, n))) held = n;
    }
  }
  // A stop string that is itself not UTF-8 may begin or end within a character; characters are released whole.
  std::size_t release = pending_.size() - held;
  while (release > 0 && release < pending_.size() && (static_cast<unsigned char>(pending_[release]) & 0xC0) == 0x80) {
    --release;
  }
  Release(release);
  return false;
}

void TextStream::Finish() {
  if (stopped_) return;
  pending_ += RepairUtf8(tail_);
  tail_.clear();
  Release(pending_.size());
}

std::string TextStream::TakeDelta() {
  std::string delta = text_.substr(taken_);
  taken_ = text_.size();
  return delta;
}

void TextStream::Release(std::size_t bytes) {
  text_.append(pending_, 0, bytes);
  pending_.erase(0, bytes);
}

}  // namespace kvshare::runtime

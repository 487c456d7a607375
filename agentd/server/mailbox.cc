#include "agentd/server/mailbox.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <iterator>
#include <utility>

namespace kvshare::agentd {

Mailbox::Mailbox() : wake_fd_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {}

Mailbox::~Mailbox() {
  if (wake_fd_ >= 0) ::close(wake_fd_);
}

void Mailbox::Wake() {
  const std::uint64_t one = 1;
  // Fails only when the counter is full, and then the thread is awake anyway.
  [[maybe_unused]] const ssize_t written = ::write(wake_fd_, &one, sizeof one);
}

void Mailbox::PostReady(std::shared_ptr<StreamSink> sink) {
  bool first = false;
  {
    const std::lock_guard lock(mu_);
    first = contents_.ready.empty() && contents_.answers.empty();
    contents_.ready.push_back(std::move(sink));
  }
  if (first) Wake();
}

void Mailbox::PostAnswer(Answer answer) {
  {
    const std::lock_guard lock(mu_);
    contents_.answers.push_back(std::move(answer));
  }
  Wake();
}

void Mailbox::PostSubmitted(Submitted submitted) {
  {
    const std::lock_guard lock(mu_);
    contents_.submitted.push_back(std::move(submitted));
  }
  Wake();
}

Mailbox::Contents Mailbox::TakeAll() {
  std::uint64_t ignored = 0;
  [[maybe_unused]] const ssize_t got = ::read(wake_fd_, &ignored, sizeof ignored);
  const std::lock_guard lock(mu_);
  return std::exchange(contents_, Contents{});
}

void StreamSink::Report(std::unique_lock<std::mutex> lock) {
  if (reported_ || abandoned_) return;
  reported_ = true;
  lock.unlock();
  mailbox_->PostReady(shared_from_this());
}

void StreamSink::OnChunk(TokenChunk chunk) {
  std::unique_lock lock(mu_);
  if (abandoned_) return;
  if (!chunk_.has_value()) {
    chunk_ = std::move(chunk);
  } else {
    chunk_->ids.insert(chunk_->ids.end(), chunk.ids.begin(), chunk.ids.end());
    chunk_->text += chunk.text;
  }
  Report(std::move(lock));
}

void StreamSink::OnDone(GenerateReply reply) {
  std::unique_lock lock(mu_);
  if (abandoned_) return;
  end_ = std::move(reply);
  Report(std::move(lock));
}

void StreamSink::OnError(Status status) {
  std::unique_lock lock(mu_);
  if (abandoned_) return;
  end_ = std::move(status);
  Report(std::move(lock));
}

StreamSink::Taken StreamSink::Take(bool want_chunk, bool want_last_chunk) {
  const std::lock_guard lock(mu_);
  reported_ = false;
  Taken taken;
  const bool failed = end_.has_value() && std::holds_alternative<Status>(*end_);
  if (failed) chunk_.reset();
  if (want_chunk || (want_last_chunk && end_.has_value())) taken.chunk = std::exchange(chunk_, std::nullopt);
  if (!chunk_.has_value()) taken.end = std::exchange(end_, std::nullopt);
  return taken;
}

void StreamSink::Abandon() {
  const std::lock_guard lock(mu_);
  abandoned_ = true;
  chunk_.reset();
  end_.reset();
}

}  // namespace kvshare::agentd

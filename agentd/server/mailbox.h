// What the other threads have for the server's io thread: outcomes of generations, and answers of the worker.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "agentd/service.h"
#include "libkvshare/codec/codec.h"

namespace kvshare::agentd {

class StreamSink;

// A lease that an answer gives away: the connection's from then on.
struct GivenLease {
  std::uint64_t id = 0;
  std::chrono::milliseconds ttl{0};
};

// An encoded answer and whom it is for.
struct Answer {
  std::string peer;  // ZeroMQ's name of the connection
  codec::Frame frame;
  std::optional<GivenLease> lease;
};

// What the service said to a generation that was submitted away from the io thread.
struct Submitted {
  std::shared_ptr<StreamSink> sink;
  Result<std::uint64_t> request_id;
};

// Thread-safe. Outlives the server where an engine still holds a sink.
class Mailbox {
 public:
  Mailbox();
  ~Mailbox();
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;

  bool ok() const { return wake_fd_ >= 0; }
  int wake_fd() const { return wake_fd_; }  // readable while something may be here

  void PostReady(std::shared_ptr<StreamSink> sink);
  void PostAnswer(Answer answer);
  void PostSubmitted(Submitted submitted);
  void Wake();

  struct Contents {
    std::vector<std::shared_ptr<StreamSink>> ready;
    std::vector<Answer> answers;
    std::vector<Submitted> submitted;
  };
  Contents TakeAll();  // the io thread

 private:
  const int wake_fd_;
  std::mutex mu_;
  Contents contents_;
};

// One generation's outcome on its way from the engine to a client. Chunks that cannot be sent yet are joined into one,
// so that it holds no more than the reply itself, and reports itself to the mailbox once until it is read.
class StreamSink final : public GenerateSink, public std::enable_shared_from_this<StreamSink> {
 public:
  using End = std::variant<GenerateReply, Status>;

  StreamSink(std::shared_ptr<Mailbox> mailbox, std::string peer, std::uint64_t correlation)
      : mailbox_(std::move(mailbox)), peer_(std::move(peer)), correlation_(correlation) {}

  // Engine's thread.
  void OnChunk(TokenChunk chunk) override;
  void OnDone(GenerateReply reply) override;
  void OnError(Status status) override;

  // Io thread.
  struct Taken {
    std::optional<TokenChunk> chunk;  // what has come since the last call
    std::optional<End> end;           // set when nothing is left before it
  };
  // Takes the joined chunk only with `want_chunk`, or `want_last_chunk` when the end is known; an error comes at once,
  // whatever waits before it.
  Taken Take(bool want_chunk, bool want_last_chunk);
  void Abandon();  // nobody reads any more

  const std::string& peer() const { return peer_; }
  std::uint64_t correlation() const { return correlation_; }

 private:
  void Report(std::unique_lock<std::mutex> lock);

  const std::shared_ptr<Mailbox> mailbox_;
  const std::string peer_;
  const std::uint64_t correlation_;
  std::mutex mu_;
  bool reported_ = false;
  bool abandoned_ = false;
  std::optional<TokenChunk> chunk_;
  std::optional<End> end_;
};

}  // namespace kvshare::agentd

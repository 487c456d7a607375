#include "agentd/server/unary.h"

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <variant>

namespace kvshare::agentd {
namespace {

constexpr std::size_t kMaxWaiting = 256;

template <typename T>
codec::Reply AsReply(Result<T> result) {
  if (!result.ok()) return codec::Reply(result.status());
  return codec::Reply(*std::move(result));
}

struct Asker {
  Service& service;

  codec::Reply operator()(const codec::Hello&) const {
    return codec::HelloAck{.info = service.Info(), .max_frame_bytes = wire::kMaxFrameBytes};
  }
  codec::Reply operator()(const codec::Ping&) const { return codec::Pong{.info = service.Info()}; }
  codec::Reply operator()(const codec::Tokenize& tokenize) const {
    Result<std::vector<TokenId>> ids = service.Tokenize(tokenize.text);
    if (!ids.ok()) return ids.status();
    return codec::Tokens{.ids = *std::move(ids)};
  }
  codec::Reply operator()(const codec::Detokenize& detokenize) const {
    Result<std::string> text = service.Detokenize(detokenize.ids);
    if (!text.ok()) return text.status();
    return codec::Text{.text = *std::move(text)};
  }
  codec::Reply operator()(const RenderRequest& render) const { return AsReply(service.Render(render)); }
  codec::Reply operator()(const ExplainRequest& explain) const { return AsReply(service.Explain(explain)); }
  codec::Reply operator()(const codec::GetStats&) const { return service.GetStats(); }
  codec::Reply operator()(const codec::Generate&) const { return Internal("a generation is not a unary request"); }
  codec::Reply operator()(const codec::Cancel&) const { return Internal("a cancellation has no answer"); }
  codec::Reply operator()(const codec::Credit&) const { return Internal("credit has no answer"); }
};

}  // namespace

codec::Frame AnswerUnary(Service& service, std::uint64_t correlation, const codec::Request& request) {
  try {
    const codec::Reply reply = std::visit(Asker{service}, request);
    Result<codec::Frame> frame = codec::EncodeReply(correlation, reply);
    return frame.ok() ? *std::move(frame) : codec::EncodeError(correlation, frame.status());
  } catch (const std::exception& error) {
    return codec::EncodeError(correlation, Internal(std::string("the request failed: ") + error.what()));
  }
}

struct UnaryWorker::State {
  struct Job {
    std::string peer;
    std::uint64_t correlation = 0;
    codec::Request request;
  };

  Service* const service;
  const std::shared_ptr<Mailbox> mailbox;
  mutable std::mutex mu;
  std::condition_variable changed;
  bool stopping = false;
  bool running = false;
  std::deque<Job> jobs;
  std::thread thread;

  void Run() {
    std::unique_lock lock(mu);
    while (true) {
      changed.wait(lock, [this] { return stopping || !jobs.empty(); });
      if (stopping) return;
      Job job = std::move(jobs.front());
      jobs.pop_front();
      running = true;
      lock.unlock();
      mailbox->PostAnswer({std::move(job.peer), AnswerUnary(*service, job.correlation, job.request)});
      lock.lock();
      running = false;
      // A draining io thread waits for idle(), which the answer's own wake-up came too early for.
      mailbox->Wake();
    }
  }
};

UnaryWorker::UnaryWorker(Service* service, std::shared_ptr<Mailbox> mailbox)
    : state_(new State{.service = service, .mailbox = std::move(mailbox)}) {
  state_->thread = std::thread([this] { state_->Run(); });
}

UnaryWorker::~UnaryWorker() {
  {
    const std::lock_guard lock(state_->mu);
    state_->stopping = true;
  }
  state_->changed.notify_all();
  state_->thread.join();
}

bool UnaryWorker::Submit(std::string peer, std::uint64_t correlation, codec::Request request) {
  {
    const std::lock_guard lock(state_->mu);
    if (state_->jobs.size() >= kMaxWaiting) return false;
    state_->jobs.push_back({std::move(peer), correlation, std::move(request)});
  }
  state_->changed.notify_all();
  return true;
}

bool UnaryWorker::idle() const {
  const std::lock_guard lock(state_->mu);
  return state_->jobs.empty() && !state_->running;
}

}  // namespace kvshare::agentd

#include "agentd/server/submitter.h"

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

namespace kvshare::agentd {

Result<std::uint64_t> SubmitTo(Service& service, const GenerateRequest& request,
                               const std::shared_ptr<StreamSink>& sink) {
  try {
    return service.Generate(request, sink);
  } catch (const std::exception& error) {
    return Internal(std::string("the request failed: ") + error.what());
  }
}

struct Submitter::State {
  struct Job {
    std::shared_ptr<StreamSink> sink;
    GenerateRequest request;
    std::size_t bytes = 0;
  };

  Service* const service;
  const std::shared_ptr<Mailbox> mailbox;
  std::mutex mu;
  std::condition_variable changed;
  bool stopping = false;
  std::size_t bytes = 0;  // of jobs
  std::deque<Job> jobs;
  std::thread thread;

  void Run() {
    std::unique_lock lock(mu);
    while (true) {
      changed.wait(lock, [this] { return stopping || !jobs.empty(); });
      if (stopping) return;
      Job job = std::move(jobs.front());
      jobs.pop_front();
      lock.unlock();
      Result<std::uint64_t> request_id = SubmitTo(*service, job.request, job.sink);
      mailbox->PostSubmitted({std::move(job.sink), std::move(request_id)});
      job.request = {};
      lock.lock();
      bytes -= job.bytes;
    }
  }
};

Submitter::Submitter(Service* service, std::shared_ptr<Mailbox> mailbox)
    : state_(new State{.service = service, .mailbox = std::move(mailbox)}) {
  state_->thread = std::thread([this] { state_->Run(); });
}

Submitter::~Submitter() {
  {
    const std::lock_guard lock(state_->mu);
    state_->stopping = true;
  }
  state_->changed.notify_all();
  state_->thread.join();
}

bool Submitter::Submit(std::shared_ptr<StreamSink> sink, GenerateRequest request, std::size_t bytes) {
  {
    const std::lock_guard lock(state_->mu);
    if (state_->bytes > 0 && state_->bytes + bytes > kMaxBytes) return false;
    state_->bytes += bytes;
    state_->jobs.push_back({std::move(sink), std::move(request), bytes});
  }
  state_->changed.notify_one();
  return true;
}

}  // namespace kvshare::agentd

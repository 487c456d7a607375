// Submits generations whose prompts take a while to render and tokenise, away from the io thread.
#pragma once

#include <cstddef>
#include <memory>

#include "agentd/server/mailbox.h"
#include "agentd/service.h"

namespace kvshare::agentd {

// Service::Generate; what throws, such as a prompt there is no memory for, is Internal and ends that request alone.
Result<std::uint64_t> SubmitTo(Service& service, const GenerateRequest& request,
                               const std::shared_ptr<StreamSink>& sink);

// One at a time, in the order they come, so that prompts take no more than one core from the engine. Thread-safe.
class Submitter {
 public:
  Submitter(Service* service, std::shared_ptr<Mailbox> mailbox);
  ~Submitter();  // finishes the one it is at, drops the others
  Submitter(const Submitter&) = delete;
  Submitter& operator=(const Submitter&) = delete;

  // `bytes`: of the request's frame. What the service says comes by Mailbox::PostSubmitted. False when more than
  // kMaxBytes would wait, and something does.
  bool Submit(std::shared_ptr<StreamSink> sink, GenerateRequest request, std::size_t bytes);

  static constexpr std::size_t kMaxBytes = std::size_t{64} << 20;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvshare::agentd

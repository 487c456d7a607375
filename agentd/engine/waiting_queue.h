// WaitingQueue: requests in order of arrival, and the order in which they are tried: what reuses most goes first, and
// nobody is passed for ever.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "agentd/engine/sequence.h"

namespace kvshare::agentd {

// A request that was passed this often goes before all that came later.
inline constexpr int kMaxOvertakes = 8;

// How many requests, the oldest first, are considered at a time: planning costs a digest per 64 tokens.
inline constexpr std::size_t kAdmissionWindow = 32;

// What a waiting request would find, were it admitted now.
struct Prospect {
  std::int64_t reusable = 0;  // tokens of its prompt
  std::int64_t prompt = 0;    // tokens; > 0
  bool held = false;          // it waits for what another one is computing or loading: not to be admitted now
};

class WaitingQueue {
 public:
  void Push(EngineRequest request) { queue_.push_back({std::move(request), 0}); }
  bool empty() const { return queue_.empty(); }
  std::size_t size() const { return queue_.size(); }
  std::size_t window() const { return queue_.size() < kAdmissionWindow ? queue_.size() : kAdmissionWindow; }
  const EngineRequest& at(std::size_t i) const { return queue_[i].request; }
  // It must have its turn before anybody who came later.
  bool IsDue(std::size_t i) const { return queue_[i].overtaken >= kMaxOvertakes; }

  // The window's requests that are not held, as they are to be tried: those that are due in order of arrival, then by
  // the share of the prompt that is reused, the oldest first among equals.
  std::vector<std::size_t> Order(std::span<const Prospect> prospects) const;

  // Takes request `i` out. Those before it that are not held have been overtaken.
  EngineRequest Take(std::size_t i, std::span<const Prospect> prospects);

  // Takes out all that `end` says true to.
  void EraseIf(const std::function<bool(const EngineRequest&)>& end);
  void ForEach(const std::function<void(const EngineRequest&)>& visit) const;

 private:
  struct Waiting {
    EngineRequest request;
    int overtaken = 0;
  };
  std::deque<Waiting> queue_;
};

}  // namespace kvshare::agentd

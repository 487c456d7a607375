// FaultLimiter: how often one client is told that its frames are malformed. A client that is wrong hears of it; one
// that floods is not worth the work.
#pragma once

#include <chrono>
#include <cstddef>
#include <map>
#include <string>

namespace kvshare::agentd {

// One thread.
class FaultLimiter {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr int kAnswersMax = 32;  // in a period, to one client
  static constexpr std::chrono::milliseconds kPeriod{1000};

  // Whether this fault of `peer`'s is to be answered.
  bool MayAnswer(const std::string& peer, Clock::time_point now) {
    if (now >= until_) {
      counts_.clear();
      until_ = now + kPeriod;
    }
    const auto found = counts_.find(peer);
    if (found != counts_.end()) return ++found->second <= kAnswersMax;
    if (counts_.size() >= kPeersMax) return false;
    counts_.emplace(peer, 1);
    return true;
  }

 private:
  static constexpr std::size_t kPeersMax = 1024;  // that are told apart
  std::map<std::string, int> counts_;
  Clock::time_point until_;
};

}  // namespace kvshare::agentd

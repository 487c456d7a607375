// What malformed frames may cost. FaultLimiter: how often one client is told of its own; one that is wrong hears of it,
// one that floods is not worth the work. FloodBrake: how many are read at all.
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

// One thread. When many malformed frames come at once, nothing is read for a moment: the flood backs up into its
// sender, which then waits instead of running against the engine for the processor. Others lose that moment and no
// more, since ZeroMQ takes one frame of each connection in turn.
class FloodBrake {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr int kFramesMax = 16;  // in a window
  static constexpr std::chrono::milliseconds kWindow{2};

  void OnMalformed(Clock::time_point now) {
    if (now >= until_) {
      until_ = now + kWindow;
      frames_ = 0;
    }
    holds_ = ++frames_ >= kFramesMax;
  }
  // How long nothing should be read from now on: more than zero, or not at all.
  std::chrono::nanoseconds HoldsFor(Clock::time_point now) {
    if (holds_ && now >= until_) holds_ = false;
    return holds_ ? until_ - now : std::chrono::nanoseconds(0);
  }
  bool holds() const { return holds_; }  // since when it was last asked for how long

 private:
  Clock::time_point until_;
  int frames_ = 0;
  bool holds_ = false;
};

}  // namespace kvshare::agentd

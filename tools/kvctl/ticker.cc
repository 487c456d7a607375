#include "tools/kvctl/ticker.h"

#include <poll.h>

#include <algorithm>
#include <limits>

#include "tools/kvctl/exit_code.h"

namespace kvshare::kvctl {

Ticker::Ticker(double interval_s, std::int64_t count)
    : interval_(std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(interval_s))),
      left_(count == 0 ? std::numeric_limits<std::int64_t>::max() : count),
      last_(Clock::now()),
      next_(last_) {}

bool Ticker::Wait() {
  if (left_ == 0) return false;
  --left_;
  next_ = std::max(next_ + interval_, Clock::now());  // no catching up after a stall
  while (!Interrupted()) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(next_ - Clock::now()).count();
    if (left <= 0) break;
    // Ended early by a signal.
    poll(nullptr, 0, static_cast<int>(std::min<std::int64_t>(left + 1, 1000)));
  }
  interrupted_ = Interrupted();
  const Clock::time_point now = Clock::now();
  elapsed_s_ = std::max(std::chrono::duration<double>(now - last_).count(), 1e-9);
  last_ = now;
  return !interrupted_;
}

}  // namespace kvshare::kvctl

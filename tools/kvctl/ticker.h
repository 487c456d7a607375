// Ticker: again every so often, until a count is reached or Ctrl-C.
#pragma once

#include <chrono>
#include <cstdint>

namespace kvshare::kvctl {

class Ticker {
 public:
  // `count` 0: no end.
  Ticker(double interval_s, std::int64_t count);

  // Waits for the next time; false after the last one, and at once when interrupted.
  bool Wait();
  double elapsed_s() const { return elapsed_s_; }  // between the last two times
  bool interrupted() const { return interrupted_; }

 private:
  using Clock = std::chrono::steady_clock;
  const Clock::duration interval_;
  std::int64_t left_;
  Clock::time_point last_;
  Clock::time_point next_;
  double elapsed_s_ = 0;
  bool interrupted_ = false;
};

}  // namespace kvshare::kvctl

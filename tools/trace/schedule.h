// When each request of a trace is sent: hand-offs, recorded times, and how many may be in flight.
//
// Pure logic on a clock that the caller owns, so that a test can step through hours in no time.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "tools/trace/trace.h"

namespace kvshare::trace {

struct ScheduleOptions {
  bool as_fast_as_possible = false;  // no timestamps, no delays: order and hand-offs only
  bool open_loop = false;            // recorded times only: no request waits for another
  double speedup = 1;                // recorded times are divided by this
  // No recorded delay, and no stretch of the clock in which nothing is sent, counts as longer than this.
  std::optional<double> max_delay_ms;
  // As fast as possible, or with an arrival clock: requests in flight. With a session clock: sessions at once.
  int slots = 1;
};

class Schedule {
 public:
  // Refers to the first `count` requests of `trace`, which must outlive it.
  Schedule(const Trace* trace, std::size_t count, const ScheduleOptions& options);

  struct Step {
    enum class Kind {
      kStart,  // send `request` now
      kWait,   // nothing before `until_ms`, or before the next Complete() when it is not given
      kDone,   // everything was sent
    };
    Kind kind = Kind::kDone;
    std::size_t request = 0;
    std::optional<double> until_ms;
  };

  // What to do at `now_ms` (since the replay began, never decreasing). A started request counts as in flight.
  Step Next(double now_ms);
  void Complete(std::size_t request, double now_ms);

 private:
  struct Session {
    std::vector<std::size_t> requests;
    std::optional<double> opened_ms;
    std::size_t completed = 0;
  };

  // The earliest time at which a request may start; nullopt while something it waits for is unfinished.
  std::optional<double> ReadyMs(std::size_t request) const;
  void OpenSession(double now_ms);
  // Fills clock_ms_ for the given requests: time since the first of them, long gaps shortened.
  void ReadClock(std::vector<std::size_t> requests);

  const Trace* trace_;
  ScheduleOptions options_;
  bool by_session_;
  std::vector<std::optional<double>> completed_ms_;
  std::vector<bool> started_;
  std::vector<std::size_t> session_of_;
  std::vector<std::size_t> previous_;  // in the same session; own index when first
  std::vector<Session> sessions_;
  std::size_t first_pending_ = 0;
  std::size_t next_session_ = 0;
  int open_sessions_ = 0;
  int in_flight_ = 0;
  std::vector<std::optional<double>> clock_ms_;  // timestamps since their clock began, as replayed
};

}  // namespace kvshare::trace

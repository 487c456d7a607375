#include "tools/trace/schedule.h"

#include <algorithm>
#include <string>
#include <unordered_map>

#include "libkvshare/core/check.h"

namespace kvshare::trace {

Schedule::Schedule(const Trace* trace, std::size_t count, const ScheduleOptions& options)
    : trace_(trace),
      options_(options),
      by_session_(!options.as_fast_as_possible && trace->header.time_base != TimeBase::kArrival),
      completed_ms_(count),
      started_(count),
      session_of_(count),
      previous_(count),
      clock_ms_(count) {
  KVS_CHECK(count <= trace->requests.size() && options.slots >= 1 && options.speedup > 0);
  std::unordered_map<std::string, std::size_t> index;
  std::vector<std::size_t> all;
  for (std::size_t r = 0; r < count; ++r) {
    const auto [it, added] = index.try_emplace(trace->requests[r].session, sessions_.size());
    if (added) sessions_.emplace_back();
    Session& session = sessions_[it->second];
    session_of_[r] = it->second;
    previous_[r] = session.requests.empty() ? r : session.requests.back();
    session.requests.push_back(r);
    all.push_back(r);
  }
  if (!by_session_) {
    ReadClock(std::move(all));
  } else {
    for (const Session& session : sessions_) ReadClock(session.requests);
  }
}

void Schedule::ReadClock(std::vector<std::size_t> requests) {
  const auto stamp = [&](std::size_t r) { return trace_->requests[r].timestamp_ms; };
  std::erase_if(requests, [&](std::size_t r) { return !stamp(r); });
  std::stable_sort(requests.begin(), requests.end(),
                   [&](std::size_t a, std::size_t b) { return *stamp(a) < *stamp(b); });
  double at = 0;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    if (i > 0) at += std::min(*stamp(requests[i]) - *stamp(requests[i - 1]), options_.max_delay_ms.value_or(1e18));
    clock_ms_[requests[i]] = at / options_.speedup;
  }
}

std::optional<double> Schedule::ReadyMs(std::size_t r) const {
  const TraceRequest& request = trace_->requests[r];
  const Session& session = sessions_[session_of_[r]];
  if (by_session_ && !session.opened_ms) return std::nullopt;
  const double opened = by_session_ ? *session.opened_ms : 0;
  const bool waits =
      !request.wait_for.empty() && !(options_.open_loop && clock_ms_[r] && !options_.as_fast_as_possible);
  double after = 0;
  if (waits) {
    for (std::size_t w : request.wait_for) {
      if (!completed_ms_[w]) return std::nullopt;
      after = std::max(after, *completed_ms_[w]);
    }
  }
  if (options_.as_fast_as_possible) return after;
  if (waits) return after + std::min(request.delay_ms, options_.max_delay_ms.value_or(1e18)) / options_.speedup;
  if (clock_ms_[r]) return opened + *clock_ms_[r];
  if (!by_session_ || previous_[r] == r) return opened;
  return completed_ms_[previous_[r]];  // no clock: one after the other
}

void Schedule::OpenSession(double now_ms) {
  sessions_[next_session_++].opened_ms = now_ms;
  ++open_sessions_;
}

Schedule::Step Schedule::Next(double now_ms) {
  while (by_session_ && open_sessions_ < options_.slots && next_session_ < sessions_.size()) OpenSession(now_ms);
  while (first_pending_ < started_.size() && started_[first_pending_]) ++first_pending_;
  if (first_pending_ == started_.size()) return {};
  Step step{.kind = Step::Kind::kWait};
  if (!by_session_ && in_flight_ >= options_.slots) return step;
  for (std::size_t r = first_pending_; r < started_.size(); ++r) {
    if (started_[r]) continue;
    const std::optional<double> ready = ReadyMs(r);
    if (!ready) continue;
    if (*ready <= now_ms) {
      started_[r] = true;
      ++in_flight_;
      return {.kind = Step::Kind::kStart, .request = r};
    }
    if (!step.until_ms || *ready < *step.until_ms) step.until_ms = ready;
  }
  // All open sessions wait for one that is not open: only another slot can help.
  if (!step.until_ms && in_flight_ == 0 && next_session_ < sessions_.size()) {
    OpenSession(now_ms);
    return Next(now_ms);
  }
  return step;
}

void Schedule::Complete(std::size_t request, double now_ms) {
  KVS_CHECK(started_[request] && !completed_ms_[request]);
  completed_ms_[request] = now_ms;
  --in_flight_;
  Session& session = sessions_[session_of_[request]];
  if (++session.completed == session.requests.size() && by_session_) --open_sessions_;
}

}  // namespace kvshare::trace

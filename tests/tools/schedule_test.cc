// The replay's clock, stepped by hand: order, hand-offs, delays, slots.
#include "tools/trace/schedule.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace kvshare::trace {
namespace {

using Kind = Schedule::Step::Kind;

struct Row {
  std::string session;
  std::optional<double> timestamp_ms;
  std::vector<std::size_t> wait_for;
  double delay_ms = 0;
};

Trace MakeTrace(TimeBase base, const std::vector<Row>& rows) {
  Trace trace;
  trace.header.time_base = base;
  for (const Row& row : rows) {
    TraceRequest request;
    request.session = row.session;
    request.timestamp_ms = row.timestamp_ms;
    request.wait_for = row.wait_for;
    request.delay_ms = row.delay_ms;
    trace.requests.push_back(request);
  }
  return trace;
}

void ExpectStart(Schedule& schedule, double now, std::size_t request) {
  const Schedule::Step step = schedule.Next(now);
  ASSERT_EQ(step.kind, Kind::kStart) << "at " << now;
  EXPECT_EQ(step.request, request) << "at " << now;
}

void ExpectWait(Schedule& schedule, double now, std::optional<double> until) {
  const Schedule::Step step = schedule.Next(now);
  ASSERT_EQ(step.kind, Kind::kWait) << "at " << now;
  EXPECT_EQ(step.until_ms, until) << "at " << now;
}

TEST(ScheduleTest, OneSlotAsFastAsPossibleKeepsTheFilesOrder) {
  const Trace trace = MakeTrace(TimeBase::kArrival, {{"a", 900.0, {}}, {"b", 5.0, {}}, {"a", 7.0, {0}, 1000}});
  Schedule schedule(&trace, 3, {.as_fast_as_possible = true, .slots = 1});
  for (std::size_t r = 0; r < 3; ++r) {
    ExpectStart(schedule, static_cast<double>(r), r);
    if (r < 2) ExpectWait(schedule, static_cast<double>(r), std::nullopt);
    schedule.Complete(r, static_cast<double>(r));
  }
  EXPECT_EQ(schedule.Next(9).kind, Kind::kDone);
}

TEST(ScheduleTest, MoreSlotsPassARequestThatWaits) {
  const Trace trace = MakeTrace(TimeBase::kNone, {{"a", {}, {}}, {"a", {}, {0}}, {"b", {}, {}}});
  Schedule schedule(&trace, 3, {.as_fast_as_possible = true, .slots = 2});
  ExpectStart(schedule, 0, 0);
  ExpectStart(schedule, 0, 2);
  ExpectWait(schedule, 0, std::nullopt);
  schedule.Complete(0, 1);
  ExpectStart(schedule, 1, 1);
}

TEST(ScheduleTest, ArrivalClockStartsAtTimestampsFromTheFirstDividedBySpeedup) {
  const Trace trace = MakeTrace(TimeBase::kArrival, {{"a", 1000.0, {}}, {"b", 1400.0, {}}});
  Schedule schedule(&trace, 2, {.speedup = 2, .slots = 8});
  ExpectStart(schedule, 0, 0);
  ExpectWait(schedule, 0, 200);
  ExpectStart(schedule, 200, 1);
  EXPECT_EQ(schedule.Next(200).kind, Kind::kDone);
}

TEST(ScheduleTest, AHandOffStartsAfterAllItsSourcesAndItsDelay) {
  const Trace trace = MakeTrace(TimeBase::kArrival, {{"a", 0.0, {}}, {"b", 0.0, {}}, {"a", 1.0, {0, 1}, 50}});
  Schedule schedule(&trace, 3, {.slots = 8});
  ExpectStart(schedule, 0, 0);
  ExpectStart(schedule, 0, 1);
  schedule.Complete(1, 10);
  ExpectWait(schedule, 10, std::nullopt);
  schedule.Complete(0, 30);
  ExpectWait(schedule, 30, 80);
  ExpectStart(schedule, 80, 2);
}

TEST(ScheduleTest, ASessionsClockBeginsWhenItsSlotIsFree) {
  const Trace trace = MakeTrace(TimeBase::kSession, {{"a", 5000.0, {}}, {"a", 5100.0, {}}, {"b", 9.0, {}}});
  Schedule schedule(&trace, 3, {.slots = 1});
  ExpectStart(schedule, 10, 0);
  ExpectWait(schedule, 10, 110);
  ExpectStart(schedule, 110, 1);  // open loop within the session
  schedule.Complete(0, 120);
  ExpectWait(schedule, 120, std::nullopt);
  schedule.Complete(1, 150);
  ExpectStart(schedule, 150, 2);
}

TEST(ScheduleTest, WithoutAClockASessionGoesOneAfterTheOther) {
  const Trace trace = MakeTrace(TimeBase::kNone, {{"a", {}, {}}, {"a", {}, {}}, {"b", {}, {}}});
  Schedule schedule(&trace, 3, {.slots = 2});
  ExpectStart(schedule, 0, 0);
  ExpectStart(schedule, 0, 2);
  ExpectWait(schedule, 0, std::nullopt);
  schedule.Complete(0, 4);
  ExpectStart(schedule, 4, 1);
}

TEST(ScheduleTest, SessionsThatWaitForEachOtherDoNotLockUp) {
  // a/1 waits for b/0, whose session has no slot: it gets one.
  const Trace trace = MakeTrace(TimeBase::kNone, {{"a", {}, {}}, {"b", {}, {}}, {"a", {}, {1}}});
  Schedule schedule(&trace, 3, {.slots = 1});
  ExpectStart(schedule, 0, 0);
  ExpectWait(schedule, 0, std::nullopt);
  schedule.Complete(0, 1);
  ExpectStart(schedule, 1, 1);
  schedule.Complete(1, 2);
  ExpectStart(schedule, 2, 2);
}

TEST(ScheduleTest, AnOpenLoopWaitsForNobody) {
  const Trace trace = MakeTrace(TimeBase::kSession, {{"x", 100, {}}, {"x", 150, {0}, 1000}, {"x", std::nullopt, {0}}});
  Schedule schedule(&trace, 3, {.open_loop = true});
  ExpectStart(schedule, 0, 0);
  ExpectStart(schedule, 50, 1);
  EXPECT_EQ(schedule.Next(60).kind, Kind::kWait) << "without a time of its own it still waits";
  schedule.Complete(0, 70);
  ExpectStart(schedule, 70, 2);
}

TEST(ScheduleTest, LongPausesAreCutToTheLongestDelay) {
  const Trace trace =
      MakeTrace(TimeBase::kArrival, {{"x", 0, {}}, {"x", 100000, {}}, {"x", 100500, {}}, {"x", {}, {0}, 9000}});
  Schedule schedule(&trace, 4, {.speedup = 2, .max_delay_ms = 1000.0, .slots = 9});
  ExpectStart(schedule, 0, 0);
  schedule.Complete(0, 10);
  EXPECT_EQ(schedule.Next(499).until_ms, 500);
  ExpectStart(schedule, 500, 1);
  ExpectStart(schedule, 510, 3);
  EXPECT_EQ(schedule.Next(600).until_ms, 750) << "shorter gaps stay as they were";
  ExpectStart(schedule, 750, 2);
}

}  // namespace
}  // namespace kvshare::trace

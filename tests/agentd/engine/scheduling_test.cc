// Who is next: what reuses most, within a bound; nobody waits behind one who waits for somebody else.
#include <algorithm>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "agentd/engine/cost_meter.h"
#include "agentd/engine/waiting_queue.h"
#include "gtest/gtest.h"
#include "tests/agentd/service_harness.h"

namespace kvshare::testing {
namespace {

using agentd::CostMeter;
using agentd::EngineRequest;
using agentd::kMaxOvertakes;
using agentd::Prospect;
using agentd::WaitingQueue;
using Ids = std::vector<TokenId>;

Ids Counting(std::int64_t n, TokenId start = 0) {
  Ids ids;
  for (std::int64_t i = 0; i < n; ++i) ids.push_back(static_cast<TokenId>((start + i * 7) % 50));
  return ids;
}

EngineRequest Request(std::uint64_t id) {
  EngineRequest request;
  request.id = id;
  return request;
}

TEST(WaitingQueueTest, TheLargerShareGoesFirstAndTheOldestAmongEquals) {
  WaitingQueue queue;
  for (std::uint64_t id = 1; id <= 5; ++id) queue.Push(Request(id));
  const std::vector<Prospect> prospects = {{.reusable = 10, .prompt = 100},
                                           {.reusable = 60, .prompt = 100},
                                           {.reusable = 300, .prompt = 1000},
                                           {.reusable = 90, .prompt = 150},
                                           {.reusable = 99, .prompt = 100, .held = true}};
  EXPECT_EQ(queue.Order(prospects), (std::vector<std::size_t>{1, 3, 2, 0}));
}

TEST(WaitingQueueTest, NobodyIsPassedMoreOftenThanTheBound) {
  WaitingQueue queue;
  std::uint64_t next = 1;
  queue.Push(Request(next++));
  queue.Push(Request(next++));
  std::vector<std::uint64_t> admitted;
  while (admitted.size() < 40) {
    queue.Push(Request(next++));
    // The first two reuse nothing, the second waits for somebody else until much later; all others are full hits.
    std::vector<Prospect> prospects;
    for (std::size_t i = 0; i < queue.window(); ++i) {
      const std::uint64_t id = queue.at(i).id;
      prospects.push_back({.reusable = id <= 2 ? 0 : 99, .prompt = 100, .held = id == 2 && admitted.size() < 20});
    }
    admitted.push_back(queue.Take(queue.Order(prospects).front(), prospects).id);
  }
  EXPECT_EQ(std::find(admitted.begin(), admitted.end(), 1) - admitted.begin(), kMaxOvertakes);
  // The time that it spent waiting for another does not count.
  EXPECT_EQ(std::find(admitted.begin(), admitted.end(), 2) - admitted.begin(), 20 + kMaxOvertakes);
}

// Against a list: whatever the shares are, a request that can be admitted is passed at most kMaxOvertakes times before
// it is due, and those that are due leave in order of arrival.
TEST(WaitingQueueTest, TheBoundHoldsForAnyShares) {
  std::mt19937 rng(5);
  WaitingQueue queue;
  std::uint64_t next = 1;
  std::vector<int> passed(3000);
  for (int step = 0; step < 2000; ++step) {
    for (auto more = rng() % 3; more > 0; --more) queue.Push(Request(next++));
    if (queue.empty()) continue;
    std::vector<Prospect> prospects;
    for (std::size_t i = 0; i < queue.window(); ++i) {
      prospects.push_back({.reusable = static_cast<std::int64_t>(rng() % 100), .prompt = 100});
    }
    const std::size_t taken = queue.Order(prospects).front();
    for (std::size_t i = 0; i < taken; ++i) {
      ASSERT_LT(passed[queue.at(i).id], kMaxOvertakes) << "one that was due was passed";
      ++passed[queue.at(i).id];
    }
    queue.Take(taken, prospects);
  }
}

TEST(CostMeterTest, LoadsUntilItKnowsAndNowAndThenAnyway) {
  CostMeter meter;
  EXPECT_TRUE(meter.ShouldLoad(64, 10));  // what computing costs is not known
  meter.Measured(100, 100, 1);
  EXPECT_DOUBLE_EQ(meter.seconds_per_token(), 0.01);
  meter.Measured(1, 100, 100);  // a step of decoding says nothing
  EXPECT_DOUBLE_EQ(meter.seconds_per_token(), 0.01);
  EXPECT_TRUE(meter.ShouldLoad(64, 0.5));
  EXPECT_TRUE(meter.ShouldLoad(64, 0));  // what loading costs is not known
  int loads = 0;
  for (int i = 0; i < 3 * CostMeter::kTrialPeriod; ++i) loads += meter.ShouldLoad(64, 0.7);
  EXPECT_EQ(loads, 3);
  for (int i = 0; i < 200; ++i) meter.Measured(500, 512, 51.2);
  EXPECT_NEAR(meter.seconds_per_token(), 0.1, 1e-6);
}

TEST(CostMeterTest, ARowOverMovedChunksIsMeasuredInPlainOnes) {
  CostMeter meter;
  meter.MeasuredMoved(100, 10);
  EXPECT_EQ(meter.moved_row(), 1) << "what plain ones cost is not known";
  meter.Measured(100, 100, 1);
  meter.MeasuredMoved(8, 10);  // too few to say anything
  EXPECT_EQ(meter.moved_row(), 1);
  for (int i = 0; i < 100; ++i) meter.MeasuredMoved(100, 2.5);
  EXPECT_NEAR(meter.moved_row(), 2.5, 1e-6);
  meter.MeasuredMoved(100, 1000);  // something else held it up
  EXPECT_LT(meter.moved_row(), 3);
  for (int i = 0; i < 100; ++i) meter.MeasuredMoved(100, 0.8);
  EXPECT_NEAR(meter.moved_row(), 0.8, 1e-6);

  CostMeter given(0.01);
  given.MeasuredMoved(100, 2.5);
  EXPECT_EQ(given.moved_row(), 1);
}

// The order in which requests come to their end, by a name each.
class OrderOfEnds {
 public:
  class Sink final : public agentd::GenerateSink {
   public:
    Sink(OrderOfEnds* order, std::string name) : order_(order), name_(std::move(name)) {}
    void OnChunk(TokenChunk) override {}
    void OnDone(GenerateReply) override { order_->Ended(name_); }
    void OnError(Status status) override { order_->Ended(name_ + ": " + status.message()); }

   private:
    OrderOfEnds* const order_;
    const std::string name_;
  };

  void Start(agentd::Service& service, const GenerateRequest& request, const std::string& name) {
    const Result<std::uint64_t> id = service.Generate(request, std::make_shared<Sink>(this, name));
    EXPECT_TRUE(id.ok()) << id.status().message();
  }
  std::vector<std::string> names() {
    const std::lock_guard lock(mutex_);
    return names_;
  }
  std::ptrdiff_t PlaceOf(const std::string& name) {
    const std::vector<std::string> all = names();
    return std::find(all.begin(), all.end(), name) - all.begin();
  }

 private:
  void Ended(const std::string& name) {
    const std::lock_guard lock(mutex_);
    names_.push_back(name);
  }
  std::mutex mutex_;
  std::vector<std::string> names_;
};

TEST(SchedulingTest, HitsGoFirstAndMissesAreNotStarved) {
  Gate gate;
  TapeService tape({}, 0, {.max_running = 1}, [&] { gate.Pass(); });
  const Ids known = Counting(200);
  tape.Ask(IdsRequest(known, 1));
  gate.Close();
  OrderOfEnds order;
  order.Start(*tape.service, IdsRequest(Counting(10, 40), 1), "first");
  gate.AwaitArrival(2);  // one step computed what is known; the engine is inside that of "first"
  order.Start(*tape.service, IdsRequest(Counting(150, 3), 1), "miss");
  order.Start(*tape.service, IdsRequest(Counting(150, 4), 1), "later miss");
  for (int i = 0; i < 30; ++i) order.Start(*tape.service, IdsRequest(known, 1), "hit " + std::to_string(i));
  gate.Open();
  tape.service->Drain();
  EXPECT_EQ(order.names().size(), 33u);
  EXPECT_EQ(order.PlaceOf("first"), 0);
  EXPECT_EQ(order.PlaceOf("hit 0"), 1);
  EXPECT_EQ(order.PlaceOf("hit 7"), kMaxOvertakes);
  EXPECT_EQ(order.PlaceOf("miss"), 1 + kMaxOvertakes);
  EXPECT_EQ(order.PlaceOf("later miss"), 2 + kMaxOvertakes);
  EXPECT_EQ(order.PlaceOf("hit 8"), 3 + kMaxOvertakes);
  tape.ExpectSound();
}

TEST(SchedulingTest, OneThatWaitsForAPrefixLetsOthersPass) {
  Gate gate;
  gate.Close();
  TapeService tape({.max_positions = 4096}, 0, {.prefill_chunk_tokens = 128}, [&] { gate.Pass(); });
  // The last chunk, from 2944 on, completes one more page, and leaves 44 rows.
  const Ids longest = Counting(2944 + 84);
  OrderOfEnds order;
  order.Start(*tape.service, IdsRequest(longest, 1), "long");
  gate.AwaitArrival(1);
  order.Start(*tape.service, IdsRequest(longest, 1), "same");  // waits for "long" to the end
  order.Start(*tape.service, IdsRequest(Counting(10, 3), 1), "a");
  order.Start(*tape.service, IdsRequest(Counting(10, 4), 1), "b");
  gate.Open();
  tape.service->Drain();
  EXPECT_EQ(order.names(), (std::vector<std::string>{"long", "a", "b", "same"}));
  EXPECT_EQ(tape.probe->rows, 2944 + 84 + 10 + 10 + 1);
  tape.ExpectSound();
}

TEST(SchedulingTest, AnOldRequestThatNeedsRoomGetsItInTheEnd) {
  // 8 pages; the large request needs all of them, the small ones two each and never leave enough free on their own.
  Gate gate;
  gate.Close();
  TapeService tape({.max_positions = 512}, 8, {.max_running = 3, .max_waiting = 1000}, [&] { gate.Pass(); });
  OrderOfEnds order;
  const auto small = [&](int i) { return IdsRequest(Counting(40, i), 60); };
  for (int i = 0; i < 3; ++i) order.Start(*tape.service, small(i), "small");
  gate.AwaitArrival(1);
  order.Start(*tape.service, IdsRequest(Counting(450, 49), 62), "large");
  for (int i = 3; i < 30; ++i) order.Start(*tape.service, small(i), "small");
  gate.Open();
  tape.service->Drain();
  ASSERT_EQ(order.names().size(), 31u);
  // Those that were admitted before it: three, and as many as may pass it.
  EXPECT_LE(order.PlaceOf("large"), 3 + kMaxOvertakes);
  tape.ExpectSound();
}

}  // namespace
}  // namespace kvshare::testing

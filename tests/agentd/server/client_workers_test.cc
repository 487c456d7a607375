// ClientWorkers: whose turn it is, how much may wait, and what becomes of what waits when its client or the server
// goes.
#include "agentd/server/client_workers.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "tests/testing/status_matchers.h"

namespace kvshare::agentd {
namespace {

using ::testing::ElementsAre;

// One thread, held in its first job; what was done is told in order.
class ClientWorkersTest : public ::testing::Test {
 protected:
  ClientWorkersTest() {
    KVS_EXPECT_OK(workers_->Submit("first", 0, Held(1)));
    WaitForHeld(1);
  }
  ~ClientWorkersTest() override { Go(1000); }

  // A job that lasts until Go() has been said to it, or a later one.
  ClientWorkers::Job Held(int number) {
    return [this, number] {
      std::unique_lock lock(mu_);
      held_ = number;
      changed_.notify_all();
      changed_.wait(lock, [&] { return go_ >= number; });
    };
  }
  void WaitForHeld(int number) {
    std::unique_lock lock(mu_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(20), [&] { return held_ == number; }));
  }

  ClientWorkers::Job Tell(const std::string& name) {
    return [this, name] {
      const std::lock_guard lock(mu_);
      done_.push_back(name);
      changed_.notify_all();
    };
  }
  Status Submit(const std::string& client, const std::string& name, std::size_t bytes = 0) {
    return workers_->Submit(client, bytes, Tell(name));
  }
  void Go(int number = 1) {
    const std::lock_guard lock(mu_);
    go_ = number;
    changed_.notify_all();
  }
  std::vector<std::string> WaitFor(std::size_t jobs) {
    std::unique_lock lock(mu_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(20), [&] { return done_.size() >= jobs; }));
    return done_;
  }

  std::mutex mu_;
  std::condition_variable changed_;
  int held_ = 0, go_ = 0;
  bool idle_ = false;
  std::vector<std::string> done_;
  std::unique_ptr<ClientWorkers> workers_ = std::make_unique<ClientWorkers>(1, [this] {
    const std::lock_guard lock(mu_);
    idle_ = true;
    changed_.notify_all();
  });
};

TEST_F(ClientWorkersTest, EachClientHasItsTurn) {
  for (const char* name : {"a1", "a2", "a3"}) KVS_EXPECT_OK(Submit("a", name));
  for (const char* name : {"b1", "b2"}) KVS_EXPECT_OK(Submit("b", name));
  KVS_EXPECT_OK(Submit("c", "c1"));
  workers_->SubmitFirst(Tell("urgent"));
  Go();
  EXPECT_THAT(WaitFor(7), ElementsAre("urgent", "a1", "b1", "c1", "a2", "b2", "a3"));
}

TEST_F(ClientWorkersTest, AClientMayNotHaveMoreWaitingThanItsShare) {
  const std::size_t half = ClientWorkers::kClientBytesMax / 2 - ClientWorkers::kJobBytes;
  KVS_EXPECT_OK(Submit("a", "a1", half));
  KVS_EXPECT_OK(Submit("a", "a2", half));
  KVS_EXPECT_FAILS(Submit("a", "a3"), StatusCode::kResourceExhausted, "of this client");
  KVS_EXPECT_OK(Submit("b", "b1", half));
  KVS_EXPECT_OK(workers_->Submit("b", 0, Held(2)));
  Go();
  WaitForHeld(2);
  EXPECT_THAT(WaitFor(3), ElementsAre("a1", "b1", "a2"));
}

TEST_F(ClientWorkersTest, WhatHasBeenDoneMakesRoom) {
  const std::size_t half = ClientWorkers::kClientBytesMax / 2 - ClientWorkers::kJobBytes;
  KVS_EXPECT_OK(workers_->Submit("a", half, Held(2)));
  KVS_EXPECT_OK(Submit("a", "a1", half));
  EXPECT_FALSE(Submit("a", "a2", half).ok());
  Go();
  WaitForHeld(2);
  KVS_EXPECT_OK(Submit("a", "a2", half));
  EXPECT_FALSE(Submit("a", "a3", half).ok());
}

TEST_F(ClientWorkersTest, NorAllOfThemTogether) {
  const std::size_t share = ClientWorkers::kClientBytesMax - ClientWorkers::kJobBytes;
  const std::size_t clients = ClientWorkers::kBytesMax / ClientWorkers::kClientBytesMax;
  for (std::size_t i = 0; i < clients; ++i) KVS_EXPECT_OK(Submit(std::to_string(i), "x", share));
  KVS_EXPECT_FAILS(Submit("late", "late"), StatusCode::kResourceExhausted, "ask again later");
  workers_->Drop("1");
  KVS_EXPECT_OK(Submit("late", "late"));
  KVS_EXPECT_OK(Submit("late", "later", share - 2 * ClientWorkers::kJobBytes));
}

TEST_F(ClientWorkersTest, WhatAClientThatHasGoneAskedIsNotDone) {
  const auto held = std::make_shared<int>(0);
  for (const char* name : {"a1", "a2"}) KVS_EXPECT_OK(Submit("a", name));
  KVS_EXPECT_OK(workers_->Submit("a", 0, [held] {}));
  KVS_EXPECT_OK(Submit("b", "b1"));
  EXPECT_EQ(held.use_count(), 2);
  workers_->Drop("a");
  workers_->Drop("who?");
  EXPECT_EQ(held.use_count(), 1);
  KVS_EXPECT_OK(Submit("b", "b2"));
  KVS_EXPECT_OK(Submit("a", "a3"));
  Go();
  EXPECT_THAT(WaitFor(3), ElementsAre("b1", "a3", "b2"));
}

TEST_F(ClientWorkersTest, TheEndDoesWhatMakesRoomAndDropsTheRest) {
  KVS_EXPECT_OK(Submit("a", "a1"));
  workers_->SubmitFirst(Tell("urgent"));
  std::thread end([this] { workers_.reset(); });
  // Nobody can be seen to wait for the held job, so the end has a moment to begin.
  {
    std::unique_lock lock(mu_);
    changed_.wait_for(lock, std::chrono::milliseconds(100), [] { return false; });
  }
  Go();
  end.join();
  EXPECT_THAT(done_, ElementsAre("urgent"));
}

TEST_F(ClientWorkersTest, WhoAsksIsToldOfIdleness) {
  EXPECT_FALSE(workers_->IdleOrWake());
  EXPECT_FALSE(idle_);
  Go();
  {
    std::unique_lock lock(mu_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(20), [this] { return idle_; }));
  }
  EXPECT_TRUE(workers_->IdleOrWake());
}

}  // namespace
}  // namespace kvshare::agentd

// The client's end of the memory link: whose answer is whose, what is given up, and a daemon that misbehaves.
#include "libkvshare/client/mapped_pages.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "agentd/server/memory_link.h"
#include "protocol/handover.h"
#include "tests/testing/echo_service.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"

namespace kvshare::client_internal {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

LookupRequest Prompt(std::size_t tokens) { return {.prompt = TokenPrompt{std::vector<TokenId>(tokens)}}; }

class MappedPagesTest : public ::testing::Test {
 protected:
  enum class Way { kAnswer, kUnimplemented, kNonsense, kEnd };

  void SetUp() override {
    ASSERT_TRUE(service_.ShareMemory(4).ok());
    auto link = agentd::MemoryLink::Open(dir_.File("d.sock"), service_.Shared(),
                                         [this](const std::string&) { return std::make_unique<Daemon>(this); });
    ASSERT_TRUE(link.ok()) << link.status().message();
    link_ = *std::move(link);
    link_->Start();
    auto pages = MappedPages::Claim(link_->path(), link_->TicketFor("client"), Later());
    ASSERT_TRUE(pages.ok()) << pages.status().message();
    pages_ = *std::move(pages);
  }
  void TearDown() override {
    OpenGate();
    link_.reset();
  }

  static Clock::time_point Later() { return Clock::now() + std::chrono::seconds(20); }

  void CloseGate() {
    const std::lock_guard lock(mu_);
    open_ = false;
  }
  void OpenGate() {
    const std::lock_guard lock(mu_);
    open_ = true;
    changed_.notify_all();
  }
  bool WaitForCancels(std::size_t count) {
    std::unique_lock lock(mu_);
    return changed_.wait_for(lock, std::chrono::seconds(20), [&] { return cancelled_.size() >= count; });
  }

  // A daemon that finds as many tokens stored as it is asked for, when the gate is open.
  class Daemon final : public agentd::LinkPeer {
   public:
    explicit Daemon(MappedPagesTest* test) : test_(*test) {}
    bool OnFrame(std::span<const std::uint8_t> bytes, codec::Frame* answer) override {
      wire::ReceivedFrame received;
      if (received.Load(bytes, wire::FrameKind::kRequest) != wire::FrameFault::kNone) return false;
      const Result<codec::Request> request = codec::DecodeRequest(*received.request());
      std::unique_lock lock(test_.mu_);
      if (const auto* cancel = std::get_if<codec::Cancel>(&*request)) {
        test_.cancelled_.push_back(cancel->target);
        test_.changed_.notify_all();
        return true;
      }
      test_.changed_.wait(lock, [this] { return test_.open_; });
      const std::uint64_t correlation = received.header().correlation;
      switch (test_.way_) {
        case Way::kEnd: return false;
        case Way::kNonsense: *answer = {1, 2, 3}; return true;
        case Way::kUnimplemented: *answer = codec::EncodeError(correlation, Unimplemented("not here")); return true;
        case Way::kAnswer: break;
      }
      const auto& prompt = std::get<TokenPrompt>(std::get<LookupRequest>(*request).prompt);
      *answer = *codec::EncodeReply(correlation, Match{.prefix_tokens = static_cast<std::int64_t>(prompt.ids.size())});
      return true;
    }

   private:
    MappedPagesTest& test_;
  };

  static std::int64_t TokensOf(const std::optional<Result<codec::Reply>>& reply) {
    if (!reply.has_value() || !reply->ok() || !std::holds_alternative<Match>(**reply)) return -1;
    return std::get<Match>(**reply).prefix_tokens;
  }

  kvshare::testing::TempDir dir_;
  kvshare::testing::EchoService service_;
  std::mutex mu_;
  std::condition_variable changed_;
  bool open_ = true;
  std::atomic<Way> way_ = Way::kAnswer;
  std::vector<std::uint64_t> cancelled_;
  std::unique_ptr<agentd::MemoryLink> link_;
  std::shared_ptr<MappedPages> pages_;
};

TEST_F(MappedPagesTest, ManyThreadsEachGetTheirOwnAnswerOrNone) {
  std::vector<std::jthread> threads;
  std::atomic<int> answered = 0, wrong = 0;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) {
        const auto tokens = static_cast<std::size_t>(1 + t * 200 + i);
        const auto reply = pages_->Ask(Prompt(tokens), Later());
        if (!reply.has_value()) continue;  // another thread was at it
        ++answered;
        if (TokensOf(reply) != static_cast<std::int64_t>(tokens)) ++wrong;
      }
    });
  }
  threads.clear();
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(answered, 0);
}

TEST_F(MappedPagesTest, ALateAnswerIsNobodyElses) {
  CloseGate();
  for (int i = 0; i < 3; ++i) {
    const auto given_up = pages_->Ask(Prompt(5), Clock::now() + milliseconds(20));
    ASSERT_TRUE(given_up.has_value());
    EXPECT_EQ(given_up->status().code(), StatusCode::kDeadlineExceeded);
  }
  OpenGate();
  for (std::size_t n = 10; n < 20; ++n) EXPECT_EQ(TokensOf(pages_->Ask(Prompt(n), Later())), n);
  // And the daemon was told, so that it takes back what it gave.
  ASSERT_TRUE(WaitForCancels(3));
  EXPECT_EQ(cancelled_, (std::vector<std::uint64_t>{1, 2, 3}));
}

TEST_F(MappedPagesTest, WhatItDoesNotCarryIsNotSentOrAskedAgainElsewhere) {
  EXPECT_FALSE(pages_->Ask(Prompt(wire::kMaxLinkFrameBytes / sizeof(TokenId)), Later()).has_value());
  way_ = Way::kUnimplemented;
  EXPECT_FALSE(pages_->Ask(Prompt(1), Later()).has_value());
  way_ = Way::kAnswer;
  EXPECT_EQ(TokensOf(pages_->Ask(Prompt(7), Later())), 7) << "the link is as good as before";
}

TEST_F(MappedPagesTest, ADaemonThatGoesAmidAQuestionIsUnavailableAndThenTheLinkIsNoWay) {
  way_ = Way::kEnd;
  const auto reply = pages_->Ask(Prompt(1), Later());
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->status().code(), StatusCode::kUnavailable);
  EXPECT_FALSE(pages_->Ask(Prompt(1), Later()).has_value());
  EXPECT_FALSE(pages_->Post(codec::Release{.lease = 1}));
  // The memory stays.
  EXPECT_EQ(pages_->Page(0)[0], static_cast<std::byte>(kvshare::testing::EchoService::FillOf(0)));
}

TEST_F(MappedPagesTest, NonsenseFromADaemonEndsTheLink) {
  way_ = Way::kNonsense;
  const auto reply = pages_->Ask(Prompt(1), Later());
  ASSERT_TRUE(reply.has_value());
  EXPECT_FALSE(reply->ok());
  EXPECT_FALSE(pages_->Ask(Prompt(1), Later()).has_value());
}

}  // namespace
}  // namespace kvshare::client_internal

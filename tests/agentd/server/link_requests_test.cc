// What a client that has mapped the pool asks on its own socket, and that its leases go with it, whatever it does.
#include "agentd/server/link_requests.h"

#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "libkvshare/codec/codec.h"
#include "protocol/handover.h"
#include "tests/agentd/server/raw_link.h"
#include "tests/testing/echo_service.h"
#include "tests/testing/temp_dir.h"

namespace kvshare::agentd {
namespace {

using std::chrono::milliseconds;
using testing_link::Bytes;
using testing_link::RawLink;

codec::Frame Encoded(std::uint64_t correlation, const codec::Request& request) {
  return *codec::EncodeRequest(correlation, request);
}

TEST(ClientLeasesTest, EachHasItsOwnAndNoMoreThanItMay) {
  ClientLeases leases;
  EXPECT_FALSE(leases.HoldsAny("a"));
  leases.Add("a", {.id = 1, .ttl = milliseconds(60000)});
  leases.Add("b", {.id = 2, .ttl = milliseconds(60000)});
  EXPECT_FALSE(leases.Remove("b", 1)) << "another's";
  EXPECT_TRUE(leases.Remove("a", 1));
  EXPECT_FALSE(leases.Remove("a", 1));
  EXPECT_EQ(leases.Peers(), std::vector<std::string>{"b"});
  for (std::uint64_t id = 10; leases.MayLease("a").ok(); ++id) leases.Add("a", {.id = id, .ttl = milliseconds(60000)});
  EXPECT_EQ(leases.held(), 1024 + 1);
  EXPECT_TRUE(leases.MayLease("b").ok());
  EXPECT_EQ(leases.TakeAll("a").size(), 1024u);
  EXPECT_EQ(leases.dropped(), 1024);
  EXPECT_TRUE(leases.MayLease("a").ok());
}

TEST(ClientLeasesTest, WhatHasEndedByItselfIsForgotten) {
  ClientLeases leases;
  for (std::uint64_t id = 0; id < 2000; ++id) leases.Add("a", {.id = id, .ttl = milliseconds(0)});
  EXPECT_EQ(leases.held(), 0);
  EXPECT_TRUE(leases.MayLease("a").ok());
  EXPECT_FALSE(leases.HoldsAny("a"));
  EXPECT_TRUE(leases.TakeAll("a").empty());
  EXPECT_EQ(leases.dropped(), 0);
}

class LinkRequestsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const Status shared = service_.ShareMemory(32);
    ASSERT_TRUE(shared.ok()) << shared.message();
    auto link = MemoryLink::Open(dir_.File("d.sock"), service_.Shared(),
                                 [this](const std::string& peer) { return requests_.NewPeer(peer); });
    ASSERT_TRUE(link.ok()) << link.status().message();
    link_ = *std::move(link);
    link_->Start();
  }

  std::unique_ptr<RawLink> Claimed(const std::string& name) {
    auto client = std::make_unique<RawLink>(link_->path());
    client->Send(wire::EncodeClaim(link_->TicketFor(name)));
    const RawLink::Answer answer = client->Receive();
    EXPECT_TRUE(answer.grant.has_value() && answer.grant->granted);
    return client;
  }

  // The reply to `request`; Unavailable when the connection ended instead.
  static codec::Reply Ask(RawLink& client, std::uint64_t correlation, const codec::Request& request) {
    client.Send(Encoded(correlation, request));
    return Receive(client, correlation);
  }
  static codec::Reply Receive(RawLink& client, std::uint64_t correlation) {
    const Bytes bytes = client.ReceiveFrame();
    wire::ReceivedFrame received;
    if (received.Load(bytes, wire::FrameKind::kReply) != wire::FrameFault::kNone) return Unavailable("no reply");
    EXPECT_EQ(received.header().correlation, correlation);
    return *codec::DecodeReply(*received.reply());
  }
  static StatusCode CodeOf(const codec::Reply& reply) {
    const Status* status = std::get_if<Status>(&reply);
    return status == nullptr ? StatusCode::kOk : status->code();
  }
  static std::uint64_t LeaseOf(const codec::Reply& reply) {
    const LeaseInfo* lease = std::get_if<LeaseInfo>(&reply);
    EXPECT_NE(lease, nullptr);
    return lease == nullptr ? 0 : lease->id;
  }

  static inline const AcquireRequest kAcquire{.prompt = TextPrompt{"abc"}};

  kvshare::testing::TempDir dir_;
  kvshare::testing::EchoService service_;
  std::atomic<bool> draining_ = false;
  ClientLeases leases_;
  ClientWorkers workers_{1, [] {}};
  LinkRequests requests_{&service_, &leases_, &workers_, &draining_};
  std::unique_ptr<MemoryLink> link_;
};

TEST_F(LinkRequestsTest, LooksUpLeasesAndReleases) {
  const auto client = Claimed("a");
  const codec::Reply match = Ask(*client, 7, LookupRequest{.prompt = TextPrompt{"abcd"}});
  ASSERT_TRUE(std::holds_alternative<Match>(match));
  EXPECT_EQ(std::get<Match>(match).prompt_tokens, 4);
  const std::uint64_t first = LeaseOf(Ask(*client, 8, kAcquire));
  const std::uint64_t second = LeaseOf(Ask(*client, 9, kAcquire));
  EXPECT_EQ(leases_.held(), 2);
  EXPECT_EQ(CodeOf(Ask(*client, 10, codec::Release{.lease = first})), StatusCode::kOk);
  EXPECT_EQ(CodeOf(Ask(*client, 11, codec::Release{.lease = first})), StatusCode::kNotFound);
  EXPECT_EQ(CodeOf(Ask(*Claimed("b"), 12, codec::Release{.lease = second})), StatusCode::kNotFound) << "another's";
  EXPECT_EQ(service_.leases(), 1);
  client->Send(Encoded(0, codec::Release{.lease = second}));
  EXPECT_TRUE(service_.WaitForLeases(0));
  EXPECT_EQ(leases_.dropped(), 0);
}

TEST_F(LinkRequestsTest, WhatDoesNotBelongHereIsRefusedAndTheConnectionStays) {
  const auto client = Claimed("a");
  EXPECT_EQ(CodeOf(Ask(*client, 1, codec::GetStats{})), StatusCode::kUnimplemented);
  EXPECT_EQ(CodeOf(Ask(*client, 2, codec::Drain{})), StatusCode::kUnimplemented);
  const std::uint64_t lease = LeaseOf(Ask(*client, 3, kAcquire));
  draining_ = true;
  EXPECT_EQ(CodeOf(Ask(*client, 4, kAcquire)), StatusCode::kUnavailable);
  EXPECT_EQ(CodeOf(Ask(*client, 5, codec::Release{.lease = lease})), StatusCode::kOk) << "what is held goes back";
}

TEST_F(LinkRequestsTest, TheLargestRequestsAnswerFits) {
  const auto client = Claimed("a");
  const AcquireRequest request{.prompt = TextPrompt{std::string(wire::kMaxLinkFrameBytes - 1000, 'a')}};
  const codec::Reply reply = Ask(*client, 1, request);
  const auto* lease = std::get_if<LeaseInfo>(&reply);
  ASSERT_NE(lease, nullptr);
  EXPECT_EQ(lease->pages.size(), (wire::kMaxLinkFrameBytes - 1000 + 63) / 64);
}

TEST_F(LinkRequestsTest, AnAcquireThatWasGivenUpIsTakenBack) {
  const auto client = Claimed("a");
  LeaseOf(Ask(*client, 1, kAcquire));
  LeaseOf(Ask(*client, 2, kAcquire));
  EXPECT_EQ(service_.leases(), 2);
  // In the order of the datagrams: each reply proves that what went before it has been read.
  client->Send(Encoded(0, codec::Cancel{.target = 1}));
  Ask(*client, 3, LookupRequest{.prompt = TextPrompt{"x"}});
  EXPECT_EQ(service_.leases(), 2) << "not the last one: its asker has gone on";
  client->Send(Encoded(0, codec::Cancel{.target = 2}));
  client->Send(Encoded(0, codec::Cancel{.target = 2}));
  Ask(*client, 4, LookupRequest{.prompt = TextPrompt{"x"}});
  EXPECT_EQ(service_.leases(), 1);
  EXPECT_EQ(leases_.held(), 1);
}

TEST_F(LinkRequestsTest, AClientThatGoesMidwayHoldsNothing) {
  for (int i = 0; i < 50; ++i) {
    const auto client = Claimed("client " + std::to_string(i));
    LeaseOf(Ask(*client, 1, kAcquire));
    // These may be asked, answered or unread when it goes.
    for (std::uint64_t n = 2; n < 6; ++n) client->Send(Encoded(n, kAcquire));
  }
  EXPECT_TRUE(service_.WaitForLeases(0));
  EXPECT_EQ(leases_.held(), 0);
}

TEST_F(LinkRequestsTest, NoFrameDoesWorseThanEndItsConnection) {
  std::mt19937_64 rng(11);
  const codec::Frame good = Encoded(3, kAcquire);
  const auto honest = Claimed("honest");
  for (int i = 0; i < 400; ++i) {
    const auto client = Claimed("peer " + std::to_string(i));
    LeaseOf(Ask(*client, 1, kAcquire));
    Bytes bytes = good;
    for (int n = 0; n < 4; ++n) bytes[rng() % bytes.size()] = static_cast<std::uint8_t>(rng());
    if (rng() % 3 == 0) bytes.resize(1 + rng() % bytes.size());
    client->Send(bytes);
  }
  EXPECT_TRUE(service_.WaitForLeases(0));
  EXPECT_GT(requests_.malformed(), 100);
  EXPECT_EQ(CodeOf(Ask(*honest, 1, LookupRequest{.prompt = TextPrompt{"x"}})), StatusCode::kOk);
}

TEST_F(LinkRequestsTest, AClientThatNeverReadsLosesItsConnectionAndNobodyElseWaits) {
  const auto honest = Claimed("honest");
  const auto client = Claimed("mute");
  LeaseOf(Ask(*client, 1, kAcquire));
  const codec::Frame frame = Encoded(2, AcquireRequest{.prompt = TextPrompt{std::string(20000, 'a')}});
  int sent = 0;
  while (client->Send(frame)) ASSERT_LT(++sent, 10000) << "its answers are kept without end";
  EXPECT_TRUE(service_.WaitForLeases(0));
  EXPECT_EQ(CodeOf(Ask(*honest, 1, LookupRequest{.prompt = TextPrompt{"x"}})), StatusCode::kOk);
}

TEST_F(LinkRequestsTest, StoppingAmidRequestsLeavesNothing) {
  std::vector<std::unique_ptr<RawLink>> claimed;
  std::vector<std::jthread> clients;
  std::atomic<int> answered = 0;
  for (int c = 0; c < 8; ++c) {
    // Claimed before any of them asks: what is refused because the link has stopped is a request, never a claim.
    claimed.push_back(Claimed("client " + std::to_string(c)));
  }
  for (const auto& client : claimed) {
    clients.emplace_back([&client, &answered] {
      for (std::uint64_t n = 1; CodeOf(Ask(*client, n, kAcquire)) == StatusCode::kOk && n < 1000; ++n) ++answered;
    });
  }
  while (answered < 100) std::this_thread::yield();
  link_->Stop();
  clients.clear();
  EXPECT_TRUE(service_.WaitForLeases(0));
}

}  // namespace
}  // namespace kvshare::agentd

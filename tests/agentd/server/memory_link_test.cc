// The socket that hands out the pool's memory: to whom it does not, and what it survives.
#include "agentd/server/memory_link.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <chrono>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "agentd/server/router_server.h"
#include "kvshare/client.h"
#include "protocol/handover.h"
#include "tests/agentd/server/raw_link.h"
#include "tests/testing/echo_service.h"
#include "tests/testing/one_more_descriptor.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"

namespace kvshare::agentd {
namespace {

using testing_link::Bytes;
using testing_link::RawLink;

// Tells when it goes, and answers nothing.
class MutePeer final : public LinkPeer {
 public:
  MutePeer(std::vector<std::string>* gone, std::string name) : gone_(*gone), name_(std::move(name)) {}
  ~MutePeer() override { gone_.push_back(name_); }
  bool OnFrame(std::span<const std::uint8_t> bytes, codec::Frame*) override { return bytes.size() > 3; }

 private:
  std::vector<std::string>& gone_;
  const std::string name_;
};

class MemoryLinkTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const Status shared = service_.ShareMemory(4);
    ASSERT_TRUE(shared.ok()) << shared.message();
    auto link = MemoryLink::Open(path_, service_.Shared(),
                                 [this](const std::string& peer) { return std::make_unique<MutePeer>(&gone_, peer); });
    ASSERT_TRUE(link.ok()) << link.status().message();
    link_ = *std::move(link);
  }
  // What its threads would do; local sockets deliver at once.
  void Turn() {
    while (link_->HandleOne(std::chrono::milliseconds(0))) {
    }
  }
  RawLink::Answer AnswerTo(const Bytes& datagram) {
    RawLink client(link_->path());
    EXPECT_TRUE(client.connected());
    client.Send(datagram);
    Turn();
    Turn();
    return client.Receive();
  }

  kvshare::testing::TempDir dir_;
  const std::string path_ = dir_.File("d.sock");
  kvshare::testing::EchoService service_;
  std::vector<std::string> gone_;
  std::unique_ptr<MemoryLink> link_;
};

TEST_F(MemoryLinkTest, ATicketBringsTheMemoryAndItsEndIsNoticed) {
  struct stat found {};
  ASSERT_EQ(::lstat(link_->path().c_str(), &found), 0);
  EXPECT_EQ(found.st_mode & 0777, 0600u);
  {
    RawLink client(link_->path());
    client.Send(wire::EncodeClaim(link_->TicketFor("peer one")));
    Turn();
    Turn();
    const RawLink::Answer answer = client.Receive();
    ASSERT_TRUE(answer.grant.has_value());
    EXPECT_TRUE(answer.grant->granted);
    EXPECT_TRUE(answer.descriptors);
    EXPECT_EQ(answer.grant->num_pages, 4u);
    EXPECT_EQ(answer.grant->page_bytes, 4096u);
    EXPECT_TRUE(gone_.empty());
    // One connection owns one client's leases.
    EXPECT_FALSE(AnswerTo(wire::EncodeClaim(link_->TicketFor("peer one"))).grant->granted);
    EXPECT_TRUE(gone_.empty());
  }
  Turn();
  EXPECT_EQ(gone_, std::vector<std::string>{"peer one"});
  EXPECT_EQ(link_->counters().granted, 1);
  EXPECT_EQ(link_->counters().refused, 1);
}

TEST_F(MemoryLinkTest, AGuessedTicketIsRefused) {
  Bytes ticket = link_->TicketFor("peer one");
  for (std::size_t at = 0; at < ticket.size(); ++at) {
    Bytes guess = ticket;
    guess[at] ^= 1;
    const RawLink::Answer answer = AnswerTo(wire::EncodeClaim(guess));
    ASSERT_TRUE(answer.grant.has_value());
    EXPECT_FALSE(answer.grant->granted) << "byte " << at;
    EXPECT_FALSE(answer.descriptors);
  }
  EXPECT_FALSE(AnswerTo(wire::EncodeClaim({})).descriptors);
  EXPECT_FALSE(AnswerTo(wire::EncodeClaim(Bytes(16))).descriptors);
  EXPECT_TRUE(gone_.empty());
  // Another daemon's ticket for a connection of the same name.
  kvshare::testing::TempDir other_dir;
  const auto other = MemoryLink::Open(other_dir.File("d.sock"), service_.Shared(), nullptr);
  ASSERT_TRUE(other.ok());
  EXPECT_FALSE(AnswerTo(wire::EncodeClaim((*other)->TicketFor("peer one"))).descriptors);
}

TEST_F(MemoryLinkTest, NoDatagramDoesWorseThanARefusal) {
  std::mt19937_64 rng(7);
  const Bytes good = wire::EncodeClaim(link_->TicketFor("peer"));
  for (int i = 0; i < 500; ++i) {
    Bytes bytes = good;
    switch (rng() % 4) {
      case 0: bytes.resize(rng() % bytes.size()); break;
      case 1: bytes.resize(bytes.size() + 1 + rng() % 2000); break;
      case 2: bytes[rng() % bytes.size()] ^= static_cast<std::uint8_t>(1 + rng() % 255); break;
      default:
        bytes.resize(1 + rng() % 400);
        for (auto& byte : bytes) byte = static_cast<std::uint8_t>(rng());
    }
    if (bytes == good) continue;
    const RawLink::Answer answer = AnswerTo(bytes);
    ASSERT_FALSE(answer.descriptors) << "datagram " << i;
    if (answer.grant.has_value()) {
      ASSERT_FALSE(answer.grant->granted);
    }
  }
  EXPECT_TRUE(AnswerTo(good).grant->granted) << "and it serves on";
}

TEST_F(MemoryLinkTest, ThreadsShowOutWhoeverDoesNotClaim) {
  link_->Start();
  RawLink client(link_->path());
  EXPECT_FALSE(client.Receive().grant.has_value()) << "ended, without a claim, by the clock";
  EXPECT_EQ(link_->counters().refused, 1);
  link_->Stop();
  EXPECT_FALSE(RawLink(link_->path()).connected());
}

TEST_F(MemoryLinkTest, ADatagramAboveTheLimitEndsTheConnection) {
  RawLink client(link_->path());
  client.Send(wire::EncodeClaim(link_->TicketFor("talker")));
  Turn();
  ASSERT_TRUE(client.Receive().grant->granted);
  client.Send(Bytes(wire::kMaxLinkFrameBytes));
  Turn();
  EXPECT_TRUE(gone_.empty());
  client.Send(Bytes(wire::kMaxLinkFrameBytes + 1));
  Turn();
  EXPECT_EQ(gone_, std::vector<std::string>{"talker"});
}

TEST_F(MemoryLinkTest, SayingNoFrameAfterTheClaimEndsTheConnection) {
  RawLink client(link_->path());
  client.Send(wire::EncodeClaim(link_->TicketFor("talker")));
  Turn();
  Turn();
  ASSERT_TRUE(client.Receive().grant->granted);
  client.Send({1, 2, 3});
  Turn();
  EXPECT_EQ(gone_, std::vector<std::string>{"talker"});
  EXPECT_FALSE(client.Receive().grant.has_value());
}

// Who cannot be accepted waits, and the threads do not turn round for it.
TEST_F(MemoryLinkTest, WithoutDescriptorsItWaits) {
  std::optional<kvshare::testing::OneMoreDescriptor> one_more(std::in_place);
  const RawLink client(link_->path());  // takes the last one
  const auto until = MemoryLink::Clock::now() + std::chrono::milliseconds(200);
  int offered = 0;
  while (MemoryLink::Clock::now() < until) offered += link_->HandleOne(std::chrono::milliseconds(10));
  one_more.reset();
  EXPECT_GT(offered, 0);
  EXPECT_LT(offered, 20);
  Turn();
  link_->CloseIdle(MemoryLink::Clock::now() + std::chrono::seconds(2));
  EXPECT_EQ(link_->counters().refused, 1);  // it had been accepted
}

TEST_F(MemoryLinkTest, WhoeverDoesNotClaimIsShownOut) {
  const RawLink client(link_->path());
  Turn();
  const auto now = MemoryLink::Clock::now();
  link_->CloseIdle(now);
  EXPECT_EQ(link_->counters().refused, 0);
  link_->CloseIdle(now + std::chrono::seconds(2));
  EXPECT_EQ(link_->counters().refused, 1);
  EXPECT_TRUE(gone_.empty());
}

TEST_F(MemoryLinkTest, MemoryThatIsNotSharedHasNoSocket) {
  EXPECT_EQ(MemoryLink::Open(path_, SharedPages{}, nullptr).status().code(), StatusCode::kInvalidArgument);
  const std::string long_path = "/" + std::string(104, 'x');
  EXPECT_EQ(MemoryLink::Open(long_path, service_.Shared(), nullptr).status().code(), StatusCode::kInvalidArgument);
  // A second daemon on the same path must not take the first one's.
  EXPECT_EQ(MemoryLink::Open(path_, service_.Shared(), nullptr).status().code(), StatusCode::kUnavailable);
}

// ---- with the server around it ----

TEST(MemoryLinkServerTest, AServerWithoutTheSocketServesAndSaysWhy) {
  kvshare::testing::TempDir dir;
  kvshare::testing::EchoService service;  // shares nothing
  const auto server = StartRouterServer(&service, {.endpoint = "ipc://" + dir.File("d.sock")});
  ASSERT_TRUE(server.ok());
  EXPECT_TRUE((*server)->memory_socket().empty());
  EXPECT_FALSE((*server)->memory_error().ok());
  const auto client = Connect({.endpoint = (*server)->endpoint()});
  const auto lease = (*client)->Acquire({.prompt = TextPrompt{"abc"}});
  KVS_ASSERT_OK(lease);
  EXPECT_EQ(lease->PageBytes(0).status().code(), StatusCode::kFailedPrecondition);
}

TEST(MemoryLinkServerTest, TheSocketGoesWithTheServer) {
  kvshare::testing::TempDir dir;
  kvshare::testing::EchoService service;
  ASSERT_TRUE(service.ShareMemory(2).ok());
  auto server = StartRouterServer(&service, {.endpoint = "ipc://" + dir.File("d.sock")});
  ASSERT_TRUE(server.ok());
  const std::string path = (*server)->memory_socket();
  struct stat found {};
  EXPECT_EQ(::lstat(path.c_str(), &found), 0);
  server->reset();
  EXPECT_NE(::lstat(path.c_str(), &found), 0);
}

}  // namespace
}  // namespace kvshare::agentd

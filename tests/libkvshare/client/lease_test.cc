// Stored KV by name, over a real socket: leases are read where they lie, and end with whoever held them.
#include "kvshare/lease.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "agentd/server/router_server.h"
#include "kvshare/client.h"
#include "tests/testing/echo_service.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"

extern char** environ;

namespace kvshare {
namespace {

using kvshare::testing::EchoService;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr milliseconds kLong{30000};
constexpr int kPages = 32;

AcquireRequest Whole(const std::string& text) { return {.prompt = TextPrompt{text}}; }

// lease_holder in a process of its own.
class Holder {
 public:
  Holder(const std::string& endpoint, const std::string& what, const std::string& count) {
    std::array<int, 2> in{}, out{};
    EXPECT_EQ(::pipe(in.data()) | ::pipe(out.data()), 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in[0], STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
    for (int fd : {in[0], in[1], out[0], out[1]}) posix_spawn_file_actions_addclose(&actions, fd);
    std::string program = KVS_LEASE_HOLDER, address = endpoint, verb = what, n = count;
    std::array<char*, 5> args = {program.data(), address.data(), verb.data(), n.data(), nullptr};
    EXPECT_EQ(::posix_spawn(&pid_, program.c_str(), &actions, nullptr, args.data(), environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    ::close(in[0]);
    ::close(out[1]);
    input_ = in[1];
    output_ = out[0];
  }
  ~Holder() {
    ::close(input_);
    ::close(output_);
    if (pid_ > 0) ::waitpid(pid_, nullptr, 0);
  }

  bool WaitHeld() {
    std::string said(5, '\0');
    for (std::size_t got = 0; got < said.size();) {
      const ssize_t n = ::read(output_, said.data() + got, said.size() - got);
      if (n <= 0) return false;
      got += static_cast<std::size_t>(n);
    }
    return said == "held\n";
  }
  void Kill() { ::kill(pid_, SIGKILL); }
  int Wait() {
    int ended = 0;
    ::waitpid(pid_, &ended, 0);
    pid_ = -1;
    return WIFEXITED(ended) ? WEXITSTATUS(ended) : -1;
  }

 private:
  pid_t pid_ = -1;
  int input_ = -1;
  int output_ = -1;
};

class LeaseTest : public ::testing::Test {
 protected:
  void SetUp() override { KVS_ASSERT_OK_STATUS(service_.ShareMemory(kPages)); }

  void StartServer(agentd::RouterServerOptions options = {}) {
    if (options.endpoint.empty()) options.endpoint = endpoint_;
    auto started = agentd::StartRouterServer(&service_, options);
    ASSERT_TRUE(started.ok()) << started.status().message();
    server_ = *std::move(started);
  }
  std::unique_ptr<Client> NewClient() { return *Connect({.endpoint = server_->endpoint(), .timeout = kLong}); }

  static void KVS_ASSERT_OK_STATUS(const Status& status) { ASSERT_TRUE(status.ok()) << status.message(); }

  kvshare::testing::TempDir dir_;
  const std::string endpoint_ = "ipc://" + dir_.File("d.sock");
  EchoService service_;
  std::unique_ptr<agentd::RouterServer> server_;
};

TEST_F(LeaseTest, CallsByNameBringTheServicesAnswers) {
  StartServer();
  const auto client = NewClient();
  const Result<Match> match = client->Lookup({.prompt = TextPrompt{"abcd"}, .agent = "a", .session = "s"});
  KVS_ASSERT_OK(match);
  EXPECT_EQ(match->prompt_tokens, 4);
  EXPECT_EQ(match->prefix_tokens, 3);
  const Result<PinInfo> pin = client->Pin({.prompt = TextPrompt{"abcd"}});
  KVS_ASSERT_OK(pin);
  EXPECT_EQ(pin->tokens, 4);
  EXPECT_TRUE(client->Unpin(pin->key).ok());
  EXPECT_EQ(client->Unpin(pin->key).code(), StatusCode::kNotFound);
  const Result<std::int64_t> fetched = client->Prefetch({.prompt = TextPrompt{"abcde"}});
  KVS_ASSERT_OK(fetched);
  EXPECT_EQ(*fetched, 5);
  const Result<std::int64_t> evicted = client->Evict({.host = true, .cold = false});
  KVS_ASSERT_OK(evicted);
  EXPECT_EQ(*evicted, 1);
  EXPECT_EQ(client->Evict({.key = "unknown"}).status().code(), StatusCode::kNotFound);
  const Result<std::vector<Entry>> entries = client->Entries({.limit = 2});
  KVS_ASSERT_OK(entries);
  ASSERT_EQ(entries->size(), 2u);
  EXPECT_EQ((*entries)[1].tier, "host+cold");
  EXPECT_TRUE((*entries)[1].pinned);
  EXPECT_EQ(client->Entries({.limit = 1 << 20}).status().code(), StatusCode::kInvalidArgument);
}

TEST_F(LeaseTest, ALeaseIsReadWhereItLies) {
  StartServer();
  const auto client = NewClient();
  Result<Lease> lease = client->Acquire(Whole(std::string(200, 'x')));
  KVS_ASSERT_OK(lease);
  ASSERT_TRUE(*lease);
  EXPECT_EQ(lease->tokens(), 200);
  ASSERT_EQ(lease->pages().size(), 4u);
  EXPECT_EQ(lease->pages()[3].valid_tokens, 8);
  EXPECT_EQ(lease->layout().page_bytes, 4096);
  for (std::size_t i = 0; i < 4; ++i) {
    const auto bytes = lease->PageBytes(i);
    KVS_ASSERT_OK(bytes);
    ASSERT_EQ(bytes->size(), 4096u);
    const auto fill = static_cast<std::byte>(EchoService::FillOf(static_cast<std::int64_t>(i)));
    EXPECT_TRUE(std::all_of(bytes->begin(), bytes->end(), [fill](std::byte b) { return b == fill; })) << "page " << i;
    // Nor can it be made writable: there is one copy of it, and it is the daemon's.
    EXPECT_NE(::mprotect(const_cast<std::byte*>(bytes->data()), bytes->size(), PROT_READ | PROT_WRITE), 0);
  }
  EXPECT_TRUE(lease->Valid());
  EXPECT_EQ(lease->PageBytes(4).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(service_.leases(), 1);
  EXPECT_TRUE(lease->Release().ok());
  EXPECT_EQ(service_.leases(), 0);
  EXPECT_FALSE(*lease);
  EXPECT_EQ(lease->Release().code(), StatusCode::kNotFound);
}

TEST_F(LeaseTest, ValidTellsOfAPageThatHoldsSomethingElse) {
  StartServer();
  const auto client = NewClient();
  const Result<Lease> lease = client->Acquire(Whole(std::string(200, 'x')));
  KVS_ASSERT_OK(lease);
  service_.Reuse(2, 0xEE);
  EXPECT_TRUE(lease->Valid(1));
  EXPECT_FALSE(lease->Valid(2));
  EXPECT_FALSE(lease->Valid());
  EXPECT_FALSE(lease->Valid(99));
  // The next lease has the new content, and knows.
  const Result<Lease> next = client->Acquire(Whole(std::string(200, 'x')));
  KVS_ASSERT_OK(next);
  EXPECT_TRUE(next->Valid());
  const auto bytes = next->PageBytes(2);
  KVS_ASSERT_OK(bytes);
  EXPECT_EQ((*bytes)[0], std::byte{0xEE});
}

// Whoever saw one byte of the new content must see the new generation: a copy that mixes two fills was read while the
// page changed.
TEST_F(LeaseTest, NoPageReadWhileItChangesIsTakenForValid) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "reading what another thread writes is the point here, and a report to ThreadSanitizer";
#endif
  StartServer();
  const auto client = NewClient();
  std::atomic<bool> stop = false;
  std::thread writer([&] {
    for (unsigned char fill = 1; !stop; fill = static_cast<unsigned char>(fill % 250 + 1)) {
      service_.Reuse(0, fill);
    }
  });
  int torn = 0, valid = 0;
  for (int i = 0; i < 2000; ++i) {
    const Result<Lease> lease = client->Acquire(Whole("x"));
    ASSERT_TRUE(lease.ok());
    const auto bytes = lease->PageBytes(0);
    ASSERT_TRUE(bytes.ok());
    const std::vector<std::byte> copy(bytes->begin(), bytes->end());
    const bool mixed = std::any_of(copy.begin(), copy.end(), [&](std::byte b) { return b != copy[0]; });
    torn += mixed ? 1 : 0;
    if (!lease->Valid(0)) continue;
    ++valid;
    EXPECT_FALSE(mixed) << "a page that changed was taken for valid";
  }
  stop = true;
  writer.join();
  std::printf("2000 reads: %d valid, %d of a page in change\n", valid, torn);
}

TEST_F(LeaseTest, NothingStoredIsAnEmptyLease) {
  const Lease nothing;
  EXPECT_FALSE(nothing);
  EXPECT_EQ(nothing.tokens(), 0);
  EXPECT_TRUE(nothing.pages().empty());
  EXPECT_EQ(nothing.PageBytes(0).status().code(), StatusCode::kInvalidArgument);
}

TEST_F(LeaseTest, LeasesEndWithTheirObjects) {
  StartServer();
  const auto client = NewClient();
  {
    std::vector<Lease> leases;
    for (int i = 0; i < 20; ++i) leases.push_back(*client->Acquire(Whole("p" + std::to_string(i))));
    EXPECT_EQ(service_.leases(), 20);
    leases[3] = std::move(leases[4]);
  }
  EXPECT_TRUE(service_.WaitForLeases(0));
  EXPECT_EQ(server_->counters().leases_dropped, 0);
}

TEST_F(LeaseTest, LeasesEndWithTheirClientAndTheMemoryStays) {
  StartServer();
  auto client = NewClient();
  Result<Lease> lease = client->Acquire(Whole("abc"));
  KVS_ASSERT_OK(lease);
  const auto bytes = lease->PageBytes(0);
  KVS_ASSERT_OK(bytes);
  client.reset();
  EXPECT_TRUE(service_.WaitForLeases(0));
  EXPECT_EQ((*bytes)[0], static_cast<std::byte>(EchoService::FillOf(0)));
  EXPECT_EQ(lease->Release().code(), StatusCode::kNotFound);
}

TEST_F(LeaseTest, AKilledClientHoldsNothingASecondLater) {
  StartServer();
  Holder holder(endpoint_, "hold", "50");
  ASSERT_TRUE(holder.WaitHeld());
  EXPECT_EQ(service_.leases(), 50);
  const auto start = steady_clock::now();
  holder.Kill();
  ASSERT_TRUE(service_.WaitForLeases(0));
  const auto took = std::chrono::duration_cast<milliseconds>(steady_clock::now() - start);
  EXPECT_LT(took, milliseconds(1000));
  EXPECT_EQ(server_->counters().leases_dropped, 50);
  std::printf("50 leases of a killed client were free after %lld ms\n", static_cast<long long>(took.count()));
}

TEST_F(LeaseTest, AClientServesParentAndChildOfAFork) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "ThreadSanitizer has no threads in a forked child";
#else
  StartServer();
  Holder holder(endpoint_, "fork", "");
  EXPECT_EQ(holder.Wait(), 0);
  EXPECT_TRUE(service_.WaitForLeases(0));
#endif
}

TEST_F(LeaseTest, ANewDaemonsMemoryIsNotMistakenForTheOldOnes) {
  StartServer();
  const auto client = NewClient();
  Result<Lease> old = client->Acquire(Whole("abc"));
  KVS_ASSERT_OK(old);
  server_.reset();
  EXPECT_TRUE(service_.WaitForLeases(0)) << "a stopping server gives its clients' leases back";
  StartServer();
  const Result<Lease> lease = client->Acquire(Whole("abc"));
  KVS_ASSERT_OK(lease);
  KVS_EXPECT_OK(lease->PageBytes(0));
  // The old lease's number may be another's now: nothing is released in its name.
  EXPECT_EQ(old->Release().code(), StatusCode::kNotFound);
  // One that came before the new daemon's memory was mapped is on its way back.
  EXPECT_TRUE(service_.WaitForLeases(1));
  EXPECT_EQ(service_.leases(), 1);
}

TEST_F(LeaseTest, IsNotReleasedOnceItsDaemonHasGone) {
  StartServer({.endpoint = "tcp://127.0.0.1:0"});  // by ZeroMQ alone
  const auto client = NewClient();
  Result<Lease> lease = client->Acquire(Whole("abc"));
  KVS_ASSERT_OK(lease);
  server_.reset();
  // Nor does it wait for the next daemon, whose lease of this number would be another one.
  const Status released = lease->Release();
  EXPECT_EQ(released.code(), StatusCode::kUnavailable);
  EXPECT_THAT(released.message(), ::testing::HasSubstr("went away"));
}

TEST_F(LeaseTest, MemoryThatWasNotThereIsAskedForAgain) {
  StartServer();
  const auto client = NewClient();
  const std::string socket = server_->memory_socket(), elsewhere = dir_.File("elsewhere");
  ASSERT_EQ(std::rename(socket.c_str(), elsewhere.c_str()), 0);
  const Result<Lease> unread = client->Acquire(Whole("abc"));
  KVS_ASSERT_OK(unread);
  EXPECT_EQ(unread->PageBytes(0).status().code(), StatusCode::kUnavailable);
  ASSERT_EQ(std::rename(elsewhere.c_str(), socket.c_str()), 0);
  const auto give_up = steady_clock::now() + kLong;
  for (bool read = false; !read;) {
    ASSERT_LT(steady_clock::now(), give_up);
    const Result<Lease> lease = client->Acquire(Whole("abc"));
    KVS_ASSERT_OK(lease);
    read = lease->PageBytes(0).ok();
  }
}

TEST_F(LeaseTest, OverTcpALeaseIsMetadata) {
  StartServer({.endpoint = "tcp://127.0.0.1:0"});
  auto client = NewClient();
  const Result<Lease> lease = client->Acquire(Whole("abc"));
  KVS_ASSERT_OK(lease);
  EXPECT_EQ(lease->tokens(), 3);
  KVS_EXPECT_FAILS(lease->PageBytes(0), StatusCode::kFailedPrecondition, "shares no memory");
  EXPECT_TRUE(lease->Valid());
  EXPECT_EQ(client->Drain().code(), StatusCode::kFailedPrecondition);
  // Without a link, the next sign of life finds that nobody is there.
  client.reset();
  EXPECT_TRUE(service_.WaitForLeases(0));
}

TEST_F(LeaseTest, DrainIsAnsweredAndBegins) {
  std::atomic<int> asked = 0;
  StartServer({.on_drain = [&asked] { ++asked; }});
  const auto client = NewClient();
  EXPECT_TRUE(client->Drain().ok());
  EXPECT_TRUE(client->Drain().ok());
  EXPECT_EQ(asked, 1);
  // A held lease keeps no daemon from ending.
  const Result<Lease> lease = client->Acquire(Whole("abc"));
  KVS_ASSERT_OK(lease);
  server_->DrainAndStop();
  EXPECT_EQ(service_.leases(), 0);
}

TEST_F(LeaseTest, AServerThatCannotBeDrainedSaysSo) {
  StartServer();
  EXPECT_EQ(NewClient()->Drain().code(), StatusCode::kFailedPrecondition);
}

TEST_F(LeaseTest, ManyThreadsShareOneMapping) {
  StartServer();
  const auto client = NewClient();
  std::vector<std::thread> threads;
  std::atomic<int> right = 0;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 25; ++i) {
        const Result<Lease> lease = client->Acquire(Whole(std::to_string(t) + "/" + std::to_string(i)));
        if (!lease.ok()) continue;
        const auto bytes = lease->PageBytes(0);
        if (bytes.ok() && (*bytes)[17] == static_cast<std::byte>(EchoService::FillOf(0)) && lease->Valid()) ++right;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right, 200);
  EXPECT_EQ(server_->counters().memory_granted, 1);
  EXPECT_TRUE(service_.WaitForLeases(0));
}

}  // namespace
}  // namespace kvshare

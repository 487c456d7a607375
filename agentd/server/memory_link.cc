#include "agentd/server/memory_link.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <thread>
#include <utility>

#include "agentd/server/listener.h"
#include "libkvshare/core/hash.h"
#include "libkvshare/core/status_macros.h"
#include "protocol/handover.h"

namespace kvshare::agentd {
namespace {

constexpr std::size_t kTagBytes = 16;
constexpr std::size_t kSecretBytes = 32;
constexpr std::size_t kConnectionsMax = 1024;
constexpr std::chrono::milliseconds kClaimTimeout{1000};
constexpr int kAcceptsPerStep = 16;
constexpr std::chrono::milliseconds kAcceptPause{50};  // where descriptors have run out
// Some of them may wait for the engine's step, or the disk.
constexpr int kThreads = 8;

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_ = -1;
};

struct Connection {
  Fd fd;
  std::string name;                // empty until it has claimed
  std::unique_ptr<LinkPeer> peer;  // null until then
  MemoryLink::Clock::time_point claim_by;
  bool busy = false;  // a thread is at it, which alone may end it
};

// Each event is one thread's: descriptors are watched once (EPOLLONESHOT), and again when they have been served.
class SeqpacketLink final : public MemoryLink {
 public:
  SeqpacketLink(UnixListener listener, std::string path, const SharedPages& pages, PeerFactory new_peer)
      : listener_(std::move(listener)), path_(std::move(path)), pages_(pages), new_peer_(std::move(new_peer)) {}

  ~SeqpacketLink() override { Stop(); }

  Status Init() {
    if (::getrandom(secret_.data(), secret_.size(), 0) != static_cast<ssize_t>(secret_.size())) {
      return Unavailable(std::string("no randomness: ") + std::strerror(errno));
    }
    accept_fd_ = Fd(listener_->ReleaseFd());
    stop_fd_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    epoll_ = Fd(::epoll_create1(EPOLL_CLOEXEC));
    if (epoll_.get() < 0 || stop_fd_.get() < 0 || !Watch(EPOLL_CTL_ADD, accept_fd_.get()) ||
        !Watch(EPOLL_CTL_ADD, stop_fd_.get(), /*every_time=*/true)) {
      return Unavailable(std::string("no event descriptor: ") + std::strerror(errno));
    }
    return OkStatus();
  }

  void Start() override {
    for (int i = 0; i < kThreads; ++i) {
      threads_.emplace_back([this] {
        while (!stopping_) {
          HandleOne(unclaimed_ > 0 ? kClaimTimeout : std::chrono::milliseconds(-1));
          if (unclaimed_ > 0) CloseIdle(Clock::now());
        }
      });
    }
  }

  const std::string& path() const override { return path_; }

  std::vector<std::uint8_t> TicketFor(const std::string& peer) const override {
    std::vector<std::uint8_t> ticket(peer.begin(), peer.end());
    const std::array<std::uint8_t, kTagBytes> tag = TagOf(peer);
    ticket.insert(ticket.end(), tag.begin(), tag.end());
    return ticket;
  }

  void Stop() override {
    stopping_ = true;
    const std::uint64_t one = 1;
    // Never taken out again: every thread sees it.
    [[maybe_unused]] const ssize_t written = ::write(stop_fd_.get(), &one, sizeof one);
    for (std::thread& thread : std::exchange(threads_, {})) thread.join();
    const std::lock_guard lock(mu_);
    connections_.clear();
    listener_.reset();
    accept_fd_ = Fd();
  }

  bool HandleOne(std::chrono::milliseconds timeout) override {
    epoll_event event{};
    if (::epoll_wait(epoll_.get(), &event, 1, static_cast<int>(timeout.count())) != 1) return false;
    const int fd = event.data.fd;
    if (fd == stop_fd_.get()) return false;
    if (fd == accept_fd_.get()) {
      Accept();
      Watch(EPOLL_CTL_MOD, fd);
      return true;
    }
    Connection* connection = nullptr;
    {
      const std::lock_guard lock(mu_);
      const auto found = connections_.find(fd);
      // Ended since the event came, and perhaps another's by now.
      if (found == connections_.end() || found->second.busy) return true;
      connection = &found->second;
      connection->busy = true;
    }
    const bool stays = OnReadable(*connection);
    const std::lock_guard lock(mu_);
    connection->busy = false;
    if (!stays || !Watch(EPOLL_CTL_MOD, fd)) Close(fd);
    return true;
  }

  void CloseIdle(Clock::time_point now) override {
    const std::lock_guard lock(mu_);
    for (auto it = connections_.begin(); it != connections_.end();) {
      const auto& [fd, connection] = *it++;
      if (connection.busy || connection.peer != nullptr || now < connection.claim_by) continue;
      ++refused_;
      Close(fd);
    }
  }

  MemoryLinkCounters counters() const override { return {.granted = granted_, .refused = refused_}; }

 private:
  bool Watch(int operation, int fd, bool every_time = false) {
    epoll_event event{};
    event.events = EPOLLIN;
    if (!every_time) event.events |= EPOLLONESHOT;
    event.data.fd = fd;
    return ::epoll_ctl(epoll_.get(), operation, fd, &event) == 0;
  }

  std::array<std::uint8_t, kTagBytes> TagOf(const std::string& peer) const {
    DigestBuilder builder("memory-ticket");
    builder.Bytes(std::as_bytes(std::span(secret_))).Text(peer);
    const Digest digest = builder.Finish();
    std::array<std::uint8_t, kTagBytes> tag{};
    std::copy_n(digest.bytes.begin(), kTagBytes, tag.begin());
    return tag;
  }

  // The peer that `ticket` was made for.
  std::optional<std::string> PeerOf(std::span<const std::uint8_t> ticket) const {
    if (ticket.size() <= kTagBytes) return std::nullopt;
    const auto* name = reinterpret_cast<const char*>(ticket.data());
    std::string peer(name, ticket.size() - kTagBytes);
    const std::array<std::uint8_t, kTagBytes> tag = TagOf(peer);
    unsigned differs = 0;  // in the same time wherever the first difference lies
    for (std::size_t i = 0; i < kTagBytes; ++i) differs |= tag[i] ^ ticket[peer.size() + i];
    if (differs != 0) return std::nullopt;
    return peer;
  }

  void Accept() {
    for (int i = 0; i < kAcceptsPerStep; ++i) {
      Fd fd(::accept4(accept_fd_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
      if (fd.get() < 0) {
        // Who waits stays in the backlog and would be offered for ever; to this thread alone, until it looks again.
        if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
          std::this_thread::sleep_for(kAcceptPause);
        return;
      }
      ucred peer{};
      socklen_t size = sizeof peer;
      const bool known = ::getsockopt(fd.get(), SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0;
      const int number = fd.get();
      const std::lock_guard lock(mu_);
      if (!known || peer.uid != ::geteuid() || connections_.size() >= kConnectionsMax) {
        ++refused_;
        continue;
      }
      ++unclaimed_;
      connections_.emplace(number, Connection{.fd = std::move(fd), .claim_by = Clock::now() + kClaimTimeout});
      // After it is there to be found.
      if (!Watch(EPOLL_CTL_ADD, number)) Close(number);
    }
  }

  // False: the connection ends.
  bool OnReadable(Connection& connection) {
    // One byte more than there may be: a longer datagram is cut, and shows.
    thread_local std::vector<std::uint8_t> buffer(wire::kMaxLinkFrameBytes + 1);
    const ssize_t got = ::recv(connection.fd.get(), buffer.data(), buffer.size(), MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return true;
    if (got <= 0) return false;
    const std::span<const std::uint8_t> datagram(buffer.data(), static_cast<std::size_t>(got));
    if (connection.peer == nullptr) return OnClaim(connection, datagram);
    codec::Frame answer;
    if (datagram.size() > wire::kMaxLinkFrameBytes || !connection.peer->OnFrame(datagram, &answer)) return false;
    // A client that does not read what it asked for loses its connection: nothing is kept for it.
    return answer.empty() || Send(connection, answer);
  }

  bool OnClaim(Connection& connection, std::span<const std::uint8_t> datagram) {
    const auto ticket = wire::DecodeClaim(datagram);
    std::optional<std::string> name = ticket.has_value() ? PeerOf(*ticket) : std::nullopt;
    if (name.has_value()) {
      const std::lock_guard lock(mu_);
      if (!claimed_.insert(*name).second) name.reset();
    }
    if (!name.has_value()) {
      ++refused_;
      // Only a courtesy: whoever does not read it sees the end.
      Send(connection, wire::EncodeGrant({}));
      return false;
    }
    // Before the client may speak.
    std::unique_ptr<LinkPeer> peer = new_peer_(*name);
    {
      const std::lock_guard lock(mu_);
      connection.name = *std::move(name);
      connection.peer = std::move(peer);
      --unclaimed_;
    }
    ++granted_;
    return SendGrant(connection.fd.get());
  }

  static bool Send(const Connection& connection, std::span<const std::uint8_t> bytes) {
    return ::send(connection.fd.get(), bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL) ==
           static_cast<ssize_t>(bytes.size());
  }

  bool SendGrant(int fd) const {
    auto bytes = wire::EncodeGrant({.granted = true,
                                    .num_pages = static_cast<std::uint64_t>(pages_.num_pages),
                                    .page_bytes = static_cast<std::uint64_t>(pages_.layout.page_bytes)});
    const std::array<int, wire::kGrantDescriptors> fds = {pages_.memory_fd, pages_.generations_fd};
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof fds)> control{};
    iovec data{.iov_base = bytes.data(), .iov_len = bytes.size()};
    msghdr message{};
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fds);
    std::memcpy(CMSG_DATA(header), fds.data(), sizeof fds);
    return ::sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size());
  }

  // Requires: mu_ held.
  void Close(int fd) {
    const auto found = connections_.find(fd);
    if (found->second.peer == nullptr) {
      --unclaimed_;
    } else {
      claimed_.erase(found->second.name);
    }
    connections_.erase(found);
  }

  std::optional<UnixListener> listener_;
  const std::string path_;
  const SharedPages pages_;
  const PeerFactory new_peer_;
  std::array<std::uint8_t, kSecretBytes> secret_{};
  Fd accept_fd_;
  Fd stop_fd_;
  Fd epoll_;
  std::atomic<bool> stopping_ = false;
  std::atomic<std::int64_t> granted_ = 0;
  std::atomic<std::int64_t> refused_ = 0;
  std::atomic<int> unclaimed_ = 0;  // connections
  std::mutex mu_;
  std::map<int, Connection> connections_;  // by descriptor; a busy one's own thread reads it without mu_
  std::set<std::string> claimed_;
  std::vector<std::thread> threads_;
};

}  // namespace

Result<std::unique_ptr<MemoryLink>> MemoryLink::Open(const std::string& ipc_path, const SharedPages& pages,
                                                     PeerFactory new_peer) {
  if (pages.memory_fd < 0 || pages.generations_fd < 0 || pages.num_pages <= 0 || pages.layout.page_bytes <= 0) {
    return InvalidArgument("the daemon's KV memory is not of a kind that can be shared");
  }
  std::string path = ipc_path + ".shm";
  if (path.size() > wire::kMaxPathBytes) {
    return InvalidArgument("the path " + path + " is longer than a socket's may be");
  }
  KVS_ASSIGN_OR_RETURN(UnixListener listener, UnixListener::Listen(path, UnixSocketKind::kDatagrams));
  auto link = std::make_unique<SeqpacketLink>(std::move(listener), std::move(path), pages, std::move(new_peer));
  KVS_RETURN_IF_ERROR(link->Init());
  return std::unique_ptr<MemoryLink>(std::move(link));
}

}  // namespace kvshare::agentd

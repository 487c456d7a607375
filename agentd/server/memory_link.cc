#include "agentd/server/memory_link.h"

#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <map>
#include <optional>
#include <set>
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
constexpr int kEventsPerStep = 64;
constexpr int kAcceptsPerStep = 16;

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
  std::string peer;  // empty until it has claimed
  MemoryLink::Clock::time_point claim_by;
};

class SeqpacketLink final : public MemoryLink {
 public:
  SeqpacketLink(UnixListener listener, std::string path, const SharedPages& pages,
                std::function<void(const std::string&)> on_gone)
      : listener_(std::move(listener)), path_(std::move(path)), pages_(pages), on_gone_(std::move(on_gone)) {}

  Status Init() {
    if (::getrandom(secret_.data(), secret_.size(), 0) != static_cast<ssize_t>(secret_.size())) {
      return Unavailable(std::string("no randomness: ") + std::strerror(errno));
    }
    accept_fd_ = Fd(listener_.ReleaseFd());
    epoll_ = Fd(::epoll_create1(EPOLL_CLOEXEC));
    if (epoll_.get() < 0 || !Watch(accept_fd_.get())) {
      return Unavailable(std::string("no event descriptor: ") + std::strerror(errno));
    }
    return OkStatus();
  }

  const std::string& path() const override { return path_; }

  std::vector<std::uint8_t> TicketFor(const std::string& peer) const override {
    std::vector<std::uint8_t> ticket(peer.begin(), peer.end());
    const std::array<std::uint8_t, kTagBytes> tag = TagOf(peer);
    ticket.insert(ticket.end(), tag.begin(), tag.end());
    return ticket;
  }

  int poll_fd() const override { return epoll_.get(); }

  void Handle() override {
    std::array<epoll_event, kEventsPerStep> events{};
    const int count = ::epoll_wait(epoll_.get(), events.data(), kEventsPerStep, 0);
    for (int i = 0; i < count; ++i) {
      const int fd = events[static_cast<std::size_t>(i)].data.fd;
      if (fd == accept_fd_.get()) {
        Accept();
      } else if (const auto found = connections_.find(fd); found != connections_.end()) {
        OnReadable(found->second);
      }
    }
  }

  Clock::time_point CloseIdle(Clock::time_point now) override {
    Clock::time_point next = Clock::time_point::max();
    for (auto it = connections_.begin(); it != connections_.end();) {
      Connection& connection = (it++)->second;
      if (!connection.peer.empty()) continue;
      if (now >= connection.claim_by) {
        ++counters_.refused;
        Close(connection);
      } else {
        next = std::min(next, connection.claim_by);
      }
    }
    return next;
  }

  MemoryLinkCounters counters() const override { return counters_; }

 private:
  bool Watch(int fd) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.fd = fd;
    return ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0;
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
      if (fd.get() < 0) return;
      ucred peer{};
      socklen_t size = sizeof peer;
      const bool known = ::getsockopt(fd.get(), SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0;
      const int number = fd.get();
      if (!known || peer.uid != ::geteuid() || connections_.size() >= kConnectionsMax || !Watch(number)) {
        ++counters_.refused;
        continue;
      }
      connections_.emplace(number, Connection{.fd = std::move(fd), .claim_by = Clock::now() + kClaimTimeout});
    }
  }

  // A client says one thing, its claim. Anything more, and its end, end the connection.
  void OnReadable(Connection& connection) {
    // One byte more than a claim may have: a longer datagram is cut, and shows.
    std::array<std::uint8_t, wire::kMaxClaimBytes + 1> buffer{};
    const ssize_t got = ::recv(connection.fd.get(), buffer.data(), buffer.size(), MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got <= 0 || !connection.peer.empty()) return Close(connection);
    const auto ticket = wire::DecodeClaim({buffer.data(), static_cast<std::size_t>(got)});
    std::optional<std::string> peer = ticket.has_value() ? PeerOf(*ticket) : std::nullopt;
    if (!peer.has_value() || claimed_.count(*peer) != 0 || !SendGrant(connection.fd.get())) {
      ++counters_.refused;
      const auto refusal = wire::EncodeGrant({});
      // Only a courtesy: whoever does not read it sees the end.
      (void)::send(connection.fd.get(), refusal.data(), refusal.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
      return Close(connection);
    }
    ++counters_.granted;
    claimed_.insert(*peer);
    connection.peer = *std::move(peer);
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

  void Close(Connection& connection) {
    const std::string peer = std::move(connection.peer);
    connections_.erase(connection.fd.get());
    if (peer.empty()) return;
    claimed_.erase(peer);
    on_gone_(peer);
  }

  UnixListener listener_;
  const std::string path_;
  const SharedPages pages_;
  const std::function<void(const std::string&)> on_gone_;
  std::array<std::uint8_t, kSecretBytes> secret_{};
  Fd accept_fd_;
  Fd epoll_;
  std::map<int, Connection> connections_;  // by descriptor
  std::set<std::string> claimed_;
  MemoryLinkCounters counters_;
};

}  // namespace

Result<std::unique_ptr<MemoryLink>> MemoryLink::Open(const std::string& ipc_path, const SharedPages& pages,
                                                     std::function<void(const std::string&)> on_gone) {
  if (pages.memory_fd < 0 || pages.generations_fd < 0 || pages.num_pages <= 0 || pages.layout.page_bytes <= 0) {
    return InvalidArgument("the daemon's KV memory is not of a kind that can be shared");
  }
  std::string path = ipc_path + ".shm";
  if (path.size() > wire::kMaxPathBytes) {
    return InvalidArgument("the path " + path + " is longer than a socket's may be");
  }
  KVS_ASSIGN_OR_RETURN(UnixListener listener, UnixListener::Listen(path, UnixSocketKind::kDatagrams));
  auto link = std::make_unique<SeqpacketLink>(std::move(listener), std::move(path), pages, std::move(on_gone));
  KVS_RETURN_IF_ERROR(link->Init());
  return std::unique_ptr<MemoryLink>(std::move(link));
}

}  // namespace kvshare::agentd

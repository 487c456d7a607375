#include "libkvshare/client/mapped_pages.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>
#include <variant>

#include "libkvshare/core/status_macros.h"
#include "protocol/handover.h"

namespace kvshare::client_internal {
namespace {

using Clock = std::chrono::steady_clock;

Status Errno(const std::string& what) { return Unavailable(what + ": " + std::strerror(errno)); }

struct Received {
  wire::Grant grant;
  std::array<int, wire::kGrantDescriptors> fds{-1, -1};

  Received() = default;
  Received(const Received&) = delete;
  ~Received() {
    for (int fd : fds) {
      if (fd >= 0) ::close(fd);
    }
  }
};

Status WaitReadable(int fd, Clock::time_point deadline) {
  while (true) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    if (left <= 0) return Unavailable("the daemon did not hand over its memory in time");
    pollfd item{.fd = fd, .events = POLLIN, .revents = 0};
    const int ready = ::poll(&item, 1, static_cast<int>(std::min<long long>(left, 60000)));
    if (ready > 0) return OkStatus();
    if (ready < 0 && errno != EINTR) return Errno("waiting for the daemon's memory");
  }
}

Status Receive(int link, Received* received) {
  std::array<std::uint8_t, wire::kGrantBytes + 1> bytes{};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int) * wire::kGrantDescriptors)> control{};
  iovec data{.iov_base = bytes.data(), .iov_len = bytes.size()};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  const ssize_t got = ::recvmsg(link, &message, MSG_CMSG_CLOEXEC);
  if (got < 0) return Errno("receiving the daemon's memory");
  std::size_t count = 0;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t fds = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < fds && count < received->fds.size(); ++i) {
      std::memcpy(&received->fds[count++], CMSG_DATA(header) + i * sizeof(int), sizeof(int));
    }
  }
  if (got == 0) return Unavailable("the daemon closed the connection that hands over its memory");
  const auto grant = wire::DecodeGrant({bytes.data(), static_cast<std::size_t>(got)});
  if (!grant.has_value()) return FailedPrecondition("the daemon hands over its memory in another version's words");
  if (!grant->granted) return FailedPrecondition("the daemon refused to hand over its memory to this client");
  if (count != received->fds.size())
    return Unavailable("the daemon's memory did not come with its grant; is a descriptor left?");
  received->grant = *grant;
  return OkStatus();
}

// A file that may shrink would kill its readers by SIGBUS.
Result<const std::byte*> MapReadOnly(int fd, std::uint64_t bytes) {
  struct stat found {};
  const int seals = ::fcntl(fd, F_GET_SEALS);
  if (::fstat(fd, &found) != 0 || seals < 0 || (seals & F_SEAL_SHRINK) == 0 || found.st_size < 0 ||
      static_cast<std::uint64_t>(found.st_size) < bytes) {
    return FailedPrecondition("the daemon's memory is not sealed against shrinking, or smaller than it says");
  }
  const void* mapped = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED) return Errno("mapping the daemon's memory");
  return static_cast<const std::byte*>(mapped);
}

}  // namespace

Status MappedPages::Connect(const std::string& socket, Clock::time_point deadline) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (socket.size() >= sizeof address.sun_path) return InvalidArgument("the path " + socket + " is too long");
  std::memcpy(address.sun_path, socket.data(), socket.size());
  link_ = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (link_ < 0) return Errno("a unix socket");
  // A full backlog makes connect wait, but not for ever.
  const auto left = std::chrono::duration_cast<std::chrono::microseconds>(deadline - Clock::now()).count();
  if (left <= 0) return Unavailable("no time is left to ask for the daemon's memory");
  const timeval timeout{.tv_sec = static_cast<time_t>(left / 1000000),
                        .tv_usec = static_cast<suseconds_t>(left % 1000000)};
  (void)::setsockopt(link_, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
  if (::connect(link_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) return Errno(socket);
  ucred peer{};
  socklen_t size = sizeof peer;
  if (::getsockopt(link_, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0 || (peer.uid != ::geteuid() && peer.uid != 0)) {
    return FailedPrecondition("another user's process listens at " + socket);
  }
  return OkStatus();
}

Status MappedPages::Map(int memory_fd, int generations_fd) {
  const auto pages = static_cast<std::uint64_t>(num_pages_);
  KVS_ASSIGN_OR_RETURN(memory_, MapReadOnly(memory_fd, pages * static_cast<std::uint64_t>(page_bytes_)));
  KVS_ASSIGN_OR_RETURN(generations_, MapReadOnly(generations_fd, pages * sizeof(std::uint64_t)));
  return OkStatus();
}

Result<std::shared_ptr<MappedPages>> MappedPages::Claim(const std::string& socket,
                                                        const std::vector<std::uint8_t>& ticket,
                                                        Clock::time_point deadline) {
  std::shared_ptr<MappedPages> pages(new MappedPages);
  KVS_RETURN_IF_ERROR(pages->Connect(socket, deadline));
  const std::vector<std::uint8_t> claim = wire::EncodeClaim(ticket);
  if (::send(pages->link_, claim.data(), claim.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(claim.size())) {
    return Errno("asking for the daemon's memory");
  }
  KVS_RETURN_IF_ERROR(WaitReadable(pages->link_, deadline));
  Received received;
  KVS_RETURN_IF_ERROR(Receive(pages->link_, &received));
  pages->num_pages_ = static_cast<std::int64_t>(received.grant.num_pages);
  pages->page_bytes_ = static_cast<std::int64_t>(received.grant.page_bytes);
  KVS_RETURN_IF_ERROR(pages->Map(received.fds[0], received.fds[1]));
  return pages;
}

MappedPages::~MappedPages() {
  const auto unmap = [](const std::byte* start, std::int64_t bytes) {
    if (start != nullptr) ::munmap(const_cast<std::byte*>(start), static_cast<std::size_t>(bytes));
  };
  unmap(memory_, num_pages_ * page_bytes_);
  unmap(generations_, num_pages_ * static_cast<std::int64_t>(sizeof(std::uint64_t)));
  if (link_ >= 0) ::close(link_);
}

bool MappedPages::Holds(std::int64_t offset, std::int64_t page_bytes) const {
  return page_bytes == page_bytes_ && offset >= 0 && offset % page_bytes_ == 0 && offset / page_bytes_ < num_pages_;
}

std::span<const std::byte> MappedPages::Page(std::int64_t offset) const {
  return {memory_ + offset, static_cast<std::size_t>(page_bytes_)};
}

std::uint64_t MappedPages::Generation(std::int64_t offset) const {
  std::atomic_thread_fence(std::memory_order_acquire);
  const auto* generation = reinterpret_cast<const std::atomic<std::uint64_t>*>(generations_) + offset / page_bytes_;
  return generation->load(std::memory_order_acquire);
}

bool MappedPages::Send(const codec::Frame& frame) {
  if (broken_ || frame.size() > wire::kMaxLinkFrameBytes) return false;
  const ssize_t sent = ::send(link_, frame.data(), frame.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
  if (sent < 0 && errno != EAGAIN && errno != EMSGSIZE && errno != ENOBUFS && errno != EINTR) broken_ = true;
  return sent == static_cast<ssize_t>(frame.size());
}

bool MappedPages::Post(const codec::Request& request) {
  const Result<codec::Frame> frame = codec::EncodeRequest(0, request);
  return frame.ok() && Send(*frame);
}

std::optional<Result<codec::Reply>> MappedPages::Ask(const codec::Request& request, Clock::time_point deadline) {
  const std::unique_lock lock(asking_, std::try_to_lock);
  if (!lock.owns_lock() || broken_) return std::nullopt;
  reply_.resize(wire::kMaxLinkReplyBytes + 1);
  if (late_) {
    // A daemon that cannot be rid of its answers closes the link.
    ssize_t got = 0;
    while ((got = ::recv(link_, reply_.data(), reply_.size(), MSG_DONTWAIT)) > 0) {
    }
  }
  const std::uint64_t correlation = ++last_correlation_;
  const Result<codec::Frame> frame = codec::EncodeRequest(correlation, request);
  if (!frame.ok()) return Result<codec::Reply>(frame.status());
  if (!Send(*frame)) return std::nullopt;
  std::optional<Result<codec::Reply>> reply = WaitReply(correlation, deadline);
  // The request is there already: the daemon reads these in order.
  if (!reply.has_value() || !reply->ok()) Post(codec::Cancel{.target = correlation});
  if (!reply.has_value()) {
    late_ = true;
    return Result<codec::Reply>(DeadlineExceeded("the daemon did not answer in time"));
  }
  const Status* error = reply->ok() ? std::get_if<Status>(&**reply) : nullptr;
  if (error != nullptr && error->code() == StatusCode::kUnimplemented) return std::nullopt;
  return reply;
}

std::optional<Result<codec::Reply>> MappedPages::WaitReply(std::uint64_t correlation, Clock::time_point deadline) {
  wire::ReceivedFrame received;
  while (WaitReadable(link_, deadline).ok()) {
    const ssize_t got = ::recv(link_, reply_.data(), reply_.size(), MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (got <= 0) {
      broken_ = true;
      return Result<codec::Reply>(Unavailable("the daemon went away"));
    }
    const auto fault = received.Load({reply_.data(), static_cast<std::size_t>(got)}, wire::FrameKind::kReply);
    if (fault != wire::FrameFault::kNone) {
      broken_ = true;
      return Result<codec::Reply>(codec::FaultStatus(fault, received.header(), "daemon"));
    }
    if (received.header().correlation == correlation) return codec::DecodeReply(*received.reply());
  }
  return std::nullopt;
}

void MappedPages::CloseLink() { (void)::shutdown(link_, SHUT_RDWR); }

}  // namespace kvshare::client_internal

// A client of the memory link by hand, for tests of what no good client sends.
#pragma once

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "protocol/handover.h"

namespace kvshare::agentd::testing_link {

using Bytes = std::vector<std::uint8_t>;

class RawLink {
 public:
  explicit RawLink(const std::string& path) : fd_(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.data(), path.size());
    connected_ = ::connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
    const timeval timeout{.tv_sec = 20, .tv_usec = 0};
    ::setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
  }
  ~RawLink() { ::close(fd_); }
  RawLink(const RawLink&) = delete;
  RawLink& operator=(const RawLink&) = delete;

  bool connected() const { return connected_; }
  // False: the connection has ended.
  bool Send(const Bytes& bytes) {
    return ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size());
  }
  struct Answer {
    std::optional<wire::Grant> grant;  // nullopt: the connection ended
    bool descriptors = false;
  };
  // A frame; empty when the connection has ended.
  Bytes ReceiveFrame() {
    Bytes bytes(wire::kMaxLinkReplyBytes + 1);
    const ssize_t got = ::recv(fd_, bytes.data(), bytes.size(), 0);
    bytes.resize(got > 0 ? static_cast<std::size_t>(got) : 0);
    return bytes;
  }
  Answer Receive() {
    Bytes bytes(64);
    std::array<char, 64> control{};
    iovec data{.iov_base = bytes.data(), .iov_len = bytes.size()};
    msghdr message{};
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    const ssize_t got = ::recvmsg(fd_, &message, MSG_CMSG_CLOEXEC);
    if (got <= 0) return {};
    bytes.resize(static_cast<std::size_t>(got));
    Answer answer{.grant = wire::DecodeGrant(bytes)};
    if (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr) {
      answer.descriptors = true;
      for (std::size_t i = 0; i < (header->cmsg_len - CMSG_LEN(0)) / sizeof(int); ++i) {
        int fd = -1;
        std::memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof fd);
        ::close(fd);
      }
    }
    return answer;
  }

 private:
  int fd_ = -1;
  bool connected_ = false;
};

}  // namespace kvshare::agentd::testing_link

// Taking an endpoint for a daemon: nobody else's socket is stolen, a dead one's file is removed, and an ipc socket is
// this user's alone from its first moment.
#pragma once

#include <sys/types.h>

#include <string>

#include "kvshare/status.h"

namespace kvshare::agentd {

enum class UnixSocketKind {
  kStream,
  kDatagrams,  // SOCK_SEQPACKET: connected, in order, with boundaries
};

// A bound, listening AF_UNIX socket and the file it made. The file goes with this object, unless another took its
// place.
class UnixListener {
 public:
  // Returns: Unavailable when a process answers there, when something else than a socket stands there, or when the
  // folder refuses.
  static Result<UnixListener> Listen(const std::string& path, UnixSocketKind kind = UnixSocketKind::kStream);

  UnixListener(UnixListener&& other) noexcept;
  UnixListener& operator=(UnixListener&&) = delete;
  ~UnixListener();

  // The descriptor, which is the caller's to close from now on.
  int ReleaseFd();

 private:
  UnixListener() = default;
  std::string path_;
  int fd_ = -1;
  dev_t device_ = 0;
  ino_t inode_ = 0;
};

}  // namespace kvshare::agentd

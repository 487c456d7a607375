#include "agentd/server/listener.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <thread>
#include <utility>

namespace kvshare::agentd {
namespace {

constexpr int kBacklog = 128;

Status Refused(const std::string& path, const std::string& why) {
  return Unavailable("cannot listen on ipc://" + path + ": " + why);
}

int UnixSocket(UnixSocketKind kind) {
  const int type = kind == UnixSocketKind::kStream ? SOCK_STREAM : SOCK_SEQPACKET;
  return ::socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
}

// Requires: the path fits (ParseEndpoint has checked it).
sockaddr_un Address(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), std::min(path.size(), sizeof address.sun_path - 1));
  return address;
}

// Whether a process listens there: a full backlog (EAGAIN) counts, a file without a process (ECONNREFUSED) does not.
// Where it cannot be asked it may.
bool Answers(const sockaddr_un& address, UnixSocketKind kind) {
  const int fd = UnixSocket(kind);
  if (fd < 0) return true;
  const int connected = ::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address);
  const int error = errno;
  ::close(fd);
  return connected == 0 || error == EAGAIN || error == EINPROGRESS || error == EACCES ||
         error == EPROTOTYPE;  // somebody listens, for another kind
}

// Of two daemons that find a dead one's socket at once, the second would remove the first one's: one at a time looks
// and binds in a folder. Where that cannot be locked, or not within a second, they take the chance.
class FolderLock {
 public:
  explicit FolderLock(const std::filesystem::path& path)
      : fd_(::open(std::filesystem::absolute(path).parent_path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
    for (int i = 0; fd_ >= 0 && i < 100 && ::flock(fd_, LOCK_EX | LOCK_NB) != 0; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  }
  ~FolderLock() {
    if (fd_ >= 0) ::close(fd_);
  }
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  const int fd_;
};

}  // namespace

Result<UnixListener> UnixListener::Listen(const std::string& path, UnixSocketKind kind) {
  const sockaddr_un address = Address(path);
  const FolderLock lock(path);
  struct stat found {};
  if (::lstat(path.c_str(), &found) == 0) {
    if (!S_ISSOCK(found.st_mode)) {
      return Refused(path, "there is a file that is not a socket; remove it or choose another path");
    }
    if (Answers(address, kind)) {
      return Refused(path, "another process answers there; stop it or choose another path");
    }
    ::unlink(path.c_str());  // of a daemon that is gone
  }
  UnixListener listener;
  listener.fd_ = UnixSocket(kind);
  if (listener.fd_ < 0) return Refused(path, std::strerror(errno));
  // On Linux the socket's own mode becomes its file's: no moment in which others may connect.
  if (::fchmod(listener.fd_, 0600) != 0 ||
      ::bind(listener.fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    return Refused(path, std::string(std::strerror(errno)) + "; does the folder exist, and may you write there?");
  }
  listener.path_ = path;
  if (::lstat(path.c_str(), &found) != 0 || ::listen(listener.fd_, kBacklog) != 0) {
    return Refused(path, std::strerror(errno));
  }
  listener.device_ = found.st_dev;
  listener.inode_ = found.st_ino;
  return listener;
}

UnixListener::UnixListener(UnixListener&& other) noexcept
    : path_(std::exchange(other.path_, std::string())),
      fd_(std::exchange(other.fd_, -1)),
      device_(other.device_),
      inode_(other.inode_) {}

UnixListener::~UnixListener() {
  if (fd_ >= 0) ::close(fd_);
  if (path_.empty()) return;
  struct stat found {};
  if (::lstat(path_.c_str(), &found) != 0 || found.st_dev != device_ || found.st_ino != inode_) return;
  ::unlink(path_.c_str());
}

int UnixListener::ReleaseFd() { return std::exchange(fd_, -1); }

}  // namespace kvshare::agentd

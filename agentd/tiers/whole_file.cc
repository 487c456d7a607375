#include "agentd/tiers/whole_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>

#include "agentd/tiers/fault_points.h"

namespace kvshare::agentd {

using anchors::AnchorFault;

bool WriteWhole(const std::string& path, std::span<const std::byte> bytes, bool sync) {
  const std::string unfinished = path + kUnfinished;
  const int fd = open(unfinished.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd < 0) return false;
  bool good = true;
  while (good && !bytes.empty()) {
    const ssize_t written = write(fd, bytes.data(), std::min<std::size_t>(bytes.size(), std::size_t{1} << 30));
    if (written < 0 && errno == EINTR) continue;
    good = written > 0;
    if (good) bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
  good = good && (!sync || fdatasync(fd) == 0);
  good = close(fd) == 0 && good;
  FaultPoint("anchors.before_rename");
  good = good && rename(unfinished.c_str(), path.c_str()) == 0;
  if (!good) unlink(unfinished.c_str());
  return good;
}

std::optional<std::vector<std::byte>> ReadWhole(const std::string& path, std::int64_t max_bytes, AnchorFault* fault) {
  *fault = AnchorFault::kNone;
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
  if (fd < 0) {
    if (errno != ENOENT && errno != ENOTDIR) *fault = AnchorFault::kUnreadable;
    return std::nullopt;
  }
  struct stat info {};
  std::optional<std::vector<std::byte>> bytes;
  if (fstat(fd, &info) != 0) {
    *fault = AnchorFault::kUnreadable;
  } else if (!S_ISREG(info.st_mode) || info.st_size > max_bytes) {
    *fault = AnchorFault::kDamaged;  // not what was written here
  } else {
    bytes.emplace(static_cast<std::size_t>(info.st_size));
    std::size_t have = 0;
    while (have < bytes->size()) {
      const ssize_t got = read(fd, bytes->data() + have, bytes->size() - have);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) break;
      have += static_cast<std::size_t>(got);
    }
    if (have < bytes->size()) {
      *fault = AnchorFault::kUnreadable;
      bytes.reset();
    }
  }
  close(fd);
  return bytes;
}

}  // namespace kvshare::agentd

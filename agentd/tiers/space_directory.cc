#include "agentd/tiers/space_directory.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <regex>
#include <system_error>
#include <utility>
#include <vector>

#include "agentd/tiers/cold_index.h"
#include "agentd/tiers/record.h"

namespace kvshare::agentd {
namespace {

namespace fs = std::filesystem;

struct Disk {
  std::int64_t free = 0;     // to us
  std::int64_t reserve = 0;  // not for us: 5 %, at most 1 GiB
};

// A disk that cannot be asked has no room, and is not full either.
Disk DiskOf(const std::string& directory) {
  struct statvfs info {};
  if (statvfs(directory.c_str(), &info) != 0) return {};
  const auto unit = static_cast<std::int64_t>(info.f_frsize);
  const std::int64_t total = static_cast<std::int64_t>(info.f_blocks) * unit;
  return {.free = static_cast<std::int64_t>(info.f_bavail) * unit,
          .reserve = std::min(total / 20, std::int64_t{1} << 30)};
}

std::uint64_t ShortName(const Digest& digest) { return DigestHash()(digest); }

// Only directories that carry our kind of name are ours to delete.
bool IsSpaceName(const std::string& name) {
  static const std::regex pattern("space-[0-9a-f]{32}-[0-9]{1,12}");
  return std::regex_match(name, pattern);
}

}  // namespace

std::int64_t DirectoryBytes(const std::string& directory) {
  std::int64_t bytes = 0;
  std::error_code error;
  for (fs::recursive_directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    struct stat info {};
    if (lstat(it->path().c_str(), &info) == 0) bytes += std::int64_t{info.st_blocks} * 512;
  }
  return bytes;
}

std::int64_t FreeBytesBeyondReserve(const std::string& directory) {
  const Disk disk = DiskOf(directory);
  return disk.free - disk.reserve;
}

bool DiskIsFull(const std::string& directory) {
  const Disk disk = DiskOf(directory);
  return disk.free < std::min(disk.reserve / 2, std::int64_t{16} << 20);
}

std::string SpaceDirectoryName(const Digest& space, std::size_t page_bytes) {
  return "space-" + space.Hex().substr(0, 32) + "-" + std::to_string(page_bytes);
}

Result<std::unique_ptr<DirectoryLock>> DirectoryLock::Take(const std::string& directory) {
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) {
    const std::string message = directory + ": the cold tier's directory cannot be made: " + error.message();
    return error == std::errc::no_space_on_device ? Unavailable(message) : InvalidArgument(message);
  }
  const std::string path = directory + "/LOCK";
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd < 0) {
    const int cause = errno;
    const std::string message = path + ": cannot be opened: " + std::strerror(cause);
    return cause == ENOSPC ? Unavailable(message) : InvalidArgument(message);
  }
  if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
    const int cause = errno;
    close(fd);
    if (cause != EWOULDBLOCK) return InvalidArgument(path + ": cannot be locked: " + std::strerror(cause));
    return FailedPrecondition(directory + ": another process uses this cold tier; stop it or name another directory");
  }
  return std::unique_ptr<DirectoryLock>(new DirectoryLock(fd));
}

DirectoryLock::~DirectoryLock() { close(fd_); }

void MarkUsed(const std::string& space_directory) {
  const std::string path = space_directory + "/USED";
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd < 0) return;  // the order of deletion is all that suffers
  static_cast<void>(futimens(fd, nullptr));
  close(fd);
}

ForeignSpaces::ForeignSpaces(std::string directory, std::string own_name) : directory_(std::move(directory)) {
  std::error_code error;
  for (fs::directory_iterator it(directory_, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (name == own_name || !IsSpaceName(name)) continue;
    Space& space = spaces_[it->path().string()];
    space.bytes = DirectoryBytes(it->path().string());
    struct stat info {};
    if (stat((it->path() / "USED").c_str(), &info) == 0) {
      space.used_at = std::int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec;
    }
  }
  if (!spaces_.empty()) reader_ = std::thread([this] { ReadIndexes(); });
}

ForeignSpaces::~ForeignSpaces() {
  stop_ = true;
  WaitUntilRead();
}

void ForeignSpaces::WaitUntilRead() {
  if (reader_.joinable()) reader_.join();
}

void ForeignSpaces::ReadIndexes() {
  std::vector<std::string> paths;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [path, space] : spaces_) paths.push_back(path);
  }
  for (const std::string& path : paths) {
    const std::lock_guard disk_lock(disk_mutex_);
    std::unordered_set<std::uint64_t> content;
    // A damaged index explains fewer misses, no more.
    static_cast<void>(ColdIndex::ReadOnly(path + "/index", [&](std::string_view key, std::string_view value) {
      const auto entry = DecodeIndexValue(key, value);
      if (entry.ok() && entry->page.content_chain != Digest{}) content.insert(ShortName(entry->page.content_chain));
      return !stop_;
    }));
    const std::lock_guard lock(mutex_);
    const auto space = spaces_.find(path);
    if (space != spaces_.end()) space->second.content = std::move(content);
    if (stop_) return;
  }
}

std::int64_t ForeignSpaces::bytes() const {
  const std::lock_guard lock(mutex_);
  std::int64_t bytes = 0;
  for (const auto& [path, space] : spaces_) bytes += space.bytes;
  return bytes;
}

bool ForeignSpaces::DeleteOldest() {
  const std::lock_guard disk_lock(disk_mutex_);
  std::string path;
  {
    const std::lock_guard lock(mutex_);
    const auto oldest = std::min_element(spaces_.begin(), spaces_.end(), [](const auto& a, const auto& b) {
      return a.second.used_at < b.second.used_at;
    });
    if (oldest == spaces_.end()) return false;
    path = oldest->first;
    spaces_.erase(oldest);
  }
  std::error_code ignored;  // what cannot be deleted is counted, and tried again, at the next start
  fs::remove_all(path, ignored);
  return true;
}

bool ForeignSpaces::Holds(const Digest& content_chain) const {
  const std::lock_guard lock(mutex_);
  return std::any_of(spaces_.begin(), spaces_.end(),
                     [&](const auto& item) { return item.second.content.count(ShortName(content_chain)) > 0; });
}

}  // namespace kvshare::agentd

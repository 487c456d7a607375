#include "agentd/tiers/slab_store.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "agentd/tiers/record.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {
namespace {

constexpr std::uint64_t kFileBytes = std::uint64_t{1} << 30;

Status DiskError(const std::string& file, const char* what, int error) {
  const std::string message = file + ": " + what + ": " + std::strerror(error);
  return error == ENOSPC || error == EDQUOT || error == EFBIG ? ResourceExhausted(message) : Unavailable(message);
}

// The number of a slab file, or -1 for any other name.
long SlabNumber(const std::string& name) {
  if (name.size() != 16 || name.rfind("slab-", 0) != 0 || name.substr(11) != ".slab") return -1;
  long number = -1;
  const auto [end, error] = std::from_chars(name.data() + 5, name.data() + 11, number);
  return error == std::errc{} && end == name.data() + 11 ? number : -1;
}

}  // namespace

SlabStore::SlabStore(std::string directory, std::size_t slot_bytes)
    : directory_(std::move(directory)),
      slot_bytes_(slot_bytes),
      slots_per_file_(std::max<std::uint64_t>(1, kFileBytes / slot_bytes)) {}

SlabStore::~SlabStore() {
  for (const int fd : files_) close(fd);
}

Result<std::unique_ptr<SlabStore>> SlabStore::Open(const std::string& directory, std::size_t slot_bytes,
                                                   std::uint64_t max_slots) {
  KVS_CHECK(slot_bytes > 0 && slot_bytes % kRecordAlign == 0);
  std::unique_ptr<SlabStore> store(new SlabStore(directory, slot_bytes));
  std::error_code error;
  long last = -1;
  for (std::filesystem::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    last = std::max(last, SlabNumber(it->path().filename().string()));
  }
  if (error) return Unavailable(directory + ": " + error.message());
  for (std::size_t file = 0; static_cast<long>(file) <= last; ++file) {
    KVS_RETURN_IF_ERROR(store->OpenFile(file));
    struct stat info {};
    if (fstat(store->files_[file], &info) != 0) return DiskError(store->FileName(file), "stat", errno);
    std::uint64_t found = std::min(static_cast<std::uint64_t>(info.st_size) / slot_bytes, store->slots_per_file_);
    const bool is_last = static_cast<long>(file) == last;
    const bool may_be_whole = (file + 1) * store->slots_per_file_ <= max_slots;
    if (!is_last && found < store->slots_per_file_ && may_be_whole &&
        store->Allocate(file, store->slots_per_file_).ok()) {
      found = store->slots_per_file_;
    }
    store->slots_ = file * store->slots_per_file_ + found;
    if (!is_last && found < store->slots_per_file_) {
      KVS_RETURN_IF_ERROR(store->Shrink(store->slots_));
      for (long beyond = static_cast<long>(file) + 1; beyond <= last; ++beyond) {
        unlink(store->FileName(static_cast<std::size_t>(beyond)).c_str());
      }
      break;
    }
  }
  return store;
}

std::string SlabStore::FileName(std::size_t file) const {
  char name[32];
  std::snprintf(name, sizeof name, "slab-%06zu.slab", file);
  return directory_ + "/" + name;
}

Status SlabStore::OpenFile(std::size_t file) {
  KVS_CHECK(file == files_.size());
  const std::string name = FileName(file);
  constexpr int kFlags = O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW;
  int fd = direct_ ? open(name.c_str(), kFlags | O_DIRECT, 0600) : -1;
  if (fd < 0) {
    direct_ = false;
    fd = open(name.c_str(), kFlags, 0600);
  }
  if (fd < 0) return DiskError(name, "cannot be opened", errno);
  files_.push_back(fd);
  return OkStatus();
}

Status SlabStore::Allocate(std::size_t file, std::uint64_t slots) {
  const auto bytes = static_cast<off_t>(slots * slot_bytes_);
  if (fallocate(files_[file], 0, 0, bytes) == 0) return OkStatus();
  const int error = errno;
  // Without fallocate the file is sparse, and a full disk shows when a slot is written.
  if (error == EOPNOTSUPP && ftruncate(files_[file], bytes) == 0) return OkStatus();
  return DiskError(FileName(file), "cannot grow", error);
}

std::uint64_t SlabStore::slots() const {
  const std::lock_guard lock(mutex_);
  return slots_;
}

bool SlabStore::direct() const {
  const std::lock_guard lock(mutex_);
  return direct_;
}

Result<std::uint64_t> SlabStore::Grow(std::uint64_t count) {
  const std::lock_guard lock(mutex_);
  const std::size_t file = slots_ / slots_per_file_;
  const std::uint64_t used = slots_ % slots_per_file_;
  const std::uint64_t added = std::min(count, slots_per_file_ - used);
  if (file == files_.size()) KVS_RETURN_IF_ERROR(OpenFile(file));
  const Status status = Allocate(file, used + added);
  if (!status.ok()) {
    // What a failed fallocate left behind is not ours to use, and others may need it.
    const bool returned = ftruncate(files_[file], static_cast<off_t>(used * slot_bytes_)) == 0;
    return returned ? status : status.WithContext("and what was allocated cannot be given back");
  }
  slots_ += added;
  return added;
}

Status SlabStore::Shrink(std::uint64_t slots) {
  const std::lock_guard lock(mutex_);
  slots_ = std::min(slots_, slots);
  const std::uint64_t keep = (slots_ + slots_per_file_ - 1) / slots_per_file_;
  while (files_.size() > keep) {
    close(files_.back());
    files_.pop_back();
    if (unlink(FileName(files_.size()).c_str()) != 0) return DiskError(FileName(files_.size()), "unlink", errno);
  }
  if (files_.empty()) return OkStatus();
  const auto bytes = static_cast<off_t>((slots_ - (files_.size() - 1) * slots_per_file_) * slot_bytes_);
  if (ftruncate(files_.back(), bytes) != 0) return DiskError(FileName(files_.size() - 1), "truncate", errno);
  return OkStatus();
}

Result<SlabStore::Place> SlabStore::Find(std::uint64_t slot) const {
  const std::lock_guard lock(mutex_);
  if (slot >= slots_) return Unavailable(directory_ + ": there is no slot " + std::to_string(slot));
  return Place{files_[slot / slots_per_file_], static_cast<off_t>(slot % slots_per_file_ * slot_bytes_)};
}

// Calls transfer(fd, offset in the file, done) until `bytes` are done, from `offset` in the slot on.
template <typename Transfer>
Status SlabStore::Repeat(std::uint64_t slot, std::size_t offset, std::size_t bytes, Transfer transfer) {
  KVS_ASSIGN_OR_RETURN(const Place place, Find(slot));
  std::size_t done = 0;
  bool refused = false;
  while (done < bytes) {
    const ssize_t n = transfer(place.fd, place.offset + static_cast<off_t>(offset + done), done);
    if (n > 0) {
      done += static_cast<std::size_t>(n);
    } else if (n < 0 && errno == EINVAL) {
      // Some filesystems open a file for direct I/O and refuse the I/O itself.
      const int flags = fcntl(place.fd, F_GETFL);
      // Another thread may have met the same and be a moment ahead: once more, then.
      const bool again = !std::exchange(refused, true);
      if (!again || fcntl(place.fd, F_SETFL, flags & ~O_DIRECT) != 0) {
        return DiskError(FileName(slot / slots_per_file_), "I/O", EINVAL);
      }
      const std::lock_guard lock(mutex_);
      direct_ = false;
    } else if (n == 0 || errno != EINTR) {
      return DiskError(FileName(slot / slots_per_file_), "I/O", n == 0 ? EIO : errno);
    }
  }
  return OkStatus();
}

Status SlabStore::Write(std::uint64_t slot, std::span<const std::byte> record) {
  KVS_CHECK(record.size() <= slot_bytes_);
  return Repeat(slot, 0, record.size(), [&](int fd, off_t offset, std::size_t done) {
    return pwrite(fd, record.data() + done, record.size() - done, offset);
  });
}

Status SlabStore::Read(std::uint64_t slot, std::size_t offset, std::span<std::byte> first,
                       std::span<std::byte> second) {
  KVS_CHECK(offset + first.size() + second.size() <= slot_bytes_);
  return Repeat(slot, offset, first.size() + second.size(), [&](int fd, off_t at, std::size_t done) {
    const std::size_t in_first = std::min(done, first.size());
    const std::size_t in_second = done - in_first;
    const iovec parts[2] = {{first.data() + in_first, first.size() - in_first},
                            {second.data() + in_second, second.size() - in_second}};
    const bool skip = in_first == first.size();
    return preadv(fd, parts + (skip ? 1 : 0), skip || second.empty() ? 1 : 2, at);
  });
}

Status SlabStore::Sync() {
  std::vector<int> files;
  {
    const std::lock_guard lock(mutex_);
    files = files_;
  }
  for (std::size_t i = 0; i < files.size(); ++i) {
    if (fdatasync(files[i]) != 0) return DiskError(FileName(i), "sync", errno);
  }
  return OkStatus();
}

Status SlabStore::DeleteAll() { return Shrink(0); }

}  // namespace kvshare::agentd

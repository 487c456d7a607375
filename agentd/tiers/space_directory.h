// The cold tier's directory: one process at a time, one sub-directory per space.
//
//   DIR/LOCK                               held (flock) while a tier is open
//   DIR/space-<hex of space>-<page bytes>/ slab-*.slab  index/  index.damaged/  USED
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>

#include "kvshare/status.h"
#include "libkvshare/core/hash.h"

namespace kvshare::agentd {

// Bytes that the files under `directory` occupy, now. Files that vanish meanwhile count as nothing.
std::int64_t DirectoryBytes(const std::string& directory);

// Free bytes of the filesystem beyond the reserve that the tier leaves to others: 5 % of it, at most 1 GiB. May be
// negative.
std::int64_t FreeBytesBeyondReserve(const std::string& directory);

// So little is free, half of the reserve or 16 MiB, that nothing should be written at all: RocksDB recovers from a
// failed write when it can, and it is better never to ask it to.
bool DiskIsFull(const std::string& directory);

std::string SpaceDirectoryName(const Digest& space, std::size_t page_bytes);

// Exclusive use of a directory, given up by destruction or by the process's end, whatever ends it.
class DirectoryLock {
 public:
  // Creates the directory. InvalidArgument when it cannot be used, FailedPrecondition when another has it.
  static Result<std::unique_ptr<DirectoryLock>> Take(const std::string& directory);
  ~DirectoryLock();
  DirectoryLock(const DirectoryLock&) = delete;
  DirectoryLock& operator=(const DirectoryLock&) = delete;

 private:
  explicit DirectoryLock(int fd) : fd_(fd) {}
  const int fd_;
};

// Marks a space's directory as used now, for the order in which foreign spaces are deleted.
void MarkUsed(const std::string& space_directory);

// The spaces of a directory other than one's own. Thread-safe.
class ForeignSpaces {
 public:
  // Starts to read their indexes in the background.
  ForeignSpaces(std::string directory, std::string own_name);
  ~ForeignSpaces();

  std::int64_t bytes() const;  // occupied, as last measured
  // Deletes the one used least recently. False when there is none.
  bool DeleteOldest();
  // Whether one of them stores a page with this content chain, as far as their indexes have been read.
  bool Holds(const Digest& content_chain) const;
  void WaitUntilRead();

 private:
  struct Space {
    std::int64_t bytes = 0;
    std::int64_t used_at = 0;                   // the time that MarkUsed left, ns since the epoch
    std::unordered_set<std::uint64_t> content;  // first 8 bytes of content chains: enough to explain a miss
  };
  void ReadIndexes();

  const std::string directory_;
  std::mutex disk_mutex_;  // held while a space is read or deleted; before mutex_
  mutable std::mutex mutex_;
  std::unordered_map<std::string, Space> spaces_;  // by directory
  std::atomic<bool> stop_{false};
  std::thread reader_;
};

}  // namespace kvshare::agentd

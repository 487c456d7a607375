// SlabStore: numbered slots of one size in pre-allocated files, read and written past the page cache. It knows nothing
// of what lies in a slot, and which slots are free is its owner's business.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "kvshare/status.h"

namespace kvshare::agentd {

// Slot s lies in file slab-%06d.slab number s / slots_per_file, at s % slots_per_file * slot_bytes. All files but the
// last are full. Thread-safe, but for DeleteAll, which nothing may run beside.
class SlabStore {
 public:
  // Finds the files there are. Missing or short ones between others are made whole (their slots then hold zeros), or
  // what follows them is deleted where the disk has no room, or they would have slots beyond `max_slots`. `slot_bytes`
  // is a multiple of 4096.
  static Result<std::unique_ptr<SlabStore>> Open(const std::string& directory, std::size_t slot_bytes,
                                                 std::uint64_t max_slots);
  ~SlabStore();
  SlabStore(const SlabStore&) = delete;
  SlabStore& operator=(const SlabStore&) = delete;

  std::size_t slot_bytes() const { return slot_bytes_; }
  std::uint64_t slots() const;
  std::int64_t allocated_bytes() const { return static_cast<std::int64_t>(slots() * slot_bytes_); }
  // Whether I/O goes past the page cache, which some filesystems refuse.
  bool direct() const;

  // Adds 1..count slots (fewer where a file ends) whose space the disk has promised, and returns how many.
  // ResourceExhausted when the disk has none.
  Result<std::uint64_t> Grow(std::uint64_t count);
  // Keeps the first `slots` slots.
  Status Shrink(std::uint64_t slots);

  // Buffers are aligned to 4096 and multiples of it in size. Unavailable, naming the file, when the disk fails;
  // ResourceExhausted when it is full.
  Status Write(std::uint64_t slot, std::span<const std::byte> record);
  // Reads the slot from `offset` on, a multiple of 4096, into `first` and what follows into `second` (may be empty).
  Status Read(std::uint64_t slot, std::size_t offset, std::span<std::byte> first, std::span<std::byte> second);
  // Everything written so far survives a power cut.
  Status Sync();
  Status DeleteAll();

 private:
  SlabStore(std::string directory, std::size_t slot_bytes);
  struct Place {
    int fd;
    off_t offset;
  };
  Result<Place> Find(std::uint64_t slot) const;
  std::string FileName(std::size_t file) const;
  Status OpenFile(std::size_t file);
  Status Allocate(std::size_t file, std::uint64_t slots);
  template <typename Transfer>
  Status Repeat(std::uint64_t slot, std::size_t offset, std::size_t bytes, Transfer transfer);

  const std::string directory_;
  const std::size_t slot_bytes_;
  const std::uint64_t slots_per_file_;
  mutable std::mutex mutex_;
  std::vector<int> files_;
  std::uint64_t slots_ = 0;
  bool direct_ = true;
};

}  // namespace kvshare::agentd

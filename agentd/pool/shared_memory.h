// SharedMemory: memory that other processes may map read-only and that only this one ever writes.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "kvshare/status.h"

namespace kvshare::agentd {

// A memfd, mapped here for writing before it is sealed: from then on nobody can map it for writing, write to it, or
// change its size, whatever descriptor they get or open; so a reader never meets SIGBUS, and never a forged byte.
class SharedMemory {
 public:
  // `bytes` of zeroes. The first `allocate_bytes` are allocated now, so that a machine without them says so here, and
  // not by a signal later. ResourceExhausted without memory; Unimplemented where the kernel has no sealed memfds.
  static Result<std::unique_ptr<SharedMemory>> Create(const std::string& name, std::size_t bytes,
                                                      std::size_t allocate_bytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  std::byte* data() const { return data_; }  // aligned to a page
  std::size_t size() const { return size_; }
  int fd() const { return fd_; }  // to be passed on; closed with this object

 private:
  SharedMemory() = default;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  int fd_ = -1;
};

}  // namespace kvshare::agentd

#include "agentd/pool/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010  // Linux 5.1; older headers lack it
#endif

namespace kvshare::agentd {
namespace {

Status Failed(const std::string& what, std::size_t bytes, int error) {
  const std::string text = what + " of " + std::to_string(bytes) + " bytes: " + std::strerror(error);
  const bool memory = error == ENOMEM || error == ENOSPC || error == EDQUOT;
  return memory ? ResourceExhausted(text) : Unimplemented(text);
}

}  // namespace

Result<std::unique_ptr<SharedMemory>> SharedMemory::Create(const std::string& name, std::size_t bytes,
                                                           std::size_t allocate_bytes) {
  std::unique_ptr<SharedMemory> memory(new SharedMemory);
  memory->size_ = bytes;
  memory->fd_ = ::memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (memory->fd_ < 0) return Failed("memfd", bytes, errno);
  // The mode counts where the descriptor is opened anew through /proc.
  if (::fchmod(memory->fd_, 0600) != 0 || ::ftruncate(memory->fd_, static_cast<off_t>(bytes)) != 0) {
    return Failed("memfd", bytes, errno);
  }
  const std::size_t now = std::min(bytes, allocate_bytes);
  if (now > 0 && ::fallocate(memory->fd_, 0, 0, static_cast<off_t>(now)) != 0) {
    return Failed("memfd: the first " + std::to_string(now) + " bytes", bytes, errno);
  }
  void* mapped = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory->fd_, 0);
  if (mapped == MAP_FAILED) return Failed("mapping", bytes, errno);
  memory->data_ = static_cast<std::byte*>(mapped);
  if (::fcntl(memory->fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) != 0) {
    return Failed("sealing a memfd", bytes, errno);
  }
  return memory;
}

SharedMemory::~SharedMemory() {
  if (data_ != nullptr) ::munmap(data_, size_);
  if (fd_ >= 0) ::close(fd_);
}

}  // namespace kvshare::agentd

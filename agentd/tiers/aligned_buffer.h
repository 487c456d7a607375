// Memory that O_DIRECT accepts.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <span>

#include "agentd/tiers/record.h"
#include "libkvshare/core/check.h"

namespace kvshare::agentd {

// Aligned to 4096 and already present: the first touch of memory costs more than copying it.
class AlignedBuffer {
 public:
  // `size` is a multiple of 4096.
  explicit AlignedBuffer(std::size_t size) : data_(std::aligned_alloc(kRecordAlign, size)), size_(size) {
    KVS_CHECK(data_ != nullptr);
    std::memset(data_, 0, size);
  }
  ~AlignedBuffer() { std::free(data_); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  std::span<std::byte> bytes() { return {static_cast<std::byte*>(data_), size_}; }

 private:
  void* const data_;
  const std::size_t size_;
};

inline bool IsAligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % kRecordAlign == 0; }

}  // namespace kvshare::agentd

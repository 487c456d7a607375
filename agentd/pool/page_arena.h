// PageArena: the memory behind the pool's page numbers.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "kernels/backend.h"
#include "kernels/device_kv.h"
#include "kernels/paged_kv.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

// One allocation for all pages, so that a page number is an address. On a CPU, the first touch of memory costs more
// than copying it, so a thread of the arena's own touches pages before a request does. It stays kPrefaultAhead in front
// of the highest page in use: a large pool costs nothing until it is needed. Must not outlive `backend`. Thread-safe,
// but for Read and Write.
//
// Where backend memory is host memory, it lies in a sealed memfd, so that clients can map it and read what they lease
// without a copy (docs/design/handover.md); where that cannot be had, in the backend's own, and is not shared. On a
// device (docs/design/cuda-daemon.md) pages() is an address there, for the backend alone.
class PageArena {
 public:
  static Result<std::unique_ptr<PageArena>> Create(kernels::Backend& backend, const kernels::KvLayout& layout,
                                                   kernels::PageIndex num_pages);
  virtual ~PageArena() = default;

  virtual const kernels::KvPages& pages() const = 0;
  // The host may read and write pages() itself.
  virtual bool in_place() const = 0;
  // One page's bytes, to and from host memory of layout.page_bytes(), wherever the page lies. The thread that the
  // backend belongs to; they wait for what it has been given to do before. Errors: the backend's.
  virtual Status Read(kernels::PageIndex page, std::span<std::byte> to) const = 0;
  virtual Status Write(kernels::PageIndex page, std::span<const std::byte> from) = 0;
  // What copies pages to and from pinned host memory beside the backend's work, for the same thread. Null where the
  // host reads them in place, and where the backend has none: then the two above are all there is.
  virtual kernels::DeviceKv* movers() const = 0;
  // Pages below `high_water` are, or will soon be, in use. Never blocks for long.
  virtual void ExpectUse(kernels::PageIndex high_water) = 0;
  // Bytes made present so far (all of them where memory is not ours to touch). For tests and logs.
  virtual std::size_t prefaulted_bytes() const = 0;

  // One for each page, for the pool to count in how often the page stopped holding what it held, before it holds
  // anything else. Readers elsewhere compare it around what they read. Never null.
  virtual std::atomic<std::uint64_t>* generations() const = 0;
  // Sealed memfds of pages() and generations(), for other processes to map; -1 where the memory is not shared.
  virtual int memory_fd() const = 0;
  virtual int generations_fd() const = 0;
};

inline constexpr std::size_t kPrefaultAhead = std::size_t{256} << 20;

}  // namespace kvshare::agentd

// PageArena: the memory behind the pool's page numbers.
#pragma once

#include <cstddef>
#include <memory>

#include "kernels/backend.h"
#include "kernels/paged_kv.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

// One allocation for all pages, so that a page number is an address. On a CPU, the first touch of memory costs more
// than copying it, so a thread of the arena's own touches pages before a request does. It stays kPrefaultAhead in front
// of the highest page in use: a large pool costs nothing until it is needed. Must not outlive `backend`. Thread-safe.
class PageArena {
 public:
  static Result<std::unique_ptr<PageArena>> Create(kernels::Backend& backend, const kernels::KvLayout& layout,
                                                   kernels::PageIndex num_pages);
  virtual ~PageArena() = default;

  virtual const kernels::KvPages& pages() const = 0;
  // Pages below `high_water` are, or will soon be, in use. Never blocks for long.
  virtual void ExpectUse(kernels::PageIndex high_water) = 0;
  // Bytes made present so far (all of them where memory is not ours to touch). For tests and logs.
  virtual std::size_t prefaulted_bytes() const = 0;
};

inline constexpr std::size_t kPrefaultAhead = std::size_t{256} << 20;

}  // namespace kvshare::agentd

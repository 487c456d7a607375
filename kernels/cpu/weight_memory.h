// Memory for linear layers: aligned scratch, and the arena that packed weights lie in.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <vector>

namespace kvshare::kernels {

struct FreeAligned {
  void operator()(std::byte* p) const { ::operator delete (p, std::align_val_t{64}); }
};
using AlignedBytes = std::unique_ptr<std::byte, FreeAligned>;

// nullptr when the machine has no more memory.
inline AlignedBytes AllocateAligned(std::size_t bytes) {
  auto* p = static_cast<std::byte*>(::operator new (bytes, std::align_val_t{64}, std::nothrow));
  return AlignedBytes(p);
}

// Packed weights, laid out one after another on huge pages: they are read whole for every token, and with 4 KiB pages
// two cores reading at once lose a third of the memory's bandwidth to address translation
// (bench/kernels/linear_bench.cc).
class WeightArena {
 public:
  WeightArena() = default;
  WeightArena(const WeightArena&) = delete;
  WeightArena& operator=(const WeightArena&) = delete;
  ~WeightArena() {
    for (const Chunk& chunk : chunks_) munmap(chunk.data, chunk.size);
  }

  // 64-byte aligned; nullptr when the machine has no more memory. Given back with the arena.
  std::byte* Allocate(std::size_t bytes) {
    bytes = (bytes + 63) & ~std::size_t{63};
    if (chunks_.empty() || chunks_.back().size - chunks_.back().used < bytes) {
      const std::size_t size = (std::max(bytes, kChunkBytes) + kHugePage - 1) & ~(kHugePage - 1);
      void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (data == MAP_FAILED) return nullptr;
      madvise(data, size, MADV_HUGEPAGE);
      chunks_.push_back({static_cast<std::byte*>(data), size, 0});
    }
    Chunk& chunk = chunks_.back();
    chunk.used += bytes;
    return chunk.data + chunk.used - bytes;
  }

 private:
  static constexpr std::size_t kHugePage = std::size_t{2} << 20;
  static constexpr std::size_t kChunkBytes = std::size_t{32} << 20;
  struct Chunk {
    std::byte* data;
    std::size_t size;
    std::size_t used;
  };
  std::vector<Chunk> chunks_;
};

}  // namespace kvshare::kernels

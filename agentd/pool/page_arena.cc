#include "agentd/pool/page_arena.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "agentd/pool/shared_memory.h"
#include "libkvshare/core/check.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older headers lack it
#endif

namespace kvshare::agentd {
namespace {

using kernels::Buffer;
using kernels::KvPages;
using kernels::PageIndex;

constexpr std::size_t kHugePage = std::size_t{2} << 20;
// One madvise call: short enough that stopping and newer wishes are noticed soon, and that nobody waits long who needs
// the address space itself, which the call holds.
constexpr std::size_t kStep = kHugePage;
// Populating half the lead takes a core some 50 ms. Behind whatever computes, a request has most of that core.
constexpr int kNiceness = 10;

static_assert(sizeof(std::atomic<std::uint64_t>) == sizeof(std::uint64_t) &&
              std::atomic<std::uint64_t>::is_always_lock_free);  // as other processes read them

// Either the shared pair or the private one.
struct Memory {
  std::unique_ptr<SharedMemory> shared;
  std::unique_ptr<SharedMemory> shared_generations;
  std::unique_ptr<Buffer> buffer;
  std::unique_ptr<std::atomic<std::uint64_t>[]> generations;
};

class PageArenaImpl final : public PageArena {
 public:
  PageArenaImpl(Memory memory, const KvPages& pages, kernels::Backend* backend)
      : memory_(std::move(memory)), pages_(pages), backend_(backend), in_place_(backend->capabilities().host_memory) {
    const std::size_t size = pages.layout.page_bytes() * pages.num_pages;
    const auto begin = reinterpret_cast<std::uintptr_t>(pages.base);
    const std::uintptr_t end = begin + size;
    // Whole huge pages inside the allocation; the edges are left to whoever touches them first.
    const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    const std::uintptr_t last = end / kHugePage * kHugePage;
    if (!in_place_ || first >= last) {
      done_ = size;
      return;
    }
    start_ = reinterpret_cast<std::byte*>(first);
    bytes_ = last - first;
    // Advice only: where the kernel gives no huge pages, small ones are populated all the same.
    (void)madvise(start_, bytes_, MADV_HUGEPAGE);
    wanted_ = std::min(bytes_, kPrefaultAhead);
    thread_ = std::thread([this] { Run(); });
  }

  ~PageArenaImpl() override {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_one();
    if (thread_.joinable()) thread_.join();
  }

  const KvPages& pages() const override { return pages_; }
  bool in_place() const override { return in_place_; }

  Status Read(PageIndex page, std::span<std::byte> to) const override {
    KVS_CHECK(page < pages_.num_pages && to.size() == pages_.layout.page_bytes());
    return backend_->Download(to.data(), pages_.slab(page, 0, 0, 0), to.size());
  }
  Status Write(PageIndex page, std::span<const std::byte> from) override {
    KVS_CHECK(page < pages_.num_pages && from.size() == pages_.layout.page_bytes());
    return backend_->Upload(pages_.slab(page, 0, 0, 0), from.data(), from.size());
  }

  kernels::DeviceKv* movers() const override { return in_place_ ? nullptr : backend_->device_kv(); }

  void ExpectUse(PageIndex high_water) override {
    const std::size_t wanted =
        std::min(bytes_, static_cast<std::size_t>(high_water) * pages_.layout.page_bytes() + kPrefaultAhead);
    {
      const std::lock_guard lock(mutex_);
      // Half the lead may melt before the thread is woken: fewer wake-ups, and the lead is never gone.
      if (wanted < wanted_ + std::min(kPrefaultAhead / 2, bytes_ - wanted_)) return;
      if (wanted == wanted_) return;
      wanted_ = wanted;
    }
    changed_.notify_one();
  }

  std::atomic<std::uint64_t>* generations() const override {
    return memory_.shared_generations == nullptr
               ? memory_.generations.get()
               : reinterpret_cast<std::atomic<std::uint64_t>*>(memory_.shared_generations->data());
  }
  int memory_fd() const override { return memory_.shared == nullptr ? -1 : memory_.shared->fd(); }
  int generations_fd() const override {
    return memory_.shared_generations == nullptr ? -1 : memory_.shared_generations->fd();
  }

  std::size_t prefaulted_bytes() const override {
    const std::lock_guard lock(mutex_);
    return done_;
  }

 private:
  void Run() {
    (void)setpriority(PRIO_PROCESS, static_cast<id_t>(gettid()), kNiceness);
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return stop_ || done_ < wanted_; });
      if (stop_) return;
      const std::size_t from = done_;
      const std::size_t step = std::min(kStep, wanted_ - from);
      lock.unlock();
      // Populating changes no byte, so the engine may use the same pages meanwhile.
      const bool populated = madvise(start_ + from, step, MADV_POPULATE_WRITE) == 0;
      lock.lock();
      if (!populated) {  // an older kernel, or memory is short: then first touch pays, as it would without us
        stop_ = true;
        return;
      }
      done_ = from + step;
    }
  }

  const Memory memory_;
  const KvPages pages_;
  kernels::Backend* const backend_;
  const bool in_place_;
  std::byte* start_ = nullptr;
  std::size_t bytes_ = 0;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t wanted_ = 0;  // guarded by mutex_, as all below
  std::size_t done_ = 0;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace

Result<std::unique_ptr<PageArena>> PageArena::Create(kernels::Backend& backend, const kernels::KvLayout& layout,
                                                     PageIndex num_pages) {
  const std::size_t bytes = layout.page_bytes() * num_pages;
  const std::string what = "KV pool of " + std::to_string(bytes) + " bytes";
  Memory memory;
  if (backend.capabilities().host_memory && bytes > 0) {
    // All of a small pool and the start of a large one are allocated here; the arena's thread allocates the rest, ahead
    // of its use.
    Result<std::unique_ptr<SharedMemory>> shared = SharedMemory::Create("kvshare-pages", bytes, kPrefaultAhead);
    if (!shared.ok() && shared.status().code() == StatusCode::kResourceExhausted) {
      return shared.status().WithContext(what);
    }
    const std::size_t generation_bytes = num_pages * sizeof(std::uint64_t);
    Result<std::unique_ptr<SharedMemory>> generations =
        SharedMemory::Create("kvshare-generations", generation_bytes, generation_bytes);
    if (shared.ok() && generations.ok()) {
      memory.shared = *std::move(shared);
      memory.shared_generations = *std::move(generations);
    }
  }
  if (memory.shared == nullptr) {
    Result<std::unique_ptr<Buffer>> buffer = backend.Allocate(bytes);
    if (!buffer.ok()) return buffer.status().WithContext(what);
    memory.buffer = *std::move(buffer);
    memory.generations = std::make_unique<std::atomic<std::uint64_t>[]>(num_pages);
  }
  const KvPages pages = {.base = memory.shared == nullptr ? memory.buffer->data() : memory.shared->data(),
                         .num_pages = num_pages,
                         .layout = layout};
  return std::unique_ptr<PageArena>(std::make_unique<PageArenaImpl>(std::move(memory), pages, &backend));
}

}  // namespace kvshare::agentd

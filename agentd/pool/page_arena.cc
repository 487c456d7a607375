#include "agentd/pool/page_arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older headers lack it
#endif

namespace kvshare::agentd {
namespace {

using kernels::Buffer;
using kernels::KvPages;
using kernels::PageIndex;

constexpr std::size_t kHugePage = std::size_t{2} << 20;
// One madvise call: short enough that stopping and newer wishes are noticed soon.
constexpr std::size_t kStep = std::size_t{16} << 20;

class PageArenaImpl final : public PageArena {
 public:
  PageArenaImpl(std::unique_ptr<Buffer> buffer, const KvPages& pages, bool host)
      : buffer_(std::move(buffer)), pages_(pages) {
    const auto begin = reinterpret_cast<std::uintptr_t>(buffer_->data());
    const std::uintptr_t end = begin + buffer_->size();
    // Whole huge pages inside the allocation; the edges are left to whoever touches them first.
    const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    const std::uintptr_t last = end / kHugePage * kHugePage;
    if (!host || first >= last) {
      done_ = buffer_->size();
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

  std::size_t prefaulted_bytes() const override {
    const std::lock_guard lock(mutex_);
    return done_;
  }

 private:
  void Run() {
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

  const std::unique_ptr<Buffer> buffer_;
  const KvPages pages_;
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
  Result<std::unique_ptr<Buffer>> buffer = backend.Allocate(bytes);
  if (!buffer.ok()) {
    return buffer.status().WithContext("KV pool of " + std::to_string(bytes) + " bytes");
  }
  const KvPages pages = {.base = (*buffer)->data(), .num_pages = num_pages, .layout = layout};
  const bool host = backend.capabilities().device == "cpu";
  return std::unique_ptr<PageArena>(std::make_unique<PageArenaImpl>(std::move(*buffer), pages, host));
}

}  // namespace kvshare::agentd

// The part of DeviceKv that copies pages beside the backend's work, in the device's second stream.
#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_kv.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::kernels::cuda {
namespace {

class PinnedBuffer final : public Buffer {
 public:
  PinnedBuffer(Device& device, std::byte* data, std::size_t size) : device_(device), data_(data), size_(size) {}
  ~PinnedBuffer() override { device_.FreePinned(data_); }
  std::byte* data() const override { return data_; }
  std::size_t size() const override { return size_; }

 private:
  Device& device_;
  std::byte* const data_;
  const std::size_t size_;
};

class CudaTransfer final : public PageTransfer {
 public:
  CudaTransfer(LaunchQueue& queue, AsideMarks& marks, int layers) : queue_(queue), marks_(marks) {
    for (int layer = 0; layer < layers; ++layer) passed_.push_back(marks.Take());
  }
  ~CudaTransfer() override {
    for (const int mark : passed_) marks_.Give(mark);
  }

  int mark(int layer) const { return passed_[static_cast<std::size_t>(layer)]; }

  void AwaitLayer(int layer) override {
    KVS_CHECK(layer >= 0 && layer < static_cast<int>(passed_.size()));
    queue_.Do("await_layer", layer, 0, [&] { return queue_.device().FollowAside(mark(layer)); });
  }
  Result<bool> Done() override {
    if (!queue_.failed().ok()) return queue_.failed();
    auto done = queue_.device().PassedAside(passed_.back());
    queue_.Keep(done.status());
    if (!done.ok()) return queue_.failed();
    return done;
  }
  Status Wait() override {
    if (queue_.failed().ok()) queue_.Keep(queue_.device().WaitAside(passed_.back()));
    return queue_.failed();
  }

 private:
  LaunchQueue& queue_;
  AsideMarks& marks_;
  std::vector<int> passed_;  // by layer: the point behind its copies
};

}  // namespace

Result<std::unique_ptr<Buffer>> CudaKv::AllocatePinned(std::size_t bytes) {
  const std::size_t size = std::max<std::size_t>(bytes, 1);
  KVS_ASSIGN_OR_RETURN(std::byte* const data, queue_.device().AllocatePinned(size));
  return std::unique_ptr<Buffer>(std::make_unique<PinnedBuffer>(queue_.device(), data, bytes));
}

// A page's layer is contiguous, and so one copy: 256 KiB at the shape of an 8B model, which takes the link longer than
// the call takes the host.
Result<std::unique_ptr<PageTransfer>> CudaKv::Transfer(const KvPages& pages, std::span<const PageIndex> index,
                                                       std::byte* pinned, bool promote) {
  CheckPages(pages, index);
  const int layers = pages.layout.num_layers;
  const std::size_t page_bytes = pages.layout.page_bytes(), layer_bytes = page_bytes / static_cast<std::size_t>(layers);
  auto transfer = std::make_unique<CudaTransfer>(queue_, marks_, layers);
  Device& device = queue_.device();
  queue_.Do(promote ? "promote_pages" : "demote_pages", static_cast<std::int64_t>(index.size()), layers,
            [&]() -> Status {
              KVS_RETURN_IF_ERROR(device.AsideFollows());
              for (int layer = 0; layer < layers; ++layer) {
                const std::size_t at = pages.layout.slab_offset(layer, 0, 0);
                for (std::size_t i = 0; i < index.size(); ++i) {
                  std::byte* const page = pages.base + index[i] * page_bytes + at;
                  std::byte* const host = pinned + i * page_bytes + at;
                  KVS_RETURN_IF_ERROR(promote ? device.CopyInAside(page, host, layer_bytes)
                                              : device.CopyOutAside(host, page, layer_bytes));
                }
                KVS_RETURN_IF_ERROR(device.MarkAside(transfer->mark(layer)));
              }
              return OkStatus();
            });
  if (!queue_.failed().ok()) return queue_.failed();
  return std::unique_ptr<PageTransfer>(std::move(transfer));
}

Result<std::unique_ptr<PageTransfer>> CudaKv::PromotePages(const KvPages& pages, const std::byte* pinned,
                                                           std::span<const PageIndex> to) {
  std::vector<PageIndex> sorted(to.begin(), to.end());
  std::sort(sorted.begin(), sorted.end());
  KVS_CHECK(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end());
  return Transfer(pages, to, const_cast<std::byte*>(pinned), true);  // read only, where it promotes
}

Result<std::unique_ptr<PageTransfer>> CudaKv::DemotePages(const KvPages& pages, std::span<const PageIndex> from,
                                                          std::byte* pinned) {
  return Transfer(pages, from, pinned, false);
}

}  // namespace kvshare::kernels::cuda

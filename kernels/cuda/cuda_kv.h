// DeviceKv over a LaunchQueue.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "kernels/cuda/launch_queue.h"
#include "kernels/device_kv.h"

namespace kvshare::kernels::cuda {

// Numbers for points of the device's second stream, given out and taken back.
class AsideMarks {
 public:
  int Take() {
    if (free_.empty()) return next_++;
    const int mark = free_.back();
    free_.pop_back();
    return mark;
  }
  void Give(int mark) { free_.push_back(mark); }

 private:
  std::vector<int> free_;
  int next_ = 0;
};

// Requires pages of bf16 or fp16, and that `index` names pages there are.
void CheckPages(const KvPages& pages, std::span<const PageIndex> index);

class CudaKv final : public DeviceKv {
 public:
  explicit CudaKv(LaunchQueue& queue) : queue_(queue) {}

  void CopyRows(const KvPages& pages, std::span<const KvSlot> from, std::span<const KvSlot> to, int layer_begin,
                int layer_end) override;
  void GatherPages(const KvPages& pages, std::span<const PageIndex> from, std::byte* block) override;
  void ScatterPages(const KvPages& pages, const std::byte* block, std::span<const PageIndex> to) override;
  void QuantizePages(const KvPages& pages, std::span<const PageIndex> from, KvCode code, std::byte* block) override;
  void DequantizePages(const KvPages& pages, const std::byte* block, KvCode code,
                       std::span<const PageIndex> to) override;
  Result<std::unique_ptr<Buffer>> AllocatePinned(std::size_t bytes) override;
  Result<std::unique_ptr<PageTransfer>> PromotePages(const KvPages& pages, const std::byte* pinned,
                                                     std::span<const PageIndex> to) override;
  Result<std::unique_ptr<PageTransfer>> DemotePages(const KvPages& pages, std::span<const PageIndex> from,
                                                    std::byte* pinned) override;
  void ValueDeviation(const MatrixView& fresh, const KvPages& pages, int layer, std::span<const KvSlot> stored,
                      RowDeviation* out) override;
  Status ChooseRows(const RowDeviation* deviations, std::int64_t n, std::span<std::int32_t> chosen) override;
  Status ChooseRowsByMass(const float* mass, const RowDeviation* deviations, std::int64_t n,
                          std::span<std::int32_t> chosen) override;
  void AttentionMass(const AttentionParams& p, std::span<const std::int64_t> rows,
                     std::span<float* const> mass) override;
  Status AnchorDistances(const AnchoredTokens& tokens, float* differences, std::span<float> distances) override;
  void ApplyAnchors(const AnchoredTokens& tokens, const float* differences, std::span<const KvSlot> to,
                    std::span<const std::int64_t> to_positions) override;

 private:
  void CopyPages(const KvPages& pages, std::span<const PageIndex> index, std::byte* block, bool gather);
  void CodePages(const KvPages& pages, std::span<const PageIndex> index, KvCode code, std::byte* block, bool quantize);

  Result<std::unique_ptr<PageTransfer>> Transfer(const KvPages& pages, std::span<const PageIndex> index,
                                                 std::byte* pinned, bool promote);
  Status Choose(const float* scores, int stride, std::int64_t n, std::span<std::int32_t> chosen);
  Status MassOf(const AttentionParams& p, std::span<const std::int64_t> rows, std::span<float* const> mass);

  LaunchQueue& queue_;
  AsideMarks marks_;
};

// Slots as the device reads them.
std::vector<SlotView> SlotViews(const KvPages& pages, std::span<const KvSlot> slots);

}  // namespace kvshare::kernels::cuda

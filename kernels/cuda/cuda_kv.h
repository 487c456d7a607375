// DeviceKv over a LaunchQueue.
#pragma once

#include <vector>

#include "kernels/cuda/launch_queue.h"
#include "kernels/device_kv.h"

namespace kvshare::kernels::cuda {

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
  void ValueDeviation(const MatrixView& fresh, const KvPages& pages, int layer, std::span<const KvSlot> stored,
                      RowDeviation* out) override;
  Status ChooseRows(const RowDeviation* deviations, std::int64_t n, std::span<std::int32_t> chosen) override;

 private:
  void CopyPages(const KvPages& pages, std::span<const PageIndex> index, std::byte* block, bool gather);
  void CodePages(const KvPages& pages, std::span<const PageIndex> index, KvCode code, std::byte* block, bool quantize);

  LaunchQueue& queue_;
};

// Slots as the device reads them.
std::vector<SlotView> SlotViews(const KvPages& pages, std::span<const KvSlot> slots);

}  // namespace kvshare::kernels::cuda

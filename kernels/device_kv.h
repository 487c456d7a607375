// What is done to KV where it lies, on backends whose memory the host does not read (kv_rows.h is for those whose
// memory it does): moving rows and pages, quantising pages on their way to another tier, and choosing the rows to
// recompute, so that nothing but the chosen indices crosses to the host. Enqueued, like the operations of Backend;
// failures show in its Sync().
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/kv_rows.h"
#include "kernels/paged_kv.h"

namespace kvshare::kernels {

enum class KvCode { kInt8, kFp8E4M3 };

// One byte for each element and one fp32 scale for each token of a slab: per slab [64 tokens][head_dim] codes, then
// [64] scales. x is about code * scale; scale is the row's greatest |x| over the greatest code (127, or 448).
constexpr std::size_t QuantizedSlabBytes(const KvLayout& layout) {
  return std::size_t{kPageTokens} * (static_cast<std::size_t>(layout.head_dim) + sizeof(float));
}
constexpr std::size_t QuantizedPageBytes(const KvLayout& layout) {
  return QuantizedSlabBytes(layout) * 2 * static_cast<std::size_t>(layout.num_layers) *
         static_cast<std::size_t>(layout.num_kv_heads);
}

class DeviceKv {
 public:
  virtual ~DeviceKv() = default;

  // K and V, byte for byte, of layers [layer_begin, layer_end): from[i] to to[i], all at once: no slot of `to` may
  // appear twice, or in `from`.
  virtual void CopyRows(const KvPages& pages, std::span<const KvSlot> from, std::span<const KvSlot> to, int layer_begin,
                        int layer_end) = 0;

  // Whole pages to and from one block of page_bytes() each, in the backend's memory.
  virtual void GatherPages(const KvPages& pages, std::span<const PageIndex> from, std::byte* block) = 0;
  virtual void ScatterPages(const KvPages& pages, const std::byte* block, std::span<const PageIndex> to) = 0;

  // The same through one byte an element; a block has QuantizedPageBytes() for each page. Rounded to nearest even. A
  // row with an infinity or a NaN comes back as NaN. Rows of pages that hold no token are coded like any others.
  virtual void QuantizePages(const KvPages& pages, std::span<const PageIndex> from, KvCode code, std::byte* block) = 0;
  virtual void DequantizePages(const KvPages& pages, const std::byte* block, KvCode code,
                               std::span<const PageIndex> to) = 0;

  // ValueDeviation of kv_rows.h, with fp32 sums: out[i] of V of row i in `fresh` and V stored at stored[i]. `out` lies
  // in the backend's memory.
  virtual void ValueDeviation(const MatrixView& fresh, const KvPages& pages, int layer, std::span<const KvSlot> stored,
                              RowDeviation* out) = 0;

  // The `count` rows of greatest `squares` among n, ascending, into `chosen` (host memory): of equals the lower index;
  // a NaN is greater than all. Waits. Requires 0 <= count <= n = chosen's bound.
  virtual Status ChooseRows(const RowDeviation* deviations, std::int64_t n, std::span<std::int32_t> chosen) = 0;
};

}  // namespace kvshare::kernels

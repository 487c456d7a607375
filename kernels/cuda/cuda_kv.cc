#include "kernels/cuda/cuda_kv.h"

#include <algorithm>
#include <utility>

#include "kernels/cuda/attention_plan.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::kernels::cuda {
namespace {

static_assert(sizeof(RowDeviation) == 2 * sizeof(float), "kernels write deviations as pairs");

// Blocks in x, of which a launch has at most 2^31; blocks in y, at most 65535, are layers, slabs and pieces.
constexpr std::size_t kMostPages = std::size_t{1} << 20;

}  // namespace

void CheckPages(const KvPages& pages, std::span<const PageIndex> index) {
  KVS_CHECK(pages.layout.dtype != DType::kF32 && pages.layout.head_dim % 8 == 0 && index.size() <= kMostPages);
  for (const PageIndex page : index) KVS_CHECK(page < pages.num_pages);
}

std::vector<SlotView> SlotViews(const KvPages& pages, std::span<const KvSlot> slots) {
  std::vector<SlotView> views;
  views.reserve(slots.size());
  for (const KvSlot& slot : slots) {
    const bool stored = slot != kNoSlot;
    KVS_CHECK(!stored || (slot.page < pages.num_pages && slot.offset >= 0 && slot.offset < kPageTokens));
    views.push_back({stored ? slot.page : kNoPage, slot.offset});
  }
  return views;
}

void CudaKv::CopyRows(const KvPages& pages, std::span<const KvSlot> from, std::span<const KvSlot> to, int layer_begin,
                      int layer_end) {
  const KvLayout& layout = pages.layout;
  KVS_CHECK(from.size() == to.size() && 0 <= layer_begin && layer_begin <= layer_end && layer_end <= layout.num_layers);
  CheckPages(pages, {});
  const std::vector<SlotView> sources = SlotViews(pages, from), targets = SlotViews(pages, to);
  // All rows move at once: what is written must be nobody else's.
  std::vector<std::pair<std::uint32_t, std::int32_t>> written;
  for (const SlotView& slot : targets) {
    KVS_CHECK(slot.page != kNoPage);
    written.push_back({slot.page, slot.offset});
  }
  std::sort(written.begin(), written.end());
  KVS_CHECK(std::adjacent_find(written.begin(), written.end()) == written.end());
  for (const SlotView& slot : sources) {
    KVS_CHECK(slot.page != kNoPage);
    KVS_CHECK(!std::binary_search(written.begin(), written.end(), std::pair{slot.page, slot.offset}));
  }
  if (from.empty() || layer_begin == layer_end) return;
  queue_.Do("copy_rows", static_cast<std::int64_t>(from.size()), layer_end - layer_begin, [&]() -> Status {
    const std::span<const SlotView> a(sources), b(targets);
    KVS_RETURN_IF_ERROR(queue_.staging().Begin(StagedBytes(a) + StagedBytes(b)));
    CopyRowsArgs args;
    KVS_ASSIGN_OR_RETURN(args.from, queue_.staging().Put(a));
    KVS_ASSIGN_OR_RETURN(args.to, queue_.staging().Put(b));
    args.pages = pages.base;
    args.page_bytes = static_cast<std::int64_t>(layout.page_bytes());
    args.slab_bytes = static_cast<std::int64_t>(layout.slab_bytes());
    args.row_bytes = args.slab_bytes / kPageTokens;
    args.slabs_per_layer = 2 * layout.num_kv_heads;
    args.layer_begin = layer_begin;
    args.layers = layer_end - layer_begin;
    args.rows = static_cast<std::int64_t>(from.size());
    return queue_.device().CopyRows(args);
  });
}

void CudaKv::CopyPages(const KvPages& pages, std::span<const PageIndex> index, std::byte* block, bool gather) {
  CheckPages(pages, index);
  if (index.empty()) return;
  queue_.Do(gather ? "gather_pages" : "scatter_pages", static_cast<std::int64_t>(index.size()), 0, [&]() -> Status {
    KVS_RETURN_IF_ERROR(queue_.staging().Begin(StagedBytes(index)));
    CopyPagesArgs args;
    KVS_ASSIGN_OR_RETURN(args.index, queue_.staging().Put(index));
    args.pages = pages.base;
    args.page_bytes = static_cast<std::int64_t>(pages.layout.page_bytes());
    args.count = static_cast<int>(index.size());
    args.block = block;
    args.gather = gather;
    return queue_.device().CopyPages(args);
  });
}

void CudaKv::GatherPages(const KvPages& pages, std::span<const PageIndex> from, std::byte* block) {
  CopyPages(pages, from, block, true);
}

void CudaKv::ScatterPages(const KvPages& pages, const std::byte* block, std::span<const PageIndex> to) {
  CopyPages(pages, to, const_cast<std::byte*>(block), false);  // read only, with gather false
}

void CudaKv::CodePages(const KvPages& pages, std::span<const PageIndex> index, KvCode code, std::byte* block,
                       bool quantize) {
  const KvLayout& layout = pages.layout;
  CheckPages(pages, index);
  const int slabs = 2 * layout.num_layers * layout.num_kv_heads;
  KVS_CHECK(slabs <= 65535);
  if (index.empty()) return;
  queue_.Do(quantize ? "quantize_pages" : "dequantize_pages", static_cast<std::int64_t>(index.size()), slabs,
            [&]() -> Status {
              KVS_RETURN_IF_ERROR(queue_.staging().Begin(StagedBytes(index)));
              CodePagesArgs args;
              KVS_ASSIGN_OR_RETURN(args.index, queue_.staging().Put(index));
              args.pages = pages.base;
              args.page_bytes = static_cast<std::int64_t>(layout.page_bytes());
              args.slab_bytes = static_cast<std::int64_t>(layout.slab_bytes());
              args.slabs = slabs;
              args.head_dim = layout.head_dim;
              args.dtype = layout.dtype;
              args.count = static_cast<int>(index.size());
              args.block = block;
              args.fp8 = code == KvCode::kFp8E4M3;
              args.quantize = quantize;
              return queue_.device().CodePages(args);
            });
}

void CudaKv::QuantizePages(const KvPages& pages, std::span<const PageIndex> from, KvCode code, std::byte* block) {
  CodePages(pages, from, code, block, true);
}

void CudaKv::DequantizePages(const KvPages& pages, const std::byte* block, KvCode code, std::span<const PageIndex> to) {
  CodePages(pages, to, code, const_cast<std::byte*>(block), false);  // read only, with quantize false
}

void CudaKv::ValueDeviation(const MatrixView& fresh, const KvPages& pages, int layer, std::span<const KvSlot> stored,
                            RowDeviation* out) {
  const KvLayout& layout = pages.layout;
  CheckPages(pages, {});
  KVS_CHECK(fresh.dtype == DType::kF32 && fresh.cols == std::int64_t{layout.num_kv_heads} * layout.head_dim);
  KVS_CHECK(fresh.rows == static_cast<std::int64_t>(stored.size()) && layer >= 0 && layer < layout.num_layers);
  const std::vector<SlotView> slots = SlotViews(pages, stored);
  for (const SlotView& slot : slots) KVS_CHECK(slot.page != kNoPage);
  if (stored.empty()) return;
  queue_.Do("value_deviation", fresh.rows, layer, [&]() -> Status {
    const std::span<const SlotView> staged(slots);
    KVS_RETURN_IF_ERROR(queue_.staging().Begin(StagedBytes(staged)));
    DeviationArgs args;
    KVS_ASSIGN_OR_RETURN(args.stored, queue_.staging().Put(staged));
    args.fresh = fresh.row<float>(0);
    args.fresh_stride = fresh.stride;
    args.pages = ViewOf(pages, layer);
    args.head_dim = layout.head_dim;
    args.out = reinterpret_cast<float*>(out);
    args.rows = fresh.rows;
    return queue_.device().Deviation(args);
  });
}

Status CudaKv::ChooseRows(const RowDeviation* deviations, std::int64_t n, std::span<std::int32_t> chosen) {
  return Choose(reinterpret_cast<const float*>(deviations), 2, n, chosen);
}

Status CudaKv::ChooseRowsByMass(const float* mass, const RowDeviation* deviations, std::int64_t n,
                                std::span<std::int32_t> chosen) {
  if (deviations == nullptr || chosen.empty()) return Choose(mass, 1, n, chosen);
  auto scores = DeviceBlock::Take(queue_.memory(), static_cast<std::size_t>(n) * sizeof(float));
  if (!scores.ok()) return scores.status();
  auto* to = reinterpret_cast<float*>(scores->data());
  queue_.Do("score_rows", n, 0, [&] {
    return queue_.device().Score({reinterpret_cast<const float*>(deviations), mass, to, n});
  });
  return Choose(to, 1, n, chosen);
}

// Of rows whose score is at i * stride.
Status CudaKv::Choose(const float* scores, int stride, std::int64_t n, std::span<std::int32_t> chosen) {
  const auto count = static_cast<std::int64_t>(chosen.size());
  KVS_CHECK(count <= n && n < (std::int64_t{1} << 31));
  if (count == 0) return queue_.failed();
  auto scratch = DeviceBlock::Take(queue_.memory(), static_cast<std::size_t>(n) + 256 + chosen.size_bytes());
  if (!scratch.ok()) return scratch.status();
  ChooseArgs args;
  args.scores = scores;
  args.stride = stride;
  args.n = n;
  args.count = count;
  args.out = reinterpret_cast<std::int32_t*>(scratch->data());
  args.chosen = reinterpret_cast<std::uint8_t*>(scratch->data() + (chosen.size_bytes() + 255) / 256 * 256);
  queue_.Do("choose_rows", n, count, [&] { return queue_.device().Choose(args); });
  queue_.Do("chosen", count, 0,
            [&] { return queue_.device().CopyOut(chosen.data(), scratch->data(), chosen.size_bytes()); });
  return queue_.Sync();
}

}  // namespace kvshare::kernels::cuda

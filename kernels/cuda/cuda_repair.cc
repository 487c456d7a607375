// The part of DeviceKv that approximate reuse asks for: attention mass, KVCOMM's anchors.
#include <algorithm>
#include <functional>
#include <limits>
#include <tuple>
#include <vector>

#include "kernels/cuda/attention_launch.h"
#include "kernels/cuda/cuda_kv.h"
#include "kernels/cuda/row_ops_block.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::kernels::cuda {
namespace {

static_assert(kMostAnchors == kMaxAnchors && 2 * kMaxAnchors == kRowThreads);

std::size_t Index(std::int64_t i) { return static_cast<std::size_t>(i); }

// Blocks in x are 2 * tokens.
constexpr std::size_t kMostTokens = std::size_t{1} << 29;

bool Aligned(const void* p, std::size_t bytes) { return reinterpret_cast<std::uintptr_t>(p) % bytes == 0; }

void CheckTokens(const AnchoredTokens& t) {
  const KvLayout& layout = t.pages.layout;
  KVS_CHECK(layout.dtype != DType::kF32 && layout.head_dim % 8 == 0);
  KVS_CHECK(t.rope.half % 4 == 0 && 2 * t.rope.half <= layout.head_dim);
  KVS_CHECK(t.stored.size() == t.positions.size() && t.stored.size() <= kMostTokens);
  KVS_CHECK(t.anchors.size() <= kMostAnchors);
  for (const std::int64_t p : t.positions) KVS_CHECK(t.rope.half == 0 || (0 <= p && p < t.rope.positions));
  for (const AnchorKv& anchor : t.anchors) {
    KVS_CHECK(anchor.base.codes != nullptr);
    for (const CodedKv& kv : {anchor.base, anchor.offset}) {
      KVS_CHECK(Aligned(kv.codes, 4) && Aligned(kv.scales, 2) && (kv.codes == nullptr) == (kv.scales == nullptr));
    }
    KVS_CHECK(anchor.tokens >= static_cast<std::int64_t>(t.stored.size()));
  }
}

std::vector<SlotView> StoredSlots(const KvPages& pages, std::span<const KvSlot> slots) {
  std::vector<SlotView> views = SlotViews(pages, slots);
  for (const SlotView& slot : views) KVS_CHECK(slot.page != kNoPage);
  return views;
}

std::vector<AnchorView> AnchorViews(std::span<const AnchorKv> anchors) {
  std::vector<AnchorView> views;
  for (const AnchorKv& a : anchors) {
    views.push_back({{a.base.codes, a.base.scales}, {a.offset.codes, a.offset.scales}, a.tokens});
  }
  return views;
}

// All but the tables.
AnchorArgs ArgsOf(const AnchoredTokens& t, const float* differences) {
  const KvLayout& layout = t.pages.layout;
  AnchorArgs args;
  args.pages = t.pages.base;
  args.page_bytes = static_cast<std::int64_t>(layout.page_bytes());
  args.slab_bytes = static_cast<std::int64_t>(layout.slab_bytes());
  args.layers = layout.num_layers;
  args.kv_heads = layout.num_kv_heads;
  args.head_dim = layout.head_dim;
  args.dtype = layout.dtype;
  args.rope = {t.rope.cos.data(), t.rope.sin.data(), t.rope.positions, t.rope.half};
  args.tokens = static_cast<std::int64_t>(t.stored.size());
  args.count = static_cast<int>(t.anchors.size());
  args.differences = const_cast<float*>(differences);  // written by AnchorDistances alone
  return args;
}

// Looking rows (packed: times their heads) at a time: bounds the shares, which for 128 K keys of 8 kv heads are 32 MiB.
constexpr std::int64_t kLookingRows = 512;

// The segments as they are seen by some rows alone, which count from 0.
std::vector<KvSegment> SeenBy(std::span<const std::int64_t> rows, std::span<const KvSegment> segments) {
  std::vector<KvSegment> seen(segments.begin(), segments.end());
  const auto before = [&](std::int64_t row) { return std::lower_bound(rows.begin(), rows.end(), row) - rows.begin(); };
  for (KvSegment& s : seen) {
    s.row_begin = before(s.row_begin);
    s.row_end = before(s.row_end);
  }
  return seen;
}

// Puts the items in the order in which shares are added, those of asked segments first; returns the columns.
std::vector<MassColumn> OrderByColumn(std::span<float* const> mass, std::vector<WorkItem>* items) {
  const auto order = [&](const WorkItem& i) {
    const bool idle = mass[Index(i.segment_begin)] == nullptr;
    return std::tuple(idle, i.segment_begin, i.split, i.packed_begin);
  };
  std::sort(items->begin(), items->end(), [&](const WorkItem& a, const WorkItem& b) { return order(a) < order(b); });
  std::vector<MassColumn> columns;
  for (int n = 0; n < static_cast<int>(items->size()); ++n) {
    const WorkItem& item = (*items)[Index(n)];
    float* const to = mass[Index(item.segment_begin)];
    if (to == nullptr) break;
    if (columns.empty() || columns.back().segment != item.segment_begin || columns.back().split != item.split) {
      columns.push_back({item.segment_begin, item.split, n, n, to});
    }
    columns.back().item_end = n + 1;
  }
  return columns;
}

}  // namespace

void CudaKv::AttentionMass(const AttentionParams& p, std::span<const std::int64_t> rows, std::span<float* const> mass) {
  KVS_CHECK(mass.size() == p.segments.size());
  KVS_CHECK(std::adjacent_find(rows.begin(), rows.end(), std::greater_equal<>()) == rows.end());
  KVS_CHECK(rows.empty() || (rows.front() >= 0 && rows.back() < p.q.rows));
  const std::int64_t group = p.num_heads / p.pages.layout.num_kv_heads;
  const std::size_t at_a_time = Index(std::max<std::int64_t>(1, kLookingRows / group));
  for (std::size_t begin = 0; begin < rows.size() && queue_.failed().ok(); begin += at_a_time) {
    queue_.Keep(MassOf(p, rows.subspan(begin, std::min(at_a_time, rows.size() - begin)), mass));
  }
}

Status CudaKv::MassOf(const AttentionParams& p, std::span<const std::int64_t> rows, std::span<float* const> mass) {
  std::vector<std::int64_t> positions;
  for (const std::int64_t row : rows) positions.push_back(p.positions[Index(row)]);
  const std::vector<KvSegment> segments = SeenBy(rows, p.segments);
  AttentionParams part = p;
  part.q.rows = part.out.rows = static_cast<std::int64_t>(rows.size());
  part.positions = positions;
  part.segments = segments;
  AttentionPlan plan = PlanAttention(part, {.spread_bytes = std::numeric_limits<std::int64_t>::max()});
  const std::vector<MassColumn> columns = OrderByColumn(mass, &plan.items);
  if (columns.empty()) return OkStatus();

  const KvLayout& layout = p.pages.layout;
  MassArgs args;
  args.packed_rows = part.q.rows * (p.num_heads / layout.num_kv_heads);
  args.items = static_cast<int>(plan.items.size());
  args.asked_items = columns.back().item_end;
  args.num_columns = static_cast<int>(columns.size());
  const std::int64_t stats = 2 * plan.partials, totals = 2 * args.packed_rows * layout.num_kv_heads;
  const std::int64_t shares = std::int64_t{args.asked_items} * layout.num_kv_heads * kSplitRows;
  KVS_ASSIGN_OR_RETURN(const DeviceBlock scratch,
                       DeviceBlock::Take(queue_.memory(), Index(stats + totals + shares) * sizeof(float)));
  args.attention.partial_stats = reinterpret_cast<float*>(scratch.data());
  args.totals = args.attention.partial_stats + stats;
  args.shares = args.totals + totals;
  const std::span<const MassColumn> staged(columns);
  KVS_RETURN_IF_ERROR(
      StageAttention(part, &plan, StagedBytes(rows) + StagedBytes(staged), queue_.staging(), &args.attention));
  KVS_ASSIGN_OR_RETURN(args.q_rows, queue_.staging().Put(rows));
  KVS_ASSIGN_OR_RETURN(args.columns, queue_.staging().Put(staged));
  queue_.Do("attention_mass", part.q.rows, args.items, [&] { return queue_.device().Mass(args, layout.head_dim); });
  return OkStatus();
}

Status CudaKv::AnchorDistances(const AnchoredTokens& tokens, float* differences, std::span<float> distances) {
  CheckTokens(tokens);
  KVS_CHECK(distances.size() == tokens.anchors.size());
  std::fill(distances.begin(), distances.end(), 0.0f);
  if (tokens.stored.empty() || tokens.anchors.empty()) return queue_.failed();
  AnchorArgs args = ArgsOf(tokens, differences);
  auto scratch = DeviceBlock::Take(queue_.memory(), Index((args.tokens + 1) * args.count) * sizeof(float));
  if (!scratch.ok()) return scratch.status();
  args.distances = reinterpret_cast<float*>(scratch->data());
  args.squares = args.distances + args.count;
  const std::vector<SlotView> slots = StoredSlots(tokens.pages, tokens.stored);
  const std::vector<AnchorView> anchors = AnchorViews(tokens.anchors);
  queue_.Do("anchor_distances", args.tokens, args.count, [&]() -> Status {
    const std::span<const SlotView> stored(slots);
    const std::span<const AnchorView> views(anchors);
    KVS_RETURN_IF_ERROR(
        queue_.staging().Begin(StagedBytes(stored) + StagedBytes(tokens.positions) + StagedBytes(views)));
    KVS_ASSIGN_OR_RETURN(args.stored, queue_.staging().Put(stored));
    KVS_ASSIGN_OR_RETURN(args.positions, queue_.staging().Put(tokens.positions));
    KVS_ASSIGN_OR_RETURN(args.anchors, queue_.staging().Put(views));
    return queue_.device().AnchorDistances(args);
  });
  queue_.Do("distances", args.count, 0,
            [&] { return queue_.device().CopyOut(distances.data(), scratch->data(), distances.size_bytes()); });
  return queue_.Sync();
}

void CudaKv::ApplyAnchors(const AnchoredTokens& tokens, const float* differences, std::span<const KvSlot> to,
                          std::span<const std::int64_t> to_positions) {
  CheckTokens(tokens);
  KVS_CHECK(to.size() == tokens.stored.size() && to_positions.size() == to.size());
  KVS_CHECK(tokens.pages.layout.num_layers <= 65535);  // blocks in y
  for (const std::int64_t p : to_positions) {
    KVS_CHECK(tokens.rope.half == 0 || (0 <= p && p < tokens.rope.positions));
  }
  const std::vector<SlotView> from = StoredSlots(tokens.pages, tokens.stored), into = StoredSlots(tokens.pages, to);
  // All tokens move at once: what one writes no other may read or write.
  struct Written {
    std::uint32_t page;
    std::int32_t offset;
    std::size_t token;
  };
  std::vector<Written> written;
  for (std::size_t t = 0; t < into.size(); ++t) written.push_back({into[t].page, into[t].offset, t});
  const auto before = [](const Written& a, const Written& b) {
    return a.page != b.page ? a.page < b.page : a.offset < b.offset;
  };
  std::sort(written.begin(), written.end(), before);
  for (std::size_t i = 0; i + 1 < written.size(); ++i) KVS_CHECK(before(written[i], written[i + 1]));
  for (std::size_t t = 0; t < from.size(); ++t) {
    const Written read{from[t].page, from[t].offset, t};
    const auto at = std::lower_bound(written.begin(), written.end(), read, before);
    KVS_CHECK(at == written.end() || before(read, *at) || at->token == t);
  }
  if (to.empty()) return;
  AnchorArgs args = ArgsOf(tokens, differences);
  const std::vector<AnchorView> anchors = AnchorViews(tokens.anchors);
  queue_.Do("apply_anchors", args.tokens, args.count, [&]() -> Status {
    const std::span<const SlotView> a(from), b(into);
    const std::span<const AnchorView> views(anchors);
    KVS_RETURN_IF_ERROR(queue_.staging().Begin(StagedBytes(a) + StagedBytes(b) + StagedBytes(tokens.positions) +
                                               StagedBytes(to_positions) + StagedBytes(views)));
    KVS_ASSIGN_OR_RETURN(args.stored, queue_.staging().Put(a));
    KVS_ASSIGN_OR_RETURN(args.to, queue_.staging().Put(b));
    KVS_ASSIGN_OR_RETURN(args.positions, queue_.staging().Put(tokens.positions));
    KVS_ASSIGN_OR_RETURN(args.to_positions, queue_.staging().Put(to_positions));
    KVS_ASSIGN_OR_RETURN(args.anchors, queue_.staging().Put(views));
    return queue_.device().ApplyAnchors(args);
  });
}

}  // namespace kvshare::kernels::cuda

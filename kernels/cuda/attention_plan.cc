#include "kernels/cuda/attention_plan.h"

#include <algorithm>
#include <utility>

#include "libkvshare/core/check.h"

namespace kvshare::kernels::cuda {
namespace {

static_assert(kPageRows == kPageTokens && kSplitRows == kSplitTokens);

class Planner {
 public:
  Planner(const AttentionParams& p, const PlanLimits& limits)
      : p_(p), limits_(limits), group_(p.num_heads / p.pages.layout.num_kv_heads) {}

  AttentionPlan Run() {
    Check();
    for (const KvSegment& s : p_.segments) plan_.segments.push_back(View(s));
    plan_.spread = FitsSpread();
    if (plan_.spread) {
      Spread();
    } else {
      Walk();
    }
    std::stable_sort(costs_.begin(), costs_.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
    for (const auto& [cost, item] : costs_) plan_.items.push_back(item);
    return std::move(plan_);
  }

 private:
  void Check() const {
    const KvLayout& layout = p_.pages.layout;
    KVS_CHECK(layout.dtype != DType::kF32 && (layout.head_dim == 64 || layout.head_dim == 128));
    KVS_CHECK(p_.num_heads % layout.num_kv_heads == 0 && 2 * p_.rope.half <= layout.head_dim);
    KVS_CHECK(p_.q.dtype == DType::kF32 && static_cast<std::int64_t>(p_.positions.size()) == p_.q.rows);
    KVS_CHECK(p_.layer >= 0 && p_.layer < layout.num_layers && p_.out.rows == p_.q.rows);
    KVS_CHECK(p_.out.dtype == DType::kF32 || p_.out.dtype == layout.dtype);
    for (const KvSegment& s : p_.segments) {
      KVS_CHECK(0 <= s.row_begin && s.row_begin <= s.row_end && s.row_end <= p_.q.rows);
      KVS_CHECK(0 <= s.first && s.first < kPageTokens && s.length >= 0);
      KVS_CHECK(static_cast<std::int64_t>(s.pages.size()) * kPageTokens >= s.first + s.length);
      KVS_CHECK(s.positions.empty() || static_cast<std::int64_t>(s.positions.size()) == s.length);
      KVS_CHECK(s.skip.empty() || s.skip.size() == s.pages.size());
      for (const PageIndex page : s.pages) KVS_CHECK(page < p_.pages.num_pages);
      CheckAngles(s);
    }
  }

  // No row that sees a key may ask for an angle that the RoPE table has not: the device would read beyond it.
  void CheckAngles(const KvSegment& s) const {
    if (p_.rope.half == 0 || s.length == 0) return;
    for (std::int64_t i = s.row_begin; i < s.row_end; ++i) {
      const std::int64_t position = p_.positions[static_cast<std::size_t>(i)];
      if (position < PositionOf(s, 0)) continue;
      KVS_CHECK(0 <= position - s.shift && position - s.shift <= 2 * (p_.rope.positions - 1));
    }
  }

  static SegmentView View(const KvSegment& s) {
    SegmentView v;
    v.start = s.start;
    v.length = s.length;
    v.shift = s.shift;
    v.row_begin = s.row_begin;
    v.row_end = s.row_end;
    v.first = s.first;
    return v;
  }

  // What rows (tokens) [begin, end) see of a segment, at most: SeenRows rises with the position.
  RowRange SeenByAny(std::size_t segment, std::int64_t begin, std::int64_t end) const {
    const auto rows = p_.positions.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
    const auto [least, greatest] = std::minmax_element(rows.begin(), rows.end());
    SegmentView s = plan_.segments[segment];
    const auto& positions = p_.segments[segment].positions;
    if (!positions.empty()) s.positions = positions.data();
    return {SeenRows(s, *least, p_.window).begin, SeenRows(s, *greatest, p_.window).end};
  }

  // Places the partials of every segment; false where they would be too many.
  bool FitsSpread() {
    const std::int64_t row_bytes = (p_.pages.layout.head_dim + 2) * std::int64_t{sizeof(float)};
    std::int64_t partials = 0;
    for (std::size_t n = 0; n < plan_.segments.size(); ++n) {
      SegmentView& s = plan_.segments[n];
      if (s.row_begin == s.row_end) continue;
      const RowRange seen = SeenByAny(n, s.row_begin, s.row_end);
      if (seen.end <= seen.begin) continue;
      const std::int64_t first = seen.begin / kSplitRows;
      const std::int64_t splits = (seen.end + kSplitRows - 1) / kSplitRows - first;
      s.first_split = static_cast<int>(first);
      s.partial_base = partials;
      partials += splits * p_.pages.layout.num_kv_heads * (s.row_end - s.row_begin) * group_;
      if (partials * row_bytes > limits_.spread_bytes) return false;
    }
    plan_.partials = partials;
    return true;
  }

  void Add(std::int64_t begin, std::int64_t end, int segment_begin, int segment_end, int split, std::int64_t cost) {
    costs_.push_back({cost, {begin, static_cast<int>(end - begin), segment_begin, segment_end, split}});
  }

  void Spread() {
    for (std::size_t n = 0; n < plan_.segments.size(); ++n) {
      const SegmentView& s = plan_.segments[n];
      const int index = static_cast<int>(n);
      for (std::int64_t at = s.row_begin * group_; at < s.row_end * group_; at += kTileRows) {
        const std::int64_t end = std::min(at + kTileRows, s.row_end * group_);
        const RowRange seen = SeenByAny(n, at / group_, (end - 1) / group_ + 1);
        for (std::int64_t u = seen.begin / kSplitRows; u * kSplitRows < seen.end && seen.begin < seen.end; ++u) {
          const std::int64_t keys = std::min(seen.end, (u + 1) * kSplitRows) - std::max(seen.begin, u * kSplitRows);
          Add(at, end, index, index + 1, static_cast<int>(u), keys);
        }
      }
    }
  }

  // Tiles are cut where the set of segments changes.
  void Walk() {
    std::vector<std::int64_t> cuts = {0, p_.q.rows};
    for (const SegmentView& s : plan_.segments) {
      cuts.push_back(s.row_begin);
      cuts.push_back(s.row_end);
    }
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    for (std::size_t c = 0; c + 1 < cuts.size(); ++c) {
      for (std::int64_t at = cuts[c] * group_; at < cuts[c + 1] * group_; at += kTileRows) {
        const std::int64_t end = std::min(at + kTileRows, cuts[c + 1] * group_);
        // The segments that these rows see lie between the first and the last of them.
        int first = static_cast<int>(plan_.segments.size()), last = 0;
        std::int64_t cost = 0;
        for (std::size_t n = 0; n < plan_.segments.size(); ++n) {
          const WorkItem probe{at, static_cast<int>(end - at)};
          if (!Covers(plan_.segments[n], group_, probe)) continue;
          first = std::min(first, static_cast<int>(n));
          last = static_cast<int>(n) + 1;
          const RowRange seen = SeenByAny(n, at / group_, (end - 1) / group_ + 1);
          cost += std::max<std::int64_t>(0, seen.end - seen.begin);
        }
        Add(at, end, std::min(first, last), last, -1, cost);
      }
    }
  }

  const AttentionParams& p_;
  const PlanLimits& limits_;
  const int group_;
  AttentionPlan plan_;
  std::vector<std::pair<std::int64_t, WorkItem>> costs_;
};

}  // namespace

PageView ViewOf(const KvPages& pages, int layer) {
  const KvLayout& layout = pages.layout;
  return {pages.base + layout.slab_offset(layer, 0, 0), static_cast<std::int64_t>(layout.page_bytes()),
          static_cast<std::int64_t>(layout.slab_bytes()), layout.num_kv_heads, layout.dtype};
}

AttentionPlan PlanAttention(const AttentionParams& p, const PlanLimits& limits) { return Planner(p, limits).Run(); }

}  // namespace kvshare::kernels::cuda

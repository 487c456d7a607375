#include "kernels/cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "kernels/cpu/attention_kernel.h"
#include "kernels/cpu/page_rows.h"
#include "kernels/cpu/rope_angle.h"
#include "kernels/cpu/thread_pool.h"
#include "libkvshare/core/check.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace kvshare::kernels {

#if defined(__x86_64__)
ScopedFlushDenormals::ScopedFlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }  // FTZ | DAZ
ScopedFlushDenormals::~ScopedFlushDenormals() { _mm_setcsr(saved_); }
#else
ScopedFlushDenormals::ScopedFlushDenormals() : saved_(0) {}
ScopedFlushDenormals::~ScopedFlushDenormals() = default;
#endif

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896340736f;

// Rows of a tile, that is tokens x query heads per kv head: enough that packing a page (about 1000 cycles) is a few
// percent of using it (300 cycles a row), few enough that the sums stay in L2.
constexpr int kTileRows = 192;
constexpr int kLeastTileRows = 24;
// A call of so few rows is one tile: what is packed for a second one would be packed for few rows.
constexpr int kMostTileRows = 3 * kTileRows;

// Grows, never shrinks, aligned to cache lines. Contents do not survive growth.
class Scratch {
 public:
  template <typename T>
  T* Get(std::size_t count) {
    const std::size_t bytes = count * sizeof(T);
    if (bytes > capacity_) {
      capacity_ = bytes + bytes / 2;
      data_.reset(static_cast<std::byte*>(::operator new (capacity_, std::align_val_t{64})));
    }
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { ::operator delete (p, std::align_val_t{64}); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t capacity_ = 0;
};

// One split of one segment, as seen by some tile: what one partial result covers.
struct Unit {
  const KvSegment* segment;
  std::int64_t first;  // page rows [first, end) of the segment; `first` begins a page
  std::int64_t end;
};

// Consecutive rows of one request, about: what a row of it does not see is masked.
struct RowTile {
  std::int64_t begin;  // rows (tokens) of the batch
  std::int64_t end;
  std::int64_t first_position;  // least and greatest position of its rows
  std::int64_t last_position;
  std::size_t unit_begin;  // its units, in the order in which they are folded
  std::size_t unit_end;
  std::int64_t cost;        // keys x rows, about
  std::size_t partial = 0;  // where its partials lie when units are computed apart
};

// Units [unit_begin, unit_end) of one tile for one kv head.
struct Task {
  std::size_t tile;
  int kv_head;
  std::size_t unit_begin;
  std::size_t unit_end;
  std::int64_t cost;
};

struct ThreadScratch {
  Scratch query, seen, keys, values, masks, partial, total;
  PageRows seen_by_all;  // what all rows of `seen` have in common
};

class AttentionCall {
 public:
  AttentionCall(const AttentionParams& p, const AttentionKernel& kernel)
      : p_(p),
        kernel_(kernel),
        layout_(p.pages.layout),
        group_(p.num_heads / p.pages.layout.num_kv_heads),
        padded_((p.pages.layout.head_dim + 15) / 16 * 16) {
    KVS_CHECK(layout_.head_dim % 8 == 0 && layout_.head_dim <= 256);
    KVS_CHECK(p.num_heads % layout_.num_kv_heads == 0);
    KVS_CHECK(2 * p.rope.half <= layout_.head_dim);
    KVS_CHECK(p.q.dtype == DType::kF32 && static_cast<std::int64_t>(p.positions.size()) == p.q.rows);
  }

  void Run(ThreadPool& pool) {
    MakeTiles(pool.size());
    MakeTasks(pool.size());
    pool.ParallelFor(static_cast<std::int64_t>(tasks_.size()), [this](std::int64_t i) {
      const ScopedFlushDenormals flush;
      RunTask(tasks_[static_cast<std::size_t>(i)]);
      if (kernel_.release != nullptr) kernel_.release();
    });
  }

 private:
  // Cuts the rows where other segments take over, then into tiles; lists each tile's visible units. Where segments only
  // begin, as along a prompt with moved chunks, there is no cut: every tile packs the pages it sees.
  void MakeTiles(int threads) {
    const std::int64_t rows = p_.q.rows;
    std::vector<std::int64_t> begins, ends;
    std::int64_t row_units = 0;  // of all rows
    for (const KvSegment& s : p_.segments) {
      KVS_CHECK(0 <= s.row_begin && s.row_begin <= s.row_end && s.row_end <= rows);
      KVS_CHECK(0 <= s.first && s.first < kPageTokens && s.length >= 0);
      KVS_CHECK(static_cast<std::int64_t>(s.pages.size()) * kPageTokens >= s.first + s.length);
      KVS_CHECK(s.positions.empty() || static_cast<std::int64_t>(s.positions.size()) == s.length);
      KVS_CHECK(s.skip.empty() || s.skip.size() == s.pages.size());
      if (s.row_begin == s.row_end) continue;
      row_units += (s.first + s.length + kSplitTokens - 1) / kSplitTokens * (s.row_end - s.row_begin);
      begins.push_back(s.row_begin);
      ends.push_back(s.row_end);
    }
    std::sort(begins.begin(), begins.end());
    std::sort(ends.begin(), ends.end());
    std::vector<std::int64_t> cuts = {0};
    std::set_intersection(begins.begin(), begins.end(), ends.begin(), ends.end(), std::back_inserter(cuts));
    cuts.push_back(rows);
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    // Where whole tiles and their units are too few to keep all threads busy to the end, smaller ones; their size
    // changes no bits.
    std::int64_t tokens = std::max(1, kTileRows / group_);
    if (rows * group_ <= kMostTileRows) tokens = std::max(tokens, rows);
    while (tokens > 1 && tokens * group_ > kLeastTileRows && row_units * layout_.num_kv_heads < 4 * threads * tokens)
      tokens /= 2;
    for (std::size_t c = 0; c + 1 < cuts.size(); ++c) {
      for (std::int64_t begin = cuts[c]; begin < cuts[c + 1]; begin += tokens) {
        AddRowTile(begin, std::min(begin + tokens, cuts[c + 1]));
      }
    }
  }

  void AddRowTile(std::int64_t begin, std::int64_t end) {
    const auto rows = p_.positions.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
    const auto [least, greatest] = std::minmax_element(rows.begin(), rows.end());
    RowTile tile{begin, end, *least, *greatest, units_.size(), 0, 0};
    for (const KvSegment& s : p_.segments) {
      if (s.row_begin >= end || s.row_end <= begin) continue;
      // What any row of the tile may see.
      const std::int64_t begin_seen = SeenBy(s, tile.first_position, p_.window).begin;
      const std::int64_t end_seen = SeenBy(s, tile.last_position, p_.window).end;
      if (end_seen <= begin_seen) continue;
      for (std::int64_t first = begin_seen / kSplitTokens * kSplitTokens; first < end_seen; first += kSplitTokens) {
        const std::int64_t split_end = std::min(first + kSplitTokens, end_seen);
        units_.push_back({&s, first, split_end});
        tile.cost += (split_end - std::max(first, begin_seen)) * (end - begin);
      }
    }
    tile.unit_end = units_.size();
    tiles_.push_back(tile);
  }

  // One task per tile and kv head; where that leaves threads idle, one per unit, folded by whoever finishes last.
  void MakeTasks(int threads) {
    const std::size_t kv_heads = static_cast<std::size_t>(layout_.num_kv_heads);
    const bool apart = tiles_.size() * kv_heads < 8 * static_cast<std::size_t>(threads);
    std::size_t partial = 0;
    for (std::size_t t = 0; t < tiles_.size(); ++t) {
      RowTile& tile = tiles_[t];
      const std::size_t units = tile.unit_end - tile.unit_begin;
      for (int head = 0; head < layout_.num_kv_heads; ++head) {
        if (!apart || units < 2) {
          tasks_.push_back({t, head, tile.unit_begin, tile.unit_end, tile.cost});
          continue;
        }
        for (std::size_t u = tile.unit_begin; u < tile.unit_end; ++u) {
          tasks_.push_back({t, head, u, u + 1, (units_[u].end - units_[u].first) * (tile.end - tile.begin)});
        }
      }
      if (apart && units >= 2) {
        tile.partial = partial;
        partial += units * kv_heads * PartialFloats(Rows(tile));
      }
    }
    // Tasks of one kv head side by side: what one has read, the next ones find in the caches. The dearest first, so
    // that the last ones are cheap.
    std::stable_sort(tasks_.begin(), tasks_.end(), [](const Task& a, const Task& b) {
      return a.kv_head != b.kv_head ? a.kv_head < b.kv_head : a.cost > b.cost;
    });
    if (partial > 0) {
      thread_local Scratch shared;
      partials_ = shared.Get<float>(partial);
      pending_ = std::vector<std::atomic<std::size_t>>(tiles_.size() * kv_heads);
      for (std::size_t i = 0; i < pending_.size(); ++i) {
        const RowTile& tile = tiles_[i / kv_heads];
        pending_[i].store(tile.unit_end - tile.unit_begin, std::memory_order_relaxed);
      }
    }
  }

  int Rows(const RowTile& tile) const { return static_cast<int>(tile.end - tile.begin) * group_; }
  std::size_t PartialFloats(int rows) const {
    return static_cast<std::size_t>((rows * (padded_ + kSumLanes + 1) + 15) / 16 * 16);
  }
  AttentionPartial PartialAt(float* base, int rows) const {
    float* sum = base + rows * padded_;
    return {base, sum, sum + rows * kSumLanes};
  }

  void RunTask(const Task& task) {
    thread_local ThreadScratch scratch;
    const RowTile& tile = tiles_[task.tile];
    const std::size_t units = tile.unit_end - tile.unit_begin;
    const int rows = Rows(tile);
    const std::size_t floats = PartialFloats(rows);
    const AttentionPartial total = PartialAt(scratch.total.Get<float>(floats), rows);
    if (task.unit_end - task.unit_begin == units) {
      std::fill_n(total.max, rows, kNone);
      const AttentionPartial part = PartialAt(scratch.partial.Get<float>(floats), rows);
      const KvSegment* rotated = nullptr;
      for (std::size_t u = task.unit_begin; u < task.unit_end; ++u) {
        RunUnit(tile, units_[u], task.kv_head, rotated, part, scratch);
        kernel_.fold(total, part, rows, padded_);
      }
      Finish(tile, task.kv_head, total);
      return;
    }
    const std::size_t head = static_cast<std::size_t>(task.kv_head);
    float* base = partials_ + tile.partial + head * units * floats;
    const KvSegment* rotated = nullptr;
    RunUnit(tile, units_[task.unit_begin], task.kv_head, rotated,
            PartialAt(base + (task.unit_begin - tile.unit_begin) * floats, rows), scratch);
    auto& pending = pending_[task.tile * static_cast<std::size_t>(layout_.num_kv_heads) + head];
    if (pending.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    std::fill_n(total.max, rows, kNone);
    for (std::size_t u = 0; u < units; ++u) kernel_.fold(total, PartialAt(base + u * floats, rows), rows, padded_);
    Finish(tile, task.kv_head, total);
  }

  // The partial result of one unit. `rotated` names the segment for which the scratch holds the queries' rotation and
  // what each token of the tile sees.
  void RunUnit(const RowTile& tile, const Unit& unit, int kv_head, const KvSegment*& rotated,
               const AttentionPartial& part, ThreadScratch& scratch) const {
    const int rows = Rows(tile);
    const int d = layout_.head_dim;
    const std::size_t row_bytes = static_cast<std::size_t>(d) * kernel_.element_bytes;
    const std::size_t tile_bytes = static_cast<std::size_t>(kPageTokens * padded_) * kernel_.element_bytes;
    std::byte* q = scratch.query.Get<std::byte>(static_cast<std::size_t>(rows) * row_bytes);
    std::byte* k = scratch.keys.Get<std::byte>(tile_bytes);
    std::byte* v = scratch.values.Get<std::byte>(tile_bytes);
    std::uint64_t* masks = scratch.masks.Get<std::uint64_t>(static_cast<std::size_t>(rows));
    PageRows* seen = scratch.seen.Get<PageRows>(static_cast<std::size_t>(tile.end - tile.begin));
    const KvSegment& s = *unit.segment;
    if (rotated != &s) {
      scratch.seen_by_all = {0, std::numeric_limits<std::int64_t>::max()};
      for (std::int64_t i = tile.begin; i < tile.end; ++i) {
        const bool looks = s.row_begin <= i && i < s.row_end;
        seen[i - tile.begin] = looks ? SeenBy(s, p_.positions[static_cast<std::size_t>(i)], p_.window) : PageRows{};
        scratch.seen_by_all.begin = std::max(scratch.seen_by_all.begin, seen[i - tile.begin].begin);
        scratch.seen_by_all.end = std::min(scratch.seen_by_all.end, seen[i - tile.begin].end);
      }
      RotateQueries(tile, s, seen, kv_head, q);
      rotated = &s;
    }
    std::fill_n(part.max, rows, kNone);
    for (std::int64_t first = unit.first; first < unit.end; first += kPageTokens) {
      const std::size_t page = static_cast<std::size_t>(first / kPageTokens);
      const std::uint64_t keep = KeptRows(s, first / kPageTokens);
      bool all_see_all = true;
      if (!MakeMasks(tile, first, seen, scratch.seen_by_all, keep, masks, all_see_all)) continue;
      KVS_CHECK(s.pages[page] < p_.pages.num_pages);
      const std::byte* keys = p_.pages.slab(s.pages[page], p_.layer, 0, kv_head);
      const std::byte* values = p_.pages.slab(s.pages[page], p_.layer, 1, kv_head);
      const bool more = first + kPageTokens < unit.end;
      const std::byte* next_keys = more ? p_.pages.slab(s.pages[page + 1], p_.layer, 0, kv_head) : nullptr;
      const std::byte* next_values = more ? p_.pages.slab(s.pages[page + 1], p_.layer, 1, kv_head) : nullptr;
      if (rows == group_ && kernel_.add_page != nullptr &&
          kernel_.add_page({q, keys, values, next_keys, next_values, masks[0], rows, d, part})) {
        continue;
      }
      kernel_.pack_keys(keys, d, k);
      const bool finite = kernel_.pack_values(values, d, keep, v);
      AttentionTile work{q, k, v, next_keys, next_values, masks, rows, d, padded_, part};
      if (finite || all_see_all) {
        kernel_.add_tile(work);
        continue;
      }
      // 0 * inf is not 0: keep what a row may not see out of its sums, one row at a time.
      work.rows = 1;
      work.next_k = work.next_v = nullptr;
      for (int r = 0; r < rows; ++r) {
        kernel_.pack_values(values, d, masks[r], v);
        kernel_.add_tile(work);
        work.q = static_cast<const std::byte*>(work.q) + row_bytes;
        work.masks += 1;
        work.state.out += padded_;
        work.state.sum += kSumLanes;
        work.state.max += 1;
      }
    }
  }

  // The keys each row sees of the page whose first row is page row `first`. False if no row sees any.
  bool MakeMasks(const RowTile& tile, std::int64_t first, const PageRows* seen, PageRows seen_by_all,
                 std::uint64_t keep, std::uint64_t* masks, bool& all_see_all) const {
    if (seen_by_all.begin <= first && first + kPageTokens <= seen_by_all.end) {
      std::fill_n(masks, Rows(tile), keep);
      return keep != 0;
    }
    std::uint64_t any = 0;
    for (std::int64_t i = 0; i < tile.end - tile.begin; ++i) {
      const std::uint64_t mask = keep & SeenMask(seen[i], first);
      any |= mask;
      all_see_all &= mask == keep;
      for (int g = 0; g < group_; ++g) *masks++ = mask;
    }
    return any != 0;
  }

  void RotateQueries(const RowTile& tile, const KvSegment& s, const PageRows* seen, int kv_head, std::byte* q) const {
    const std::size_t row_bytes = static_cast<std::size_t>(layout_.head_dim) * kernel_.element_bytes;
    RopeAngle angle(p_.rope);
    for (std::int64_t i = tile.begin; i < tile.end; ++i) {
      const PageRows& tokens = seen[i - tile.begin];
      if (tokens.begin >= tokens.end) {  // it may have no angle towards the segment, and needs none
        const std::size_t bytes = static_cast<std::size_t>(group_) * row_bytes;
        std::memset(q, 0, bytes);
        q += bytes;
        continue;
      }
      angle.Set(p_.positions[static_cast<std::size_t>(i)] - s.shift);
      const float* row = p_.q.row<float>(i) + kv_head * group_ * layout_.head_dim;
      for (int g = 0; g < group_; ++g, q += row_bytes) {
        kernel_.rotate(row + g * layout_.head_dim, angle.cos(), angle.sin(), p_.rope.half, layout_.head_dim,
                       p_.scale * kLog2E, q);
      }
    }
  }

  void Finish(const RowTile& tile, int kv_head, const AttentionPartial& total) const {
    int r = 0;
    for (std::int64_t i = tile.begin; i < tile.end; ++i) {
      for (int g = 0; g < group_; ++g, ++r) {
        const std::int64_t column = static_cast<std::int64_t>(kv_head * group_ + g) * layout_.head_dim;
        void* dst = static_cast<std::byte*>(p_.out.data) +
                    static_cast<std::size_t>(i * p_.out.stride + column) * DTypeBytes(p_.out.dtype);
        kernel_.finish(total.out + r * padded_, total.sum[r * kSumLanes], total.max[r], layout_.head_dim, p_.out.dtype,
                       dst);
      }
    }
  }

  const AttentionParams& p_;
  const AttentionKernel& kernel_;
  const KvLayout& layout_;
  const int group_;   // query heads per kv head
  const int padded_;  // head_dim rounded up to 16
  std::vector<Unit> units_;
  std::vector<RowTile> tiles_;
  std::vector<Task> tasks_;
  std::vector<std::atomic<std::size_t>> pending_;  // per tile and kv head: units not yet done
  float* partials_ = nullptr;
};

}  // namespace

const AttentionKernel& AttentionKernelFor(CpuIsa isa, const KvLayout& layout) {
  const DType pages = layout.dtype;
#if defined(__x86_64__)
  switch (isa) {
    case CpuIsa::kAmxBf16:
      if (pages == DType::kBf16 && layout.head_dim % 32 == 0) return AmxBf16Attention();
      [[fallthrough]];
    case CpuIsa::kAvx512Bf16: return pages == DType::kBf16 ? Avx512Bf16Attention() : Avx512Attention(pages);
    case CpuIsa::kAvx512: return Avx512Attention(pages);
    case CpuIsa::kAvx2: return Avx2Attention(pages);
    case CpuIsa::kAuto:
    case CpuIsa::kPlain: break;
  }
#endif
  KVS_CHECK(isa == CpuIsa::kPlain);
  return PlainAttention(pages);
}

void CpuAttention(const AttentionParams& p, CpuIsa isa, ThreadPool& pool) {
  if (p.q.rows == 0) return;
  AttentionCall(p, AttentionKernelFor(isa, p.pages.layout)).Run(pool);
}

}  // namespace kvshare::kernels
